"""Count what a training step asks of a GPU, on empty tensors, and how fast it could be: `bench --dry`.

An operation takes at least the time of its bytes at the GPU's bandwidth, and that of its products at its peak; a step
takes the sum. Not counted: the time to launch a kernel, what caches save, and the operations of a QR or an SVD.
Attention is a call a row, as on a torch without `varlen_attn`; a fused optimizer and a norm of all gradients are a
kernel each.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minibalora.lean_product import factors_kept
from minibalora.models.llama import LlamaConfig
from minibalora.run.empty_tensors import backward, without_numbers
from minibalora.run.memory import Loss, by_straight_line, empty_run, generation_loss
from minibalora.run.settings import Hardware
from minibalora.run.workload import Contender, empty_model, full_batch

aten = torch.ops.aten
SLOW = 1 / 15  # rate of products in float32 and float64 over that in half precision: 67 / 989 TFLOP/s on an H200
HALF = (torch.bfloat16, torch.float16)
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
NO_KERNEL |= {aten._unsafe_view, aten._reshape_alias, aten._local_scalar_dense}
READS_PART = {aten.embedding, aten.index_select, aten.gather, aten.index}  # of their first argument: what they return


class Work(TorchDispatchMode):
    """Counts the kernels of the operations inside, the bytes that they read and write, the floating-point operations of
    their products, and the seconds that they take at least on a GPU with these peaks."""

    def __init__(self, flops_per_s: float, bytes_per_s: float):
        super().__init__()
        self.flops_per_s, self.bytes_per_s = flops_per_s, bytes_per_s
        self.kernels = self.bytes = self.flops = self.seconds = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        packet = function._overloadpacket
        if packet not in NO_KERNEL and function.namespace != "prim" and not is_view(function):
            made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
            read = made if packet in READS_PART else [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            moved = sum(x.numel() * x.itemsize for x in [*read, *made])
            flops = flops_of(packet, args, kwargs, outputs)
            rate = self.flops_per_s * (1 if not made or made[0].dtype in HALF else SLOW)
            self.kernels, self.bytes, self.flops = self.kernels + 1, self.bytes + moved, self.flops + flops
            self.seconds += max(moved / self.bytes_per_s, flops / rate)
        return outputs

    @property
    def totals(self) -> np.ndarray:
        return np.array([self.kernels, self.bytes, self.flops, self.seconds])


def is_view(function: Callable) -> bool:
    """Return whether an operation gives other views of its arguments' memory, which needs no kernel."""
    aliases = [result.alias_info for result in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def flops_of(packet: object, args: tuple, kwargs: dict, outputs: object) -> int:
    """Return the floating-point operations of a product or of attention, as torch counts them; 0 for all others."""
    if packet is aten.addmm_:
        return 2 * args[1].shape[0] * math.prod(args[2].shape)
    return flop_registry[packet](*args, **kwargs, out_val=outputs) if packet in flop_registry else 0


def work_of(
    config: LlamaConfig, hardware: Hardware, rank: int, rows: int, contender: Contender, peaks: tuple[float, float]
) -> np.ndarray:
    """Return the kernels, bytes, floating-point operations and least seconds of a contender's step, (4,).

    The step has one micro-batch of full rows, see `workload.full_batch`. peaks: FLOP/s in half precision and bytes/s.
    """
    model = empty_model(config, hardware.dtype, rank, contender)
    loss_of = partial(generation_loss, full_batch(config, rows), contender.objective, 1, contender.form == "plain")
    return by_straight_line(model, partial(totals_of, model, hardware, loss_of, peaks))


def totals_of(
    model: nn.Module,
    hardware: Hardware,
    loss_of: Callable[[nn.Module], Loss],
    peaks: tuple[float, float],
    counts: list[int],
) -> np.ndarray:
    """Return `Work.totals` of a step of the model with so many blocks in its stacks: linear in these numbers."""
    with without_numbers(hardware.device):
        twin, optimizer, loss = empty_run(model, hardware, loss_of, counts)
        trained = optimizer.param_groups[0]["params"]
        with torch.no_grad():
            loss()  # computes what later steps keep: the head's Gram matrix, tables
        with Work(*peaks) as work, factors_kept(twin):
            backward(loss()[0])
            nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            optimizer.step()
    return work.totals


def table(contenders: list[Contender], totals: list[np.ndarray]) -> str:
    """Return a line for each contender."""
    lora = next((row[3] for each, row in zip(contenders, totals, strict=True) if each == Contender("lora")), None)
    lines = [f"{'':25}{'form':7}{'kernels':>9}{'GB moved':>10}{'TFLOP':>8}{'ms at least':>13}{'x lora':>8}"]
    for each, (kernels, moved, flops, seconds) in zip(contenders, totals, strict=True):
        ratio = "-" if lora is None else f"{seconds / lora:.2f}"
        numbers = f"{kernels:9,.0f}{moved / 1e9:10.0f}{flops / 1e12:8.1f}{1e3 * seconds:13.1f}{ratio:>8}"
        lines.append(f"{each!s:25}{each.form:7}{numbers}")
    return "\n".join(lines)
