# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Plain modules, one file a family of architectures, with the tensor names of Hugging Face checkpoints.

Every model here names its lists of blocks in `stacks`: a decoder has one, T5 two. Part of a block that is of no use to
torch.compile has `can_compile = False`.
"""

from torch import nn

from .decoder import Decoder
from .t5 import T5

__all__ = ["LanguageModel", "blocks_of"]

LanguageModel = Decoder | T5  # they have head, head_weight, embedding, packed, prefill and decode


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model of this folder, in order; of a T5 first the encoder's."""
    return [block for stack in model.stacks for block in stack]
