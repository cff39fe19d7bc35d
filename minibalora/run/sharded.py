"""FSDP2: each rank holds its rows of the frozen weights, and gathers a whole block only while it computes with it.

Only the frozen weights of the blocks are sharded: they are nearly all of a large model. A and B, their initial values
and Adam's moments stay whole on every rank, so the optimizer, checkpoints, saving and resuming on another number of
ranks work as without sharding. The embedding, the final norm and the head stay whole, too: `fused.py` needs them.
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
    """Load the weights of an adapted `weights.skeleton`, in place. Each rank reads only its rows of sharded weights.

    Afterwards, all ranks must call the model equally often. Raises what `weights.read` raises.
    """
    mesh = init_device_mesh(device.type, (distributed.size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=whole_parameters(block))
    for owner in list(model.modules()):
        if any(child is stack for child in owner.children() for stack in model.stacks):
            # No weights of its own are sharded: this lets a block be gathered while the previous one computes.
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
    """Return A and B, and T5's position embeddings, which are in the first block and used by all."""
    embeddings = [p for part in block.modules() if isinstance(part, nn.Embedding) for p in part.parameters()]
    return {p for p in block.parameters() if not p.is_meta} | set(embeddings)


def own_rows(count: int) -> slice:
    """Return the rows, of `count`, that this rank holds: its part of torch.chunk, as FSDP2 expects."""
    chunk = -(-count // distributed.size())
    start = min(distributed.rank() * chunk, count)
    return slice(start, min(start + chunk, count))


def stored_name(name: str) -> str:
    """Return the name in the checkpoint of a parameter of the adapted model."""
    return f"{name.removesuffix('.W')}.weight" if name.endswith(".W") else name
