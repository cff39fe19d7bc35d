# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""A frozen weight in four bits: NormalFloat with double quantisation.

This file needs only torch.

NF4: QLoRA, Dettmers et al., arXiv 2305.14314, section 3.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NF4", "normal_levels", "quantize"]

BLOCK = 64  # neighbouring weights in memory that share one scale
SCALE_BLOCK = 256  # neighbouring scales that share one step
TABLES: dict[torch.device, Tensor] = {}  # the tables of `_levels_of_a_byte`
CHUNK = 2**14  # blocks that are unpacked at a time, so that temporary tensors take a few MB for a weight of any size
GPU_CHUNK = 2**19  # on a GPU, where each chunk costs 4 kernels: the temporary tensors take 0.2 GB


def normal_levels() -> Tensor:
    """Return the 16 values of NF4, ascending from -1 to 1, in float64.

    They are quantiles Φ⁻¹(p) of the normal distribution, divided by the largest: 8 equally spaced p from 1 − δ to ½,
    and 9 from ½ to δ. Both halves contain ½, so that 0 is a level; it is kept once. δ = 1 − (1/32 + 1/30)/2 as in
    bitsandbytes, whose values the paper's appendix E prints. (Equation 4 gives a slightly different set.)
    """
    delta = 1 - (1 / 32 + 1 / 30) / 2
    linspace = partial(torch.linspace, dtype=torch.float64, device="cpu")
    p = torch.cat([linspace(1 - delta, 0.5, 8), linspace(0.5, delta, 9)[1:]])
    quantiles = torch.erfinv(2 * p - 1)  # times √2, which the division removes
    return quantiles / quantiles[-1]


class NF4(nn.Module):
    """A frozen weight of any shape at 4.127 bits a number: weight ≈ level[code] · scale, a scale for 64 numbers.

    codes: uint8 (blocks, 32), the first of two numbers in the upper half of a byte; the last block is padded with 0.
    scale = scale_least + scale_step · scale_code: scale_code uint8 (blocks,), scale_step float32 (blocks / 256,) and
    scale_least float32 (), the smallest scale of all. The paper subtracts the mean and uses a signed code; subtracting
    the smallest keeps every scale positive. A scale is the largest absolute value of its block. Codes are chosen for
    the scale as stored, so rounding the scale costs almost nothing: if the scale is off by e ≤ scale_step / 2, a number
    of the block changes by at most max(0.152 · scale, e), where 0.152 is half the widest gap. Zeros stay zeros.

    LoRA on a quantised model (QLoRA) stores nf4(W). PiSSA stores the residual in four bits and the factors in full,
    W ≈ nf4(W − s A₀ B₀) + s A₀ B₀ (QPiSSA, arXiv 2404.02948). It loses less, because the error is proportional to the
    quantised matrix, and the factors hold the largest part of W. Training starts from this quantised model. The teacher
    is the model before training, so it is the quantised one too: nf4(W) for QLoRA, with A₀ and B₀ for QPiSSA. The
    pre-trained model in full precision is not kept.

    `python tests/bench_nf4.py` measures how much smaller QPiSSA's error is than QLoRA's.
    """

    def __init__(self, shape: torch.Size, codes: Tensor, scale_codes: Tensor, scale_steps: Tensor, scale_least: Tensor):
        super().__init__()
        self.shape = shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale_codes", scale_codes)
        self.register_buffer("scale_steps", scale_steps)
        self.register_buffer("scale_least", scale_least)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor) -> "NF4":
        """Return `weight` in its nearest codes, on its device. Raises ValueError if a number in it is not finite."""
        blocks = _padded_rows(weight.detach().flatten(), BLOCK)
        scales = torch.linalg.vector_norm(blocks, ord=inf, dim=1).float()  # unlike abs(), no copy
        if not scales.isfinite().all():
            raise ValueError("a weight to be quantised has numbers that are not finite: mend the checkpoint")
        codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
        packed = cls(weight.shape, codes, *_quantized_scales(scales))
        levels = normal_levels().float().to(weight.device)
        borders = (levels[1:] + levels[:-1]) / 2
        parts = _chunks(blocks, codes, packed.scales())
        for numbers, target, scale in parts:
            # a stored scale of 0 gives inf or NaN here; any code is right, because it is multiplied by 0
            index = torch.bucketize(numbers.float() / scale[:, None], borders, out_int32=True)
            target.copy_(16 * index[:, ::2] + index[:, 1::2])
        return packed

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense weight in its original shape, computed in float32 and rounded once."""
        weight = torch.empty(len(self.codes), BLOCK, dtype=dtype, device=self.codes.device)
        table = _levels_of_a_byte(self.codes.device)
        parts = _chunks(weight, self.codes, self.scales())
        for target, codes, scale in parts:
            levels = table.index_select(0, codes.flatten().int()).view(torch.float32).view(-1, BLOCK)
            target.copy_(levels.mul_(scale[:, None]))
        return weight.flatten()[: prod(self.shape)].view(self.shape)

    def scales(self) -> Tensor:
        """Return the scale of each block, (blocks,) in float32."""
        steps = self.scale_steps.float().repeat_interleave(SCALE_BLOCK)[: len(self.scale_codes)]
        return self.scale_least.float() + steps * self.scale_codes

    def _apply(self, fn: Callable, recurse: bool = True):
        """Apply fn, such as .half()'s, but leave the scales in float32: rounded, they would scale all their blocks."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if new.is_floating_point() and new.dtype.itemsize < 4 else new

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.shape))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the parts of tensors (blocks, ...) that are packed or unpacked at a time."""
    count = GPU_CHUNK if tensors[0].is_cuda else CHUNK
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def _quantized_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale_codes, scale_steps and scale_least of `scales` (blocks,); see NF4."""
    least = scales.min()
    rows = _padded_rows(scales - least, SCALE_BLOCK)
    steps = rows.amax(dim=1) / 255
    # if all scales of a row are equal, the step is 0 and this gives NaN; any code is right, as it is multiplied by 0
    codes = (rows / steps[:, None]).round().to(torch.uint8)
    return codes.flatten()[: len(scales)].clone(), steps, least


def _padded_rows(flat: Tensor, width: int) -> Tensor:
    """Reshape (size,) to (rows, width), padded with zeros."""
    missing = -len(flat) % width
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, width)


def _levels_of_a_byte(device: torch.device) -> Tensor:
    """Return (256,) int64: the levels of both halves of a byte as two float32 in one number, so one lookup does."""
    if device in TABLES:
        return TABLES[device]
    levels = normal_levels().float()
    table = torch.cartesian_prod(levels, levels).view(torch.int64).flatten().to(device)
    return TABLES.setdefault(device, table) if type(table) is Tensor else table  # never keep a tracer's stand-in


@torch.no_grad()
def quantize(layer: nn.Module) -> None:
    """Make a LowRankLinear store W_res in four bits instead of W, in place.

    In a PiSSA layer, A₀ and B₀ hold the largest directions of W, so quantising W_res loses less than quantising W
    (QPiSSA, arXiv 2404.02948). In a LoRA layer W_res is W (QLoRA, arXiv 2305.14314). Raises ValueError for DoRA.
    """
    if hasattr(layer, "magnitude"):
        raise ValueError("DoRA starts from the norms of the weight in use: quantise first, then put DoRA in")
    residual = layer.residual.T
    del layer.W  # the name of a parameter takes no module
    layer.W = NF4.quantize(residual)
