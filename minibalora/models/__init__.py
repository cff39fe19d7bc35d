"""Plain modules, one file a family of architectures, with the tensor names of Hugging Face checkpoints."""

from torch import nn

from .decoder import Decoder
from .t5 import T5

LanguageModel = Decoder | T5  # they have head, head_weight, embedding, packed, prefill and decode


def stacks_of(model: nn.Module) -> list[nn.ModuleList]:
    """A model's lists of blocks: T5 has two. Our models have no other use for a ModuleList."""
    return [module for module in model.modules() if isinstance(module, nn.ModuleList)]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for stack in stacks_of(model) for block in stack]
