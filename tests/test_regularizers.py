"""Tests of the regularizers: gradients against finite differences, bounds, invariances, degenerate and bad inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minibalora import regularizers as R

SHAPES = [(1, 1), (1, 5), (2, 3), (7, 4), (4, 9)]
seeds = st.integers(0, 2**31)
rows, columns = st.integers(1, 12), st.integers(1, 12)


def logits(N, D, seed, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(N, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def all_terms(Z, P, targets, k=2):
    """Return every regularizer of Z by name. Non-target KL needs at least two columns."""
    terms = {
        "consistency_mse": R.consistency_mse(Z, P),
        "consistency_kl": R.consistency_kl(Z, P, temperature=2.0),
        "diversity_covariance": R.diversity_covariance(Z),
        "diversity_entropy": R.diversity_entropy(Z),
        "diversity_entropy_top_k": R.diversity_entropy(Z, top_k=3),
        "svd_sum": R.svd_sum(Z, k),
        "svd_share": R.svd_share(Z, k),
        "svd_share_frobenius": R.svd_share(Z, k, norm="frobenius"),
    }
    return terms | ({"non_target_kl": R.non_target_kl(Z, P, targets)} if Z.shape[1] > 1 else {})


@pytest.mark.parametrize("N, D", SHAPES)
def test_gradients_match_finite_differences(N, D):
    Z, P = logits(N, D, 1).requires_grad_(), logits(N, D, 2)
    targets = torch.arange(N) % D
    for name in all_terms(Z, P, targets):
        assert torch.autograd.gradcheck(lambda Z, name=name: all_terms(Z, P, targets)[name], Z), name


@settings(deadline=None, max_examples=60)
@given(N=rows, D=columns, seed=seeds, k=st.integers(1, 14), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_values_are_within_their_bounds(N, D, seed, k, scale):
    Z, P = logits(N, D, seed, scale), logits(N, D, seed + 1, scale)
    slack = 1e-12
    assert -1 - slack <= R.svd_share(Z, k) <= -min(k, N, D) / min(N, D) + slack
    assert -math.sqrt(min(k, N, D)) - slack <= R.svd_share(Z, k, "frobenius") < 0
    assert R.svd_sum(Z, k) <= 0
    assert -math.log(D) - slack <= R.diversity_entropy(Z) <= slack
    assert -math.log(min(k, D)) - slack <= R.diversity_entropy(Z, top_k=k) <= slack
    assert R.consistency_kl(Z, P, 0.7) >= -slack
    assert 0 <= R.consistency_mse(Z, P) <= 4 / D + slack
    assert R.diversity_covariance(Z) >= 0
    if D > 1:
        assert R.non_target_kl(Z, P, torch.arange(N) % D) >= -slack


@settings(deadline=None, max_examples=40)
@given(N=rows, D=columns, seed=seeds)
def test_consistency_is_zero_for_equal_and_for_shifted_logits(N, D, seed):
    Z = logits(N, D, seed)
    assert R.consistency_kl(Z, Z, 2.0) == 0 and R.consistency_mse(Z, Z) == 0
    shifted = Z + logits(N, 1, seed + 1)  # softmax ignores a constant added to a row
    assert R.consistency_kl(shifted, Z, 2.0) == pytest.approx(0, abs=1e-12)
    if D > 1:
        assert R.non_target_kl(shifted, Z, torch.arange(N) % D) == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(N=rows, D=columns, seed=seeds)
def test_terms_are_invariant_to_scales_shifts_and_the_order_of_rows(N, D, seed):
    Z, P = logits(N, D, seed), logits(N, D, seed + 1)
    positive, vector = logits(N, 1, seed + 2).exp(), logits(1, D, seed + 3)
    equal = lambda a, b: a.item() == pytest.approx(b.item(), rel=1e-9, abs=1e-12)  # noqa: E731
    assert equal(R.consistency_mse(positive * Z, P), R.consistency_mse(Z, P))
    assert equal(R.diversity_covariance(Z + vector), R.diversity_covariance(Z))
    assert equal(R.svd_share(7 * Z, 3), R.svd_share(Z, 3))
    assert equal(R.svd_sum(Z[torch.randperm(N)], 3), R.svd_sum(Z, 3))


@settings(deadline=None, max_examples=40)
@given(N=rows, D=st.integers(2, 12), seed=seeds)
def test_non_target_kl_does_not_depend_on_the_target_logit(N, D, seed):
    Z, P = logits(N, D, seed, 5.0).requires_grad_(), logits(N, D, seed + 1, 5.0)
    targets = torch.randint(D, (N,), generator=torch.Generator().manual_seed(seed))
    R.non_target_kl(Z, P, targets).backward()
    at_target = torch.zeros(N, D, dtype=torch.bool).scatter_(1, targets[:, None], True)
    assert (Z.grad[at_target] == 0).all() and Z.grad.isfinite().all()
    shifted = torch.where(at_target, Z.detach() + 100, Z.detach())
    assert R.non_target_kl(shifted, P, targets).item() == pytest.approx(R.non_target_kl(Z, P, targets).item())


@settings(deadline=None, max_examples=30)
@given(N=rows, D=st.integers(2, 9), seed=seeds)
def test_non_target_kl_equals_its_definition(N, D, seed):
    Z, P = logits(N, D, seed), logits(N, D, seed + 1)
    targets = torch.randint(D, (N,), generator=torch.Generator().manual_seed(seed))
    expected = 0.0
    for row, target in enumerate(targets):
        others = [column for column in range(D) if column != target]
        p, f = P[row].softmax(0)[others], Z[row].softmax(0)[others]
        p, f = p / p.sum(), f / f.sum()
        expected += (p * (p / f).log()).sum().item() / N
    assert R.non_target_kl(Z, P, targets).item() == pytest.approx(expected, abs=1e-12)


def test_values_equal_those_computed_by_hand():
    Z = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert R.svd_sum(Z, 1).item() == pytest.approx(-4 / 2)
    assert R.svd_share(Z, 1).item() == pytest.approx(-4 / 7)
    assert R.svd_share(Z, 1, "frobenius").item() == pytest.approx(-4 / 5)
    # centred columns (1.5, −1.5) and (−2, 2): C_01 = C_10 = −6, and 2 · 6² / D = 36
    assert R.diversity_covariance(Z).item() == pytest.approx(36)
    assert R.consistency_mse(Z, Z.flip(0)).item() == pytest.approx(1)
    assert R.diversity_entropy(torch.zeros(3, 8)).item() == pytest.approx(-math.log(8))
    P, F = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert R.consistency_kl(F, P).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert R.consistency_kl(2 * F, 2 * P, 2.0).item() == pytest.approx(4 * R.consistency_kl(F, P).item())


@pytest.mark.parametrize("N, D", SHAPES)
@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["zeros", "equal singular values"])
def test_degenerate_logits_give_finite_values_and_gradients(N, D, make):
    Z = make(N, D).requires_grad_()
    for name, term in all_terms(Z, torch.zeros(N, D), torch.zeros(N, dtype=torch.long)).items():
        (gradient,) = torch.autograd.grad(term, Z, allow_unused=True)
        assert term.isfinite(), name
        assert gradient.isfinite().all() and gradient.abs().max() <= 10, name


def test_equal_singular_values_have_a_finite_gradient():
    Z = torch.eye(6, dtype=torch.float64).requires_grad_()
    R.svd_share(Z, 3).backward()
    assert Z.grad.isfinite().all() and Z.grad.abs().max() <= 1


def test_peaked_logits_give_finite_values_and_gradients_in_float32():
    Z = (1e4 * torch.eye(4)).requires_grad_()
    for name, term in all_terms(Z, Z.detach().flip(0), torch.tensor([0, 1, 2, 3])).items():
        (gradient,) = torch.autograd.grad(term, Z)
        assert term.isfinite() and gradient.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_of_half_precision_logits_are_computed_in_float32(dtype):
    Z, P = logits(6, 5, 0).to(dtype), logits(6, 5, 1).to(dtype)
    targets = torch.arange(6) % 5
    for name, term in all_terms(Z, P, targets).items():
        assert term.dtype == torch.float32 and term.dim() == 0
        assert term.item() == pytest.approx(all_terms(Z.double(), P.double(), targets)[name].item(), rel=1e-5, abs=1e-6)


def test_no_gradient_flows_into_the_teacher():
    Z, P = logits(4, 5, 0).requires_grad_(), logits(4, 5, 1).requires_grad_()
    targets = torch.arange(4)
    (R.consistency_mse(Z, P) + R.consistency_kl(Z, P) + R.non_target_kl(Z, P, targets)).backward()
    assert P.grad is None


CONSTANT = {  # name -> term, rows, columns, value
    "nuclear share, k = columns": (lambda Z: R.svd_share(Z, 3), 32, 3, -1),
    "nuclear share, k > columns": (lambda Z: R.svd_share(Z, 5), 32, 2, -1),
    "nuclear share, k > rows": (lambda Z: R.svd_share(Z, 10), 8, 50, -1),
    "nuclear share of a row": (lambda Z: R.svd_share(Z, 1), 1, 50, -1),
    "frobenius share of a row": (lambda Z: R.svd_share(Z, 10, "frobenius"), 1, 50, -1),
    "covariance of a row": (lambda Z: R.diversity_covariance(Z), 1, 3, 0),
    "entropy of a logit": (lambda Z: R.diversity_entropy(Z, top_k=1), 8, 50, 0),
    "KL of a column": (lambda Z: R.consistency_kl(Z, Z.flip(0)), 8, 1, 0),
    "non-target KL of two columns": (lambda Z: R.non_target_kl(Z, Z.flip(0), torch.arange(8) % 2), 8, 2, 0),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("seed", range(3))
def test_a_term_that_is_a_constant_has_no_gradient(name, seed):
    """`run/term_warnings.py` and the scripts' refusals rest on these."""
    term, N, D, value = CONSTANT[name]
    Z = logits(N, D, seed, scale=3.0, dtype=torch.float32).requires_grad_()
    result = term(Z)
    assert result.item() == pytest.approx(value, abs=1e-6)
    assert (torch.autograd.grad(result, Z, retain_graph=True)[0] == 0).all()
    weighted = torch.autograd.grad(0.03 * result, Z)[0]  # 0.03 / ‖Z‖ and 0.03 · (1 / ‖Z‖) differ in their last bit
    assert weighted.norm() < 1e-6 * 0.03


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="give nuclear or frobenius"):
        R.svd_share(torch.ones(2, 2), 1, norm="spectral")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_nan_and_no_exception(bad):
    Z = torch.tensor([[1.0, bad, 2.0], [0.0, 1.0, 3.0]])
    for name, term in all_terms(Z, torch.zeros(2, 3), torch.tensor([0, 0])).items():
        assert not term.isfinite(), name


