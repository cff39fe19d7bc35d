"""--grad-checkpoint, --compile and --fsdp, applied to a model."""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from minibalora.models import blocks_of
from minibalora.run.settings import Hardware


def fit_hardware(model: nn.Module, hardware: Hardware) -> None:
    """Apply the settings to an adapted model, in place."""
    if hardware.compile:
        compile_blocks(model)
    if hardware.grad_checkpoint:
        checkpoint_blocks(model)
    if hardware.fsdp:
        from minibalora.run.sharded import load_sharded  # its imports take a second

        load_sharded(model, hardware.dtype, hardware.device)


def checkpoint_blocks(model: nn.Module) -> None:
    """Save only each block's input; recompute the block in the backward pass: less memory, slower."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=has_dropout(model))


def has_dropout(model: nn.Module) -> bool:
    """Whether some part of the model drops out in training: recomputing a block then needs the same random numbers."""
    return any(value for name, value in vars(model.config).items() if "dropout" in name)


def compile_blocks(model: nn.Module) -> None:
    """Compile the parts of each block that treat tokens one by one: norms and MLPs, once for rows of any length.

    A model compiled as a whole is recompiled for other lengths: 8 minutes on a CPU, where this takes half a minute. So
    attention and mixtures of experts, whose shapes change, are not compiled (`can_compile`).
    """
    for block in blocks_of(model):
        for part in parts_of(block):
            if getattr(part, "can_compile", True):
                part.compile(dynamic=True)


def parts_of(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a block calls: its children, and the entries of lists and dicts of modules."""
    for part in block.children():
        yield from parts_of(part) if isinstance(part, nn.ModuleList | nn.ModuleDict) else [part]
