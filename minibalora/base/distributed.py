"""One run in several processes (ranks) that torchrun starts. In a single process, these functions do nothing.

Every rank holds all trained parameters. The micro-batches of a step are the same as in one process; they are dealt to
the ranks. Each rank adds up the gradients of its micro-batches, already divided by the counts of the whole step. Once
per step, the gradients are summed over the ranks. So a step gives the same result as in one process, the spectral term
included, apart from the order of summation.

DistributedDataParallel is not used: it averages over ranks in every backward pass, but one sum per step is enough for
the few trained parameters. Only rank 0 prints and writes.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import accumulate, groupby
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minibalora.base.errors import InputError

T = TypeVar("T")
BUCKET = 2**23
PATIENCE = timedelta(days=7)  # ranks wait for each other, for instance in evaluation; torchrun notices dead ones


def is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def join() -> None:
    """Under torchrun, connect to the other ranks and choose this rank's GPU. Only rank 0 prints."""
    if not is_torchrun():
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local < gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo", timeout=PATIENCE)
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def leave() -> None:
    """Wait for the other ranks: torchrun ends all of them as soon as one fails or is stopped."""
    if dist.is_initialized():
        total(0.0)  # torch's own barrier may ask for a GPU, which a run on CPUs does not have
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def check_device(device: torch.device) -> None:
    """Raise InputError if torchrun can't give each process on this machine a device of this kind."""
    if not is_torchrun() or device.type == "cpu":
        return
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None:
        raise InputError(f"--device {device}: torchrun gives each process its own GPU: give --device cuda")
    if processes > gpus:
        raise InputError(f"--nproc-per-node {processes}: there are {gpus} GPUs here: give at most that many")


def on_main(function: Callable[..., T], *args) -> T:
    """Call function(*args) on rank 0; the others wait. Returns its result, or raises its InputError, on all ranks."""
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
    """Return this rank's share of `parts`: rank r of R takes every R-th part, starting with the r-th.

    Gives every rank the same number of parts: with sharded weights, each forward pass needs all ranks. A rank
    that gets no part in the last round gets `idle`.
    """
    share = parts[rank() :: size()]
    return share if len(share) == -(-len(parts) // size()) else [*share, idle]


def broadcast(tensors: Iterable[Tensor], source: int) -> None:
    """Copy these tensors from rank `source` to every rank, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, source)


def gathered(numbers: Tensor) -> Tensor:
    """Collect the numbers (n,) of all ranks. Returns (ranks, n)."""
    if size() == 1:
        return numbers[None]
    rows = [torch.empty_like(numbers) for _ in range(size())]
    dist.all_gather(rows, numbers)
    return torch.stack(rows)


def total(number: float) -> float:
    """Return the sum of the ranks' numbers."""
    return gathered(torch.tensor([number], dtype=torch.float64)).sum().item()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum each parameter's gradient over the ranks, in place. All ranks get the same bits.

    About BUCKET numbers are summed at once: a call for each of a thousand small gradients would mostly wait.
    """
    if size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    ends = accumulate(gradient.numel() for gradient in gradients)
    for _, group in groupby(zip(gradients, ends, strict=True), key=lambda pair: pair[1] // BUCKET):
        bucket = [gradient for gradient, _ in group]
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)  # on a GPU, the host does not wait for it
        for gradient, sums in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(sums.view_as(gradient))


def largest(number: int) -> int:
    """Return the largest of the ranks' numbers, for instance of the signals that they received (0: none).

    A rank that stopped alone would leave the others waiting forever. So all ranks call this at the same points.
    """
    return number if size() == 1 else int(gathered(torch.tensor([number])).max())


def is_first_to_say(line: str) -> bool:
    """Return whether this rank is the first to end with this line, so that an error of all ranks is printed once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}/{hashlib.sha256(line.encode()).hexdigest()}"
    return store.add(key, 1) == 1


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether the error means that another rank ended while this one waited for it."""
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
