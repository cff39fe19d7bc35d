"""FSDP2: each rank keeps its rows of the frozen weights, and has a block whole only while it computes with it.

Only the frozen weights of the blocks are sharded, nearly all there is of a large model. A and B, their initial values
and Adam's moments stay whole on every rank, so the optimizer, checkpoints, saving and going on with another number of
ranks are what they are without; so do the embedding, the final norm and the head, which `fused.py` wants whole.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from minibalora.base import distributed
from minibalora.checkpoints.weights import read, set_parameter
from minibalora.models import LanguageModel, blocks_of


def load_sharded(model: LanguageModel, dtype: torch.dtype, device: torch.device) -> None:
    """Give an adapted `weights.skeleton` its numbers, in place: of what is sharded, this rank reads its own rows alone.

    Afterwards it is to be called on all ranks equally often. InputError as `weights.read`.
    """
    mesh = init_device_mesh(device.type, (distributed.size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=whole_parameters(block))
    for owner in list(model.modules()):
        if any(child is stack for child in owner.children() for stack in model.stacks):
            # It has nothing sharded of its own: it lets a block be gathered while the one before computes.
            rest = {p for p in owner.parameters() if not isinstance(p, DTensor)}
            fully_shard(owner, mesh=mesh, ignored_params=rest)

    for name, parameter in list(model.named_parameters()):
        stored = model.checkpoint.stored.get(stored_name(name))
        if isinstance(parameter, DTensor):
            rows = read(stored, name, dtype, device, own_rows(len(parameter)))
            shard = DTensor.from_local(
                rows, mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            set_parameter(model, name, nn.Parameter(shard, requires_grad=False))
        elif parameter.is_meta:
            set_parameter(model, name, nn.Parameter(read(stored, name, dtype, device), requires_grad=False))


def whole_parameters(block: nn.Module) -> set[nn.Parameter]:
    """A and B, and the numbers that T5 keeps in its first block and uses in all."""
    embeddings = [p for part in block.modules() if isinstance(part, nn.Embedding) for p in part.parameters()]
    return {p for p in block.parameters() if not p.is_meta} | set(embeddings)


def own_rows(count: int) -> slice:
    """Which of `count` rows this rank keeps: those that torch.chunk gives it, as FSDP2 expects."""
    each = -(-count // distributed.size())
    start = min(distributed.rank() * each, count)
    return slice(start, min(start + each, count))


def stored_name(name: str) -> str:
    """The name in the checkpoint of a parameter of the adapted model."""
    return f"{name.removesuffix('.W')}.weight" if name.endswith(".W") else name
