"""Tests of PiSSA's faster SVDs: how close their factors are to the exact SVD's."""

import pytest
import torch
from helpers import distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minibalora.lowrank import LowRankLinear, factors_of


def test_niter_gives_nearly_the_exact_factors():
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(60, 40))[0], torch.linalg.qr(torch.randn(50, 40))[0]
    linear = nn.Linear(60, 50, bias=False)
    linear.weight.data = (U * 0.7 ** torch.arange(40.0) @ V.T).T.contiguous()
    exact, fast = (LowRankLinear.from_linear(linear, 6, init=init) for init in ("pissa", "pissa_niter_16"))
    assert distance(fast.A @ fast.B, exact.A @ exact.B) < 1e-5


def with_spectrum(m: int, n: int, S: torch.Tensor) -> torch.Tensor:
    """Return a weight (n, m), float64, with the singular values S (at most min(m, n) of them) and zeros."""
    U, V = (torch.linalg.qr(torch.randn(size, len(S), dtype=torch.float64))[0] for size in (m, n))
    return (U * S @ V.T).T


SPECTRA = {
    "decaying": lambda size: (torch.arange(size) + 1.0) ** -0.5,
    "flat": torch.ones,
    "tied": lambda size: (torch.arange(size) // 3 + 1.0) ** -1,
    "of low rank": lambda size: torch.cat([torch.ones(size // 3), torch.zeros(size - size // 3)]),
    "of condition 1e8": lambda size: torch.logspace(0, -8, size),
    "zero": torch.zeros,
}


@settings(deadline=None, max_examples=150)
@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    share=st.floats(0, 1, allow_subnormal=False),
    scale=st.sampled_from([1e-25, 1e-3, 1.0, 1e18]),
    spectrum=st.sampled_from(list(SPECTRA)),
    init=st.sampled_from(["pissa", "pissa_krylov_0", "pissa_krylov_1", "pissa_krylov_8"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_error_of_pissa_is_within_its_bound_of_the_smallest_possible(m, n, share, scale, spectrum, init, dtype):
    """The error of the best A B is the norm of the omitted singular values (Eckart and Young).

    "pissa", and a Krylov basis of the whole space, reach it up to float32 rounding. For one block with oversampling 16,
    the expected error is at most √(1 + r / 15) times that (Halko et al., arXiv 0909.4061, theorem 10.5). More blocks
    span more. The test allows 3 times the expected error.
    """
    torch.manual_seed(0)
    weight = (scale * with_spectrum(m, n, SPECTRA[spectrum](min(m, n)).double())).to(dtype)
    rank = 1 + int(share * (min(m, n) - 1))
    A, B = factors_of(init)(weight, rank, 1.0)
    assert A.shape == (m, rank) and B.shape == (rank, n) and A.dtype == B.dtype == torch.float32
    W = weight.T.double()
    smallest_error = torch.linalg.svdvals(W)[rank:].norm()
    depth = int(init[-1]) if init != "pissa" else 1000
    is_exact = (depth + 1) * (rank + 16) >= min(m, n)
    factor = 1 if is_exact else 3 * (1 + rank / 15) ** 0.5
    assert (W - A.double() @ B.double()).norm() <= factor * smallest_error + 1e-5 * W.norm()
    # both factors are orthogonal and have √S: AᵀA = B Bᵀ = diag(S)
    grams = A.double().T @ A.double(), B.double() @ B.double().T
    assert all((gram - gram.diag().diag()).norm() <= 1e-5 * W.norm() for gram in grams)
    assert (grams[0] - grams[1]).norm() <= 1e-5 * W.norm()


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (200, 200)])
def test_krylov_factors_are_exact_if_singular_values_are_apart(shape):
    torch.manual_seed(0)
    weight = with_spectrum(*shape, 0.9 ** torch.arange(100.0).double()).float()
    (A0, B0), (A, B) = (factors_of(init)(weight, 5, 1.0) for init in ("pissa", "pissa_krylov_3"))
    U, S, Vh = torch.linalg.svd(weight.T.double(), full_matrices=False)
    best = U[:, :5] * S[:5] @ Vh[:5]
    assert distance(A0 @ B0, best) < 1e-5
    assert distance(A @ B, best) < 1e-5


def test_krylov_factors_do_not_use_the_global_seed():
    weight = torch.randn(200, 90)
    state = torch.get_rng_state()
    first = factors_of("pissa_krylov_2")(weight, 3, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    second = factors_of("pissa_krylov_2")(weight, 3, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("init", ["pissa_krylov_0", "pissa_krylov_4", "pissa_niter_2"])
def test_a_weight_that_is_not_finite_is_refused(init, bad):
    weight = torch.randn(90, 200)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        factors_of(init)(weight, 3, 1.0)


@pytest.mark.parametrize("name", ["gaussian", "pissa_niter", "pissa_krylov_x", "pissa_krylov_1000", "PISSA"])
def test_an_unknown_init_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"unknown init '{name}': give lora, olora, pissa, pissa_krylov_N"):
        factors_of(name)