TERMS = {
    "consistency_mse": lambda z, p: R.consistency_mse(z, p),
    "consistency_kl": lambda z, p: R.consistency_kl(z, p, 2.0),
    "diversity_covariance": lambda z, p: R.diversity_covariance(z),
    "diversity_entropy": lambda z, p: R.diversity_entropy(z),
    "diversity_entropy of 18": lambda z, p: R.diversity_entropy(z, 18),
    "svd_sum": lambda z, p: R.svd_sum(z, 2),
    "svd_share": lambda z, p: R.svd_share(z, 2),
    "non_target_kl": lambda z, p: R.non_target_kl(z, p, torch.arange(len(z))),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shape", [(0, 20), (2, 3, 20), (20,)])
def test_logits_that_are_not_a_matrix_with_rows_are_refused(name, shape):
    with pytest.raises(ValueError, match="shape"):
        TERMS[name](torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("name", ["consistency_mse", "consistency_kl", "non_target_kl"])
def test_a_teacher_with_another_number_of_rows_is_refused(name):
    with pytest.raises(ValueError, match="the same rows"):
        TERMS[name](torch.randn(4, 20), torch.randn(1, 20))


@pytest.mark.parametrize(
    "targets", [torch.tensor([1, 2, 3]), torch.ones(4), torch.tensor([0, 1, 2, -100]), torch.eye(4, 20)]
)
def test_targets_that_are_not_a_class_for_each_row_are_refused(targets):
    with pytest.raises(ValueError, match="target"):
        R.non_target_kl(torch.randn(4, 20), torch.randn(4, 20), targets)


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize("name", TERMS)
def test_a_masked_column_is_left_out_or_refused(name, mask):
    """A mask replaces logits by −∞ or nearly. Terms of softmax then use 0 log 0 = 0, in value and gradient; others
    refuse."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    expected = TERMS[name](student[:, :15], teacher[:, :15])
    student[:, 15:] = teacher[:, 15:] = mask
    student.requires_grad_()
    if name in ("consistency_mse", "diversity_covariance", "svd_sum", "svd_share"):
        with pytest.raises(ValueError, match="cannot be compared as numbers"):
            TERMS[name](student, teacher)
        return
    value = TERMS[name](student, teacher)
    value.backward()
    assert torch.allclose(value, expected) and student.grad.isfinite().all() and (student.grad[:, 15:] == 0).all()


@pytest.mark.parametrize("name", TERMS)
def test_terms_can_be_compiled_whole_mapped_and_computed_without_numbers(name):
    """The checks of values then see nothing, and are left out."""
    Z, P = torch.randn(2, 4, 20), torch.randn(2, 4, 20)
    expected = torch.stack([TERMS[name](z, p) for z, p in zip(Z, P, strict=True)])
    compiled = torch.compile(TERMS[name], fullgraph=True, backend="eager")(Z[0], P[0])
    assert torch.allclose(compiled, expected[0]) and torch.allclose(torch.vmap(TERMS[name])(Z, P), expected)
    assert TERMS[name](Z[0].to("meta"), P[0].to("meta")).shape == ()


def test_targets_can_be_mapped_and_compiled():
    Z, P, targets = torch.randn(2, 4, 20), torch.randn(2, 4, 20), torch.tensor([[0, 1, 2, 3], [9, 8, 19, 7]])
    expected = torch.stack(list(map(R.non_target_kl, Z, P, targets)))
    compiled = torch.compile(R.non_target_kl, fullgraph=True, backend="eager")(Z[0], P[0], targets[0])
    assert torch.allclose(compiled, expected[0])
    assert torch.allclose(torch.vmap(R.non_target_kl)(Z, P, targets), expected)


@pytest.mark.parametrize("k", [0, -1, 2.0])
@pytest.mark.parametrize("term", [R.svd_sum, R.svd_share, R.diversity_entropy])
def test_a_k_that_is_no_integer_from_1_up_is_refused(term, k):
    with pytest.raises(ValueError, match=f"k is {k}, "):
        term(torch.randn(4, 20), k)
    if term is not R.diversity_entropy:
        with pytest.raises(ValueError, match="k is None, "):
            term(torch.randn(4, 20), None)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        R.consistency_kl(torch.randn(4, 20), torch.randn(4, 20), temperature)


@pytest.mark.parametrize("name", TERMS)
def test_autocast_does_not_change_values(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 50) + 3, torch.randn(40, 50)
    with torch.autocast("cpu", torch.bfloat16):
        value = TERMS[name](student, teacher)
    assert value.dtype == torch.float32 and torch.equal(value, TERMS[name](student, teacher))


@pytest.mark.parametrize("name", TERMS)
def test_every_term_has_a_second_derivative(name):
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda z: TERMS[name](z, teacher), student)


@pytest.mark.parametrize("name", ["consistency_mse", "consistency_kl", "non_target_kl"])
def test_nan_in_the_teacher_gives_nan(name):
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    teacher[1, 7] = torch.nan
    assert TERMS[name](student, teacher).isnan() and TERMS[name](teacher, teacher).isnan()


def test_a_row_with_its_target_alone_adds_nothing_to_the_non_target_kl():
    student = torch.full((2, 5), -torch.inf)
    student[:, 1] = torch.tensor([1.0, 2.0])
    student[1] = torch.arange(5.0)
    student.requires_grad_()
    value = R.non_target_kl(student, student.detach() + torch.arange(5), torch.tensor([1, 1]))
    alone = R.non_target_kl(student[1:], student[1:].detach() + torch.arange(5), torch.tensor([1]))
    assert torch.allclose(value, alone / 2)
    value.backward()
    assert student.grad.isfinite().all() and not student.grad[0].any()


def test_a_missing_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher of shape None"):
        R.consistency_kl(torch.zeros(2, 3), None)
