"""Compare ways to compute PiSSA's factors: `python tests/bench_pissa.py` prints time and error on one thread.

One weight has a spectrum that decays like a trained layer's (σ_i = i^-½); two are random and have a flat spectrum.
Times are CPU seconds, which change little on a busy machine. The error is ‖A B − A₀ B₀‖ / ‖A₀ B₀‖ (Frobenius), where
A₀ B₀ comes from an eigendecomposition in float64; the program also prints the largest relative error of a singular
value. Seconds and error on one core of an AMD EPYC:

                       decaying, 2048 x 2048    flat, 2048 x 2048    flat, 1024 x 4096
    pissa                   2.21  2.3e-6            2.32  9.7e-6         1.71  1.2e-5
    Gram matrix             2.24  1.5e-6            2.26  1.4e-6         0.50  1.2e-6
    pissa_niter_16          0.57  8.8e-2            0.57  4.1e-1         0.62  4.1e-1
    pissa_krylov_2          0.21  8.5e-2            0.20  6.7e-1         0.24  6.3e-1
    pissa_krylov_4          0.46  1.0e-3            0.43  2.9e-1         0.48  1.9e-1
    pissa_krylov_8          1.18  2.8e-6            1.17  9.2e-4         0.47  7.6e-8
    pissa_krylov_12         2.66  6.9e-7            2.76  2.3e-5         0.46  7.6e-8

A flat 4096 x 4096 took 27 s (pissa), 3.2 s (niter_16) and 4.4 s (krylov_8, error 4.9e-2). The flatter the spectrum, the
less it matters which directions are used. If the Krylov basis would span the whole space, as in the last two numbers,
the code takes the eigenvectors of the Gram matrix in float64. That is as accurate as the plain SVD, but faster only for
elongated weights, so "pissa" stays the plain SVD. In pissa_krylov_N, it takes up to 11 % less time than an SVD.
"""

import time

import torch
from torch import Tensor

from minibalora.lowrank import factors_of

SIZE, RANK = 2048, 128
INITS = ("pissa", "pissa_niter_16", "pissa_krylov_2", "pissa_krylov_4", "pissa_krylov_8", "pissa_krylov_12")


def gram_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the exact PiSSA factors for alpha = rank, from W Wᵀ (m, m) in float64. It divides by no small σ."""
    W = weight.T
    left = torch.linalg.eigh(W.double() @ W.T.double())[1][:, -rank:].float()
    U, S, Vh = torch.linalg.svd(left.T @ W, full_matrices=False)
    return left @ (U * S.sqrt()), S.sqrt()[:, None] * Vh


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(SIZE, SIZE))[0] for _ in range(2))
    compare("decaying", U * (torch.arange(SIZE) + 1.0) ** -0.5 @ V.T)
    compare("flat", torch.randn(SIZE, SIZE) / SIZE**0.5)
    compare("flat", torch.randn(2 * SIZE, SIZE // 2) / SIZE**0.5)


def compare(spectrum: str, weight: Tensor) -> None:
    values, V = torch.linalg.eigh(weight.T.double() @ weight.double())
    V, S = V[:, -RANK:], values[-RANK:].flip(0).sqrt()
    best = V @ (V.T @ weight.T.double())
    n, m = weight.shape
    print(f"{f'{spectrum}, {m} x {n}, rank {RANK}':32}  seconds  error of A B  error of singular values")
    for name in ("Gram matrix", *INITS):
        started = time.process_time()
        A, B = factors_of(name)(weight, RANK, 1.0) if name in INITS else gram_factors(weight, RANK)
        seconds = time.process_time() - started
        error = (A.double() @ B.double() - best).norm() / best.norm()
        value_error = (A.double().square().sum(dim=0).sort(descending=True).values / S - 1).abs().max()
        print(f"{name:32}  {seconds:7.2f}  {error:12.1e}  {value_error:24.1e}", flush=True)


if __name__ == "__main__":
    main()
