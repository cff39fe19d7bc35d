"""How to store the frozen part of a PiSSA layer: `python tests/bench_storage.py` compares error, memory and speed.

Four ways of computing Y = X W_res + s (X A) B next to a teacher X W_res + s (X A₀) B₀, on one layer in bfloat16 whose
spectrum decays as a trained one's does. The truth is the same formula in float64. Errors are given as multiples of the
error that the pre-trained layer itself has in bfloat16, except for the first small step, whose own size is the unit.
"""

import statistics
import time

import torch
import torch.nn.functional as F

from minibalora.lowrank import pissa_factors

SIZE, RANK, BATCH = 2048, 128, 512


def residual_bf16(x, W, R, A, B, A0, B0):
    return x @ R.to(x.dtype) + (x @ A.to(x.dtype)) @ B.to(x.dtype)


def residual_f32(x, W, R, A, B, A0, B0):
    return (x.float() @ R + (x.float() @ A) @ B).to(x.dtype)


def subtracted(x, W, R, A, B, A0, B0):
    A, B, A0, B0 = (factor.to(x.dtype) for factor in (A, B, A0, B0))
    return x @ W + ((x @ A) @ B - (x @ A0) @ B0)


def differences_first(x, W, R, A, B, A0, B0):
    left, right = torch.cat([A - A0, A0], dim=1), torch.cat([B, B - B0], dim=0)
    return x @ W + (x @ left.to(x.dtype)) @ right.to(x.dtype)


def main() -> None:
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(SIZE, SIZE))[0] for _ in range(2))
    W = (U * (torch.arange(SIZE) + 1.0) ** -0.5 @ V.T).bfloat16()
    A0, B0 = pissa_factors(W.T, RANK, 1.0, "pissa")
    R = W.float() - A0 @ B0
    A = A0 * (1 + 1e-3 * torch.randn_like(A0))  # a first small step
    x = torch.randn(BATCH, SIZE).bfloat16()
    truth, moved = x.double() @ W.double(), x.double() @ (R.double() + A.double() @ B0.double())
    error = lambda y, target, unit: ((y.double() - target).norm() / unit).item()  # noqa: E731
    unit = (F.linear(x, W.T).double() - truth).norm()
    print(f"pre-trained layer in bfloat16: relative error {unit / truth.norm():.1e}")

    frozen = {"residual_bf16": R.bfloat16(), "residual_f32": R, "subtracted": W, "differences_first": W}
    print(f"{'':18}  at step 0  small step  frozen bytes/weight  ms forward + backward (median, min)")
    for form in (residual_bf16, residual_f32, subtracted, differences_first):
        R_stored = frozen[form.__name__] if form.__name__.startswith("residual") else None
        start = form(x, W, R_stored, A0, B0, A0, B0)
        step = form(x, W, R_stored, A, B0, A0, B0)
        seconds = [timed(form, x, W, R_stored, A, B0, A0, B0) for _ in range(15)]
        figures = f"{error(start, truth, unit):9.2f}  "
        figures += f"{error(step.double() - start.double(), moved - truth, (moved - truth).norm()):10.2f}"
        bytes_per_weight = frozen[form.__name__].element_size()
        median, least = (1000 * f(seconds) for f in (statistics.median, min))
        print(f"{form.__name__:18}  {figures}  {bytes_per_weight:19}  {median:6.0f} {least:5.0f}")


def timed(form, x, W, R, A, B, A0, B0) -> float:
    """Seconds of one training pass: forward, and backward to x, A and B."""
    x, A, B = (tensor.detach().requires_grad_() for tensor in (x, A, B))
    started = time.perf_counter()
    form(x, W, R, A, B, A0, B0).sum().backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
