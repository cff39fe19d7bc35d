# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Two approximate SVDs for PiSSA that are faster than the exact one. This file needs only torch.

"pissa_krylov_N": the best singular vectors in a block Krylov basis of N + 1 blocks (Musco and Musco, arXiv 1504.05477).
The basis keeps every block that N subspace iterations would overwrite. The result depends on the weight only.
"pissa_niter_N", PEFT's name: N subspace iterations from torch's global seed (Halko et al., arXiv 0909.4061).
`python tests/bench_pissa.py` compares both with the exact SVD.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["krylov_svd", "subspace_svd", "svd_named"]

OVERSAMPLING = 16  # columns of a block beyond the rank: they cut the error on a flat spectrum to a third
SVD = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]  # W (m, n), r -> U (m, r), S (r,), Vᵀ (r, n)


def svd_named(init: str) -> SVD:
    """Return the function for "pissa_krylov_N" or "pissa_niter_N". Raises ValueError for another name."""
    match = re.fullmatch(r"pissa_(krylov|niter)_(\d{1,3})", init)
    if match is None:
        raise ValueError(f"unknown init {init!r}: give lora, olora, pissa, pissa_krylov_N or pissa_niter_N")
    count = int(match[2])
    return partial(krylov_svd, depth=count) if match[1] == "krylov" else partial(subspace_svd, niter=count)


def subspace_svd(W: Tensor, rank: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), S (r,) and Vᵀ (r, n) of W (m, n) after `niter` subspace iterations. Raises ValueError for NaN
    or ±∞ in W."""
    _check_finite(W)
    U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
    return U, S, V.T


def krylov_svd(W: Tensor, rank: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), S (r,) and Vᵀ (r, n): the leading Ritz vectors and values of W (m, n) in its Krylov basis
    (Rayleigh-Ritz). They are exact where the basis would span the whole space. Raises ValueError for NaN or ±∞ in W."""
    m, n = W.shape
    if m > n:
        U, S, Vh = krylov_svd(W.T, rank, depth)
        return Vh.T, S, U.T
    _check_finite(W)
    width = rank + OVERSAMPLING
    if (depth + 1) * width >= m:
        return wide_svd(W, rank)
    Q = krylov_basis(W, width, depth)
    U, S, Vh = wide_svd(Q.T @ W, rank)
    return Q @ U, S, Vh


def _check_finite(W: Tensor) -> None:
    if not W.isfinite().all():  # QR would spread it over all factors without a word
        raise ValueError(f"the weight {list(W.shape)} has numbers that are not finite: load another checkpoint")


def wide_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading r of the SVD of W (m, n), m <= n, from the eigenvectors of W Wᵀ (m, m): W Wᵀ = U S² Uᵀ, and
    Vᵀ = S⁻¹ Uᵀ W. In float64, since squares have half the digits; where there is no float64, on the CPU.

    On a CPU this takes up to 11 % less time than a QR and an SVD do, see `tests/bench_pissa.py`.
    """
    wide = W.to("cpu" if W.device.type in ("mps", "xpu") else W.device).double()
    squares, U = torch.linalg.eigh(wide @ wide.T)
    S, U = squares[-rank:].flip(0).clamp_min(0).sqrt(), U[:, -rank:].flip(1)  # descending
    Vh = U.T @ wide / torch.where(S > 0, S, 1.0)[:, None]
    return U.to(W), S.to(W), Vh.to(W)


def krylov_basis(W: Tensor, width: int, depth: int) -> Tensor:
    """Return an orthonormal basis (m, (N+1)·width) of [W Ω, (W Wᵀ) W Ω, ..., (W Wᵀ)ᴺ W Ω], Ω (n, width) Gaussian,
    N = depth. Every half step is orthonormalised, so that nothing overflows and weak directions survive.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    omega = torch.randn(W.shape[1], width, generator=generator, dtype=torch.float32, device="cpu").to(W)
    blocks = [torch.linalg.qr(W @ omega)[0]]
    for _ in range(depth):
        blocks.append(torch.linalg.qr(W @ torch.linalg.qr(W.T @ blocks[-1])[0])[0])
    return torch.linalg.qr(torch.cat(blocks, dim=1))[0]
