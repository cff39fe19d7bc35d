"""Measure error, time and size of NF4: `python tests/bench_nf4.py`.

The layers are W = U diag(σ) Vᵀ (512 x 512) with random orthogonal U and V, and the linears of the built-in LLaMA.
QPiSSA's error was smaller than QLoRA's, in the nuclear norm, by

                            rank 16  rank 32  rank 64
    σ_i = 1                      1 %      3 %      6 %
    σ_i = i^-0.25                8 %     12 %     18 %
    σ_i = i^-0.5                28 %     36 %     44 %
    σ_i = i^-1                  80 %     86 %     90 %
    the built-in LLaMA          46 %     65 %     82 %    its layers are only 128 wide
"""

import time

import torch
from torch import Tensor

from minibalora.checkpoints.weights import load_model
from minibalora.lowrank import factors_of
from minibalora.nf4 import NF4
from minibalora.toy import MODEL

SIZE, RANKS, LARGE = 512, (16, 32, 64), 4096


def decaying(size: int, decay: float) -> Tensor:
    """Return W = U diag(i^-decay) Vᵀ, (size, size)."""
    U, V = (torch.linalg.qr(torch.randn(size, size))[0] for _ in range(2))
    return U * (torch.arange(size) + 1.0) ** -decay @ V.T


def errors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the errors W − nf4(W) of QLoRA and W − (nf4(W − A B) + A B) of QPiSSA, float64; A and B are PiSSA's."""
    A, B = factors_of("pissa")(weight, rank, 1.0)
    product = (A @ B).T
    residual = weight.float() - product
    qpissa = weight.double() - (NF4.quantize(residual).dequantize().double() + product.double())
    return weight.double() - NF4.quantize(weight).dequantize().double(), qpissa


def error_ratio(weights: list[Tensor], rank: int) -> float:
    """Return QPiSSA's error divided by QLoRA's; both are nuclear norms summed over the layers."""
    pairs = [[error.norm(p="nuc").item() for error in errors(weight, rank)] for weight in weights]
    return sum(qpissa for _, qpissa in pairs) / sum(qlora for qlora, _ in pairs)


def main() -> None:
    torch.manual_seed(0)
    print(f"Reduction of the error (nuclear norm) by QPiSSA against QLoRA, rank {RANKS}")
    layers = {f"{SIZE} x {SIZE}, decay {decay}": [decaying(SIZE, decay)] for decay in (0, 0.25, 0.5, 1)}
    layers["built-in LLaMA"] = [p for name, p in load_model(MODEL).named_parameters() if "proj" in name]
    for name, weights in layers.items():
        print(f"{name:22}", *(f"{1 - error_ratio([w.detach() for w in weights], rank):5.0%}" for rank in RANKS))

    weight = torch.randn(LARGE, LARGE)
    seconds = [time.perf_counter()]
    packed = NF4.quantize(weight)
    for _ in range(3):  # only the last one is timed: its memory has been touched before
        seconds.append(time.perf_counter())
        packed.dequantize(torch.bfloat16)
    print(f"{LARGE} x {LARGE}, {torch.get_num_threads()} threads: quantise {seconds[1] - seconds[0]:.2f} s,", end=" ")
    print(f"dequantise to bfloat16 {time.perf_counter() - seconds[-1]:.3f} s,", end=" ")
    print(f"{8 * sum(buffer.nbytes for buffer in packed.buffers()) / weight.numel():.4f} bits a number")


if __name__ == "__main__":
    main()
