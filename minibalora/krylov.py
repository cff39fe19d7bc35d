# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The leading singular directions of a matrix, faster than by the exact SVD: PiSSA's other inits. Needs only torch.

"pissa_krylov_N": the best within a block Krylov basis of N + 1 blocks (Musco and Musco, arXiv 1504.05477), which keeps
what N subspace iterations pass through and is a function of the weight alone. "pissa_niter_N", PEFT's name: N subspace
iterations, from torch's global seed (Halko et al., arXiv 0909.4061). `python tests/bench_pissa.py` compares them.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["krylov_svd", "subspace_svd", "svd_named"]

OVERSAMPLING = 16  # columns of a block beyond the rank: a third of the error on a flat spectrum
SVD = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]  # W (m, n), r -> U (m, r), S (r,), Vᵀ (r, n)


def svd_named(init: str) -> SVD:
    """The function that "pissa_krylov_N" or "pissa_niter_N" asks for; ValueError for another name."""
    match = re.fullmatch(r"pissa_(krylov|niter)_(\d{1,3})", init)
    if match is None:
        raise ValueError(f"unknown init {init!r}: give lora, pissa, pissa_krylov_N or pissa_niter_N")
    count = int(match[2])
    return partial(krylov_svd, depth=count) if match[1] == "krylov" else partial(subspace_svd, niter=count)


def subspace_svd(W: Tensor, rank: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,) and Vᵀ (r, n) of W (m, n), after `niter` subspace iterations."""
    U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
    return U, S, V.T


def krylov_svd(W: Tensor, rank: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,) and Vᵀ (r, n): the leading Ritz vectors and values of W (m, n) in its Krylov basis
    (Rayleigh-Ritz); the exact ones where that basis would be the whole space."""
    m, n = W.shape
    if m > n:
        U, S, Vh = krylov_svd(W.T, rank, depth)
        return Vh.T, S, U.T
    width = rank + OVERSAMPLING
    if (depth + 1) * width >= m:
        return wide_svd(W, rank)
    Q = krylov_basis(W, width, depth)
    U, S, Vh = wide_svd(Q.T @ W, rank)
    return Q @ U, S, Vh


def wide_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading r of the exact SVD of W (m, n), m <= n. QR comes first, so that only r vectors of the long side are
    made: 3 times faster than torch.linalg.svd of a matrix four times as long as high."""
    Q, R = torch.linalg.qr(W.T)
    U, S, Vh = torch.linalg.svd(R.T)
    return U[:, :rank], S[:rank], Vh[:rank] @ Q.T


def krylov_basis(W: Tensor, width: int, depth: int) -> Tensor:
    """An orthonormal basis, (m, (N+1)·width), of [W Ω, (W Wᵀ) W Ω, ..., (W Wᵀ)ᴺ W Ω], Ω (n, width) Gaussian, N = depth.

    Each half step is made orthonormal, so that nothing over- or underflows and weak directions are not lost in strong
    ones.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    omega = torch.randn(W.shape[1], width, generator=generator, dtype=torch.float32, device="cpu").to(W)
    blocks = [torch.linalg.qr(W @ omega)[0]]
    for _ in range(depth):
        blocks.append(torch.linalg.qr(W @ torch.linalg.qr(W.T @ blocks[-1])[0])[0])
    return torch.linalg.qr(torch.cat(blocks, dim=1))[0]
