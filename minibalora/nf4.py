# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""A frozen weight in four bits: NormalFloat with double quantisation.

This file needs only torch.

NF4: QLoRA, Dettmers et al., arXiv 2305.14314, section 3.
"""

from functools import partial
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NF4", "normal_levels", "quantize"]

BLOCK = 64  # weights that share one scale, in the order of memory: along a row, then on into the next
SCALE_BLOCK = 256  # scales that share one step of their own
TABLES: dict[torch.device, Tensor] = {}  # of `_levels_of_a_byte`
CHUNK = 2**14  # blocks worked on at a time: what must be unpacked takes some MB, whatever the size of the weight


def normal_levels() -> Tensor:
    """The 16 values of NF4, ascending from -1 to 1, in float64.

    Quantiles Φ⁻¹(p) of the normal distribution, over the largest: p in 8 equal steps from 1 − δ to ½ and in 9 from ½
    to δ. Both halves hold ½, so that 0 is a level; it is kept once. δ = 1 − (1/32 + 1/30)/2 as in bitsandbytes, whose
    values are those printed in the paper's appendix E. (Equation 4 gives a slightly different set.)
    """
    delta = 1 - (1 / 32 + 1 / 30) / 2
    linspace = partial(torch.linspace, dtype=torch.float64, device="cpu")
    p = torch.cat([linspace(1 - delta, 0.5, 8), linspace(0.5, delta, 9)[1:]])
    quantiles = torch.erfinv(2 * p - 1)  # times √2, which the division removes
    return quantiles / quantiles[-1]


class NF4(nn.Module):
    """A frozen weight of any shape at 4.127 bits a number: weight ≈ level[code] · scale, a scale for 64 numbers.

    codes: uint8 (blocks, 32), the earlier of two numbers in the upper half of a byte; the last block is filled with 0.
    scale = scale_least + scale_step · scale_code: scale_code uint8 (blocks,), scale_step float32 (blocks / 256,) and
    scale_least float32 (), the smallest scale of all. The paper takes off the mean, for a signed code; with the
    smallest no scale can turn negative. A scale is a block's largest absolute value, and codes are chosen for the
    scale as stored, so that rounding it costs next to nothing. With e the error of a scale, at most scale_step / 2, a
    number of that block changes by at most max(0.152 · scale, e), 0.152 being half the widest gap. Zeros stay zeros.

    What is held, and what a teacher is then. LoRA on a quantised model (QLoRA) holds nf4(W). PiSSA holds the residual
    in four bits and the factors in full, W ≈ nf4(W − s A₀ B₀) + s A₀ B₀ (QPiSSA, arXiv 2404.02948), and loses less:
    the error is in proportion to what is quantised, and the factors take the largest part of W away from it. Training
    starts from this quantised model. A teacher is the model before training: the same quantised one, for QPiSSA with
    A₀ and B₀, for QLoRA nf4(W) alone. It is not the pre-trained model in full precision, which is kept nowhere.

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
        """The nearest codes of `weight`, on its device. Raises ValueError if a number in it is not finite."""
        blocks = _padded_rows(weight.detach().flatten(), BLOCK)
        scales = torch.linalg.vector_norm(blocks, ord=inf, dim=1).float()  # unlike abs(), it copies nothing
        if not scales.isfinite().all():
            raise ValueError("a weight to be quantised has numbers that are not finite")
        codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=weight.device)
        packed = cls(weight.shape, codes, *_quantized_scales(scales))
        levels = normal_levels().float().to(weight.device)
        borders = (levels[1:] + levels[:-1]) / 2
        parts = zip(blocks.split(CHUNK), codes.split(CHUNK), packed.scales().split(CHUNK), strict=True)
        for numbers, target, scale in parts:
            # where the stored scale is 0, inf and NaN get some code, which times 0 is 0
            index = torch.bucketize(numbers.float() / scale[:, None], borders, out_int32=True)
            target.copy_(16 * index[:, ::2] + index[:, 1::2])
        return packed

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight, in its own shape. Computed in float32 and rounded once."""
        weight = torch.empty(len(self.codes), BLOCK, dtype=dtype, device=self.codes.device)
        table = _levels_of_a_byte(self.codes.device)
        parts = zip(weight.split(CHUNK), self.codes.split(CHUNK), self.scales().split(CHUNK), strict=True)
        for target, codes, scale in parts:
            levels = table.index_select(0, codes.flatten().int()).view(torch.float32).view(-1, BLOCK)
            target.copy_(levels.mul_(scale[:, None]))
        return weight.flatten()[: prod(self.shape)].view(self.shape)

    def scales(self) -> Tensor:
        """(blocks,), float32: what the levels of each block are multiplied by."""
        steps = self.scale_steps.float().repeat_interleave(SCALE_BLOCK)[: len(self.scale_codes)]
        return self.scale_least.float() + steps * self.scale_codes

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.shape))


def _quantized_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks,) -> scale_codes, scale_steps, scale_least, as NF4 keeps them."""
    least = scales.min()
    rows = _padded_rows(scales - least, SCALE_BLOCK)
    steps = rows.amax(dim=1) / 255
    # where a step is 0, as all scales of the row are the least, NaN gets some code, which times 0 is 0
    codes = (rows / steps[:, None]).round().to(torch.uint8)
    return codes.flatten()[: len(scales)].clone(), steps, least


def _padded_rows(flat: Tensor, width: int) -> Tensor:
    """(size,) -> (rows, width), zeros at the end."""
    missing = -len(flat) % width
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, width)


def _levels_of_a_byte(device: torch.device) -> Tensor:
    """(256,): the levels of a byte's two halves, two float32 in one int64, as one number is looked up faster."""
    if device in TABLES:
        return TABLES[device]
    levels = normal_levels().float()
    table = torch.cartesian_prod(levels, levels).view(torch.int64).flatten().to(device)
    return TABLES.setdefault(device, table) if type(table) is Tensor else table  # a trace's stand-in is not kept


@torch.no_grad()
def quantize(layer: nn.Module) -> None:
    """Let a LowRankLinear keep W_res in four bits in place of W, in place.

    Of a PiSSA layer that is the residual, whose largest directions are in A₀ and B₀, so less is lost of it than of W
    (QPiSSA, arXiv 2404.02948); of a LoRA layer it is W itself (QLoRA, arXiv 2305.14314).
    """
    residual = layer.residual.T
    del layer.W  # the name of a parameter takes no module
    layer.W = NF4.quantize(residual)
