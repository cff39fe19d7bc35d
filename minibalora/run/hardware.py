"""What --grad-checkpoint, --compile and --fsdp make of a model."""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from minibalora.models import blocks_of
from minibalora.run.settings import Hardware


def fit_hardware(model: nn.Module, hardware: Hardware) -> None:
    """What `hardware` asks for, in place, on an adapted model."""
    if hardware.compile:
        compile_blocks(model)
    if hardware.grad_checkpoint:
        checkpoint_blocks(model)
    if hardware.fsdp:
        from minibalora.run.sharded import load_sharded  # a second of imports that nothing else needs

        load_sharded(model, hardware.dtype, hardware.device)


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass, which computes the block once more: less memory, slower."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile what takes tokens one by one, each block's norms and MLP: once for rows of any length.

    Compiled whole, a model is compiled anew for other lengths: 8 minutes on a CPU where this takes half a minute. So
    attention and mixtures of experts, whose shapes change, stay as they are (`can_compile`).
    """
    for block in blocks_of(model):
        for part in parts_of(block):
            if getattr(part, "can_compile", True):
                part.compile(dynamic=True)


def parts_of(block: nn.Module) -> Iterator[nn.Module]:
    """What a block calls: of a list or dict of modules, which is never called, what stands in it."""
    for part in block.children():
        yield from parts_of(part) if isinstance(part, nn.ModuleList | nn.ModuleDict) else [part]
