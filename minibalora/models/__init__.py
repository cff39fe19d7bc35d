# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Plain modules with the tensor names of Hugging Face checkpoints; one file for each family of architectures.

Every model has its lists of blocks in `stacks`: a decoder has one list, T5 has two. Parts of a block that torch.compile
would recompile again and again have `can_compile = False`.
"""

from torch import nn

from .decoder import Decoder
from .t5 import T5

__all__ = ["LanguageModel", "blocks_of"]

LanguageModel = Decoder | T5  # both have head, head_weight, embedding, packed, prefill and decode


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return all blocks of a model of this folder in order; a T5's encoder comes first."""
    return [block for stack in model.stacks for block in stack]
