"""One run in several processes, its ranks, as torchrun starts them; in a process of its own all of this does nothing.

Every rank holds what is trained. A step's micro-batches are cut as one process cuts them and dealt out, each rank adds
up the gradients of its own, already divided by the count of the whole step, and these are summed over the ranks once a
step. So a step is what it is in one process, the spectral term included, but for the order of a sum.

Why not DistributedDataParallel: it averages over ranks, in hooks of every backward pass, where a sum once a step over
the little that is trained does. Only rank 0 speaks and writes.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minibalora.base.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # ranks wait for each other, for instance while rank 0 evaluates; torchrun sees dead ones


def is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def join() -> None:
    """Under torchrun: meet the other ranks. Each has its own GPU where there are enough; only rank 0 prints."""
    if not is_torchrun():
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local < gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo", timeout=PATIENCE)
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def leave() -> None:
    """Wait for the other ranks, for torchrun ends them all as soon as one has failed or was stopped."""
    if dist.is_initialized():
        total(0.0)  # where torch's own barrier may ask for a GPU that a run on the CPU has not
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def check_device(device: torch.device) -> None:
    """InputError if `device` is not what torchrun gives each process on this machine."""
    if not is_torchrun() or device.type == "cpu":
        return
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None:
        raise InputError(f"--device {device}: torchrun gives each process a GPU of its own: give --device cuda")
    if processes > gpus:
        raise InputError(f"--nproc-per-node {processes}: there are {gpus} GPUs here: give at most that many")


def on_main(function: Callable[..., T], *args) -> T:
    """What rank 0 gets from function(*args), on every rank; the others wait. Its InputError is raised on every rank."""
    if size() == 1:
        return function(*args)
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = function(*args)
        except InputError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def deal(parts: list[T], idle: T) -> list[T]:
    """This rank's share of `parts`, dealt in rounds: rank r of R takes the r-th of every R, neighbours in length.

    All ranks get equally many, for where weights are sharded every forward pass needs every rank: one for which the
    last round has nothing left gets `idle`.
    """
    own = parts[rank() :: size()]
    return own if len(own) == -(-len(parts) // size()) else [*own, idle]


def broadcast(tensors: Iterable[Tensor], source: int) -> None:
    """Give every rank what rank `source` has in these tensors, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, source)


def gathered(numbers: Tensor) -> Tensor:
    """(n,) of each rank -> (ranks, n)."""
    if size() == 1:
        return numbers[None]
    found = [torch.empty_like(numbers) for _ in range(size())]
    dist.all_gather(found, numbers)
    return torch.stack(found)


def total(number: float) -> float:
    """The sum over the ranks."""
    return gathered(torch.tensor([number], dtype=torch.float64)).sum().item()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up each parameter's gradient over the ranks, in place, so that all ranks have the same to the last bit."""
    if size() > 1:
        works = [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters]
        for work in works:
            work.wait()


def largest(number: int) -> int:
    """The largest of the ranks' numbers, for instance of the stop signals that they have received, 0 being none.

    What a rank has received alone must not change its course: the others would wait for it for ever. So all ranks ask
    this at the same points, and get the same answer.
    """
    return number if size() == 1 else int(gathered(torch.tensor([number])).max())


def is_first_to_say(line: str) -> bool:
    """Whether no other rank has ended with this very line: what all of them find wrong is said once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    said = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}/{hashlib.sha256(line.encode()).hexdigest()}"
    return store.add(said, 1) == 1


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether the error is that another rank, which was waited for, has ended."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
