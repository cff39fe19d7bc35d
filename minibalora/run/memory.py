"""Compute the memory of a training step by taking it on empty tensors, whose sizes are counted. There is no formula, so
it holds for any model that `minibalora.models` can have.

Counts the bytes of tensors, as `torch.cuda.max_memory_allocated` does. CUDA, Python and torch themselves, and memory
that an allocator can't use, come on top. `python tests/bench_memory.py` compares the result with the tensors that steps
hold on a CPU.
"""

import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from minibalora.data.batches import Packed
from minibalora.lean_product import factors_kept
from minibalora.lowrank import pretrained
from minibalora.models import blocks_of
from minibalora.models.mixture import keep_router_outputs, load_balance
from minibalora.objective import Objective, head_of, lambdas, nlu_loss
from minibalora.run.empty_tensors import DEVICE, backward, empty_copy, without_numbers
from minibalora.run.loop import is_mixed, optimizer_of
from minibalora.run.settings import Hardware

GATHERED = 3  # blocks that FSDP2 holds whole: the current one, the next one, and the buffer that receives it
FEW = 3  # blocks of a stack in the first measurement of a deep model; the second one has two more
Loss = Callable[[], tuple[Tensor, ...]]  # computes a micro-batch's loss, and returns what a step holds beside it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that are passed in or made inside. `history` has the number after each new
    tensor, `now` the current one."""

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.now, self.history, self.storages = 0, [], {}
        for tensor in tensors:
            self.add(tensor)

    @property
    def peak(self) -> int:
        return max(self.history)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, partial(self.drop, key, size))
            self.now += size
            self.history.append(self.now)

    def drop(self, key: int, size: int, _) -> None:
        del self.storages[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is DEVICE:
            return args[0].fake_device
        outputs = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return outputs


def expected_memory(
    model: nn.Module, hardware: Hardware, loss_of: Callable[[nn.Module], Loss], accumulates: bool, ranks: int = 1
) -> int:
    """Return the bytes at the peak of a step on one device.

    model: adapted, or without adapted layers if trained in full; on any device, before `fit_hardware`. loss_of(copy of
    the model) returns the function that computes a micro-batch's loss. accumulates: a step has several micro-batches.
    ranks: the number of processes that share the blocks' frozen weights (--fsdp).
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    peaks = by_straight_line(model, partial(peaks_of, model, hardware, loss_of, accumulates))
    return held(model, ranks) + 2 * trained + int(peaks.max())  # 2: Adam's moments


def by_straight_line(model: nn.Module, measure: Callable[[list[int]], np.ndarray]) -> np.ndarray:
    """Return measure(numbers of blocks in the model's stacks). For a deep stack, it is computed from few blocks and two
    more: blocks repeat, at most in pairs, except for the first one and the last one."""
    counts = [len(stack) for stack in model.stacks]
    few = [FEW if count > 2 * FEW + 2 else count for count in counts]
    base = total = measure(few)
    for index, count in enumerate(counts):
        if count > few[index]:
            more = measure([*few[:index], FEW + 2, *few[index + 1 :]])
            total = total + (more - base) * (count - FEW) / 2
    return total


def empty_run(
    model: nn.Module, hardware: Hardware, loss_of: Callable[[nn.Module], Loss], counts: list[int]
) -> tuple[nn.Module, torch.optim.Optimizer, Loss]:
    """Return a copy of the model with so many blocks, see `empty_copy`, its optimizer after a first step, and its loss.
    Call it, and use them, inside `without_numbers`."""
    twin = empty_copy(model, counts).train()
    for block in (
        blocks_of(twin) if hardware.grad_checkpoint else ()
    ):  # as `fit_hardware`, but there is nothing to check
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, determinism_check="none")
    optimizer, loss = optimizer_of(twin), loss_of(twin)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # allocates the moments
    optimizer.zero_grad()
    mixed = is_mixed(model, hardware)

    def mixed_loss() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", hardware.dtype, mixed):
            return loss()

    return twin, optimizer, mixed_loss


def peaks_of(
    model: nn.Module, hardware: Hardware, loss_of: Callable[[nn.Module], Loss], accumulates: bool, counts: list[int]
) -> np.ndarray:
    """Return the largest numbers of bytes, beside weights and Adam's moments, in three parts of a step: before the
    backward pass, in that of the last two blocks, and in the rest of it. In each part, they are linear in the number of
    blocks: at first most bytes are kept tensors, at last gradients."""
    with without_numbers(hardware.device), LiveBytes() as live:
        twin, optimizer, loss = empty_run(model, hardware, loss_of, counts)
        always, cuts = live.now, [len(live.history)]

        def note_backward(_, inputs: tuple) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: cuts.append(len(live.history)))

        blocks_of(twin)[-2:][0].register_forward_pre_hook(note_backward)
        for parameter in optimizer.param_groups[0]["params"] if accumulates else ():
            parameter.grad = torch.empty_like(parameter)  # as after the first micro-batch
        with factors_kept(twin):  # as `loop.Run`
            value, *_held = loss()
            cuts.append(len(live.history))
            backward(value)
    parts = np.split(np.array(live.history), [*cuts, len(live.history)][:4])[1:4]
    return np.array([part.max(initial=always) - always for part in parts])


def generation_loss(batch: Packed, objective: Objective, micro_batches: int, is_plain: bool, model: nn.Module) -> Loss:
    """Return the function that computes the loss of train_nlg.py, with a step of so many micro-batches' teachers."""
    head, weights = head_of(model, is_plain), lambdas(objective, 1, 2, 0.5)
    if objective.router_aux > 0:
        keep_router_outputs(model)

    def loss() -> tuple[Tensor, ...]:
        teacher = others = None
        if objective.needs_teacher:
            with pretrained(model):
                teacher = batch.states(model)
            others = teacher.repeat(micro_batches - 1, 1)
        total, _ = head.loss(batch.states(model), teacher, batch.targets, objective, weights)
        if objective.router_aux > 0:
            total = total + objective.router_aux * load_balance(model)
        return total, teacher, others

    return loss


def classification_loss(inputs: tuple[Tensor, ...], labels: Tensor, objective: Objective, model: nn.Module) -> Loss:
    """Return the function that computes the loss of train_nlu.py, whose teacher's logits are on the CPU."""
    weights = lambdas(objective, 1, 2, 0.5)

    def loss() -> tuple[Tensor, ...]:
        student = model(*inputs)
        return nlu_loss(student, student.detach().clone(), labels, objective, weights)[:1]

    return loss


def held(model: nn.Module, ranks: int = 1) -> int:
    """Return the bytes of all parameters and buffers on one of `ranks`."""
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if ranks == 1:
        return whole
    blocks = blocks_of(model)
    frozen = sum(p.nbytes for block in blocks for p in block.parameters() if not p.requires_grad)
    return whole - frozen + frozen // ranks + GATHERED * frozen // len(blocks)
