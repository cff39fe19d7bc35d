"""Compare ways to store the frozen part of a PiSSA layer: `python tests/bench_storage.py` prints error, memory, speed.

Four forms of Y = X W_res + s (X A) B are compared on a layer whose spectrum decays like a trained one's; the program
also runs the package's layers, `LowRankLinear` and its lean product. The truth is the formula in float64. The first
number of each dtype is the error at step 0, where student and teacher are equal, divided by the error of the
pre-trained layer itself in this dtype. The second is the error of the first small step (A changes by 1e-3 of itself),
divided by the size of the step.

On 2 CPU cores, m = n = 2048, r = 128, 512 rows; then bytes of a frozen weight, and time of forward and backward:

                                                 bfloat16                       float32
    residual_as_w      W_res in W's dtype        2.13   4.1    2 B   14 ms      1.54   5e-4   4 B   55 ms
    residual_float32   W_res in float32          1.00   1.9    4 B   54 ms      1.54   5e-4   4 B   54 ms
    subtracted         X W − s (X A₀) B₀ + ...   1.00   3.8    2 B   14 ms      1.00   5e-4   4 B   61 ms
    differences_first  as in lowrank.py          1.00   0.84   2 B   15 ms      1.00   3e-5   4 B   64 ms

The 0.84 is caused by the rounding of Y itself.
"""

import statistics
import time

import torch
from torch import nn

from minibalora.lean_product import use_lean_product
from minibalora.lowrank import LowRankLinear, factors_of

SIZE, RANK, BATCH = 2048, 128, 512


def residual_as_w(x, W, R, A, B, A0, B0):
    return x @ R.to(x.dtype) + (x @ A.to(x.dtype)) @ B.to(x.dtype)


def residual_float32(x, W, R, A, B, A0, B0):
    return (x.float() @ R + (x.float() @ A) @ B).to(x.dtype)


def subtracted(x, W, R, A, B, A0, B0):
    A, B, A0, B0 = (factor.to(x.dtype) for factor in (A, B, A0, B0))
    return x @ W + ((x @ A) @ B - (x @ A0) @ B0)


def differences_first(x, W, R, A, B, A0, B0):
    left, right = torch.cat([A - A0, A0], dim=1), torch.cat([B, B - B0], dim=0)
    return x @ W + (x @ left.to(x.dtype)) @ right.to(x.dtype)


def plain(x, W, R, A, B, A0, B0, is_lean=False):
    linear = nn.Linear(*W.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(W.T)
    layer = LowRankLinear(linear, A0, B0, 1.0, keep_initial=True)
    layer._parameters |= {"A": A, "B": B}  # not as new parameters, so that gradients reach the caller's A and B
    if is_lean:
        use_lean_product(layer)
    return layer(x)


def lean(*factors):
    return plain(*factors, is_lean=True)


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        compare(dtype)


def compare(dtype: torch.dtype) -> None:
    U, V = (torch.linalg.qr(torch.randn(SIZE, SIZE))[0] for _ in range(2))
    W = (U * (torch.arange(SIZE) + 1.0) ** -0.5 @ V.T).to(dtype)
    A0, B0 = factors_of("pissa")(W.T, RANK, 1.0)
    R = W.float() - A0 @ B0
    A = A0 * (1 + 1e-3 * torch.randn_like(A0))
    x = torch.randn(BATCH, SIZE).to(dtype)
    truth, truth_after = x.double() @ W.double(), x.double() @ (W.double() + (A - A0).double() @ B0.double())
    unit, step = ((x @ W).double() - truth).norm(), (truth_after - truth).norm()

    print(f"{dtype}: the pre-trained layer's own error is {unit / truth.norm():.1e}")
    print(f"{'':18}  at step 0  small step  bytes of a frozen weight  ms forward + backward")
    for form in (residual_as_w, residual_float32, subtracted, differences_first, plain, lean):
        frozen = {residual_as_w: R.to(dtype), residual_float32: R}.get(form, W)
        R_stored = frozen if form in (residual_as_w, residual_float32) else None
        before, after = form(x, W, R_stored, A0, B0, A0, B0), form(x, W, R_stored, A, B0, A0, B0)
        error = (before.double() - truth).norm() / unit
        step_error = (after.double() - before.double() - (truth_after - truth)).norm() / step
        ms = 1000 * statistics.median(timed(form, x, W, R_stored, A, B0, A0, B0) for _ in range(15))
        print(f"{form.__name__:18}  {error:9.2f}  {step_error:10.1e}  {frozen.element_size():24}  {ms:21.0f}")


def timed(form, x, W, R, A, B, A0, B0) -> float:
    """Return the seconds of one forward pass and one backward pass to x, A and B."""
    x, A, B = (tensor.detach().requires_grad_() for tensor in (x, A, B))
    started = time.perf_counter()
    form(x, W, R, A, B, A0, B0).sum().backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
