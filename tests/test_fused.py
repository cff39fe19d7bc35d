"""Tests that the fused objective equals the plain formulas in value and gradient, for all sizes."""

import dataclasses
import math
import re

import pytest
import torch
from helpers import distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minibalora import fused
from minibalora import regularizers as R
from minibalora.fused import FrozenHead, fused_objective, mean_entropy
from minibalora.objective import NLG_RECIPES, LogitsInBlocks, Objective, WholeLogits, entropy_share, lean_svd_share

WEIGHTS = {"consistency": 0.3, "diversity": 0.2, "svd": 0.5, "non_target_kl": 0.7}
RECIPES = list(NLG_RECIPES)
DTYPES = (torch.float32, torch.bfloat16)


def states_and_head(M, d, V, seed=0, scale=1.0, dtype=torch.float64, peaked=False):
    """Return random student and teacher states (M, d), targets (M,) and a head (V, d).

    peaked: the student's states are rows of the head, so that one token has almost all of the probability.
    """
    torch.manual_seed(seed)
    W = scale * torch.randn(V, d, dtype=torch.float64)
    student = 3 * W[torch.randint(V, (M,))] if peaked else torch.randn(M, d, dtype=torch.float64)
    teacher = student + 0.3 * torch.randn(M, d, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), torch.randint(V, (M,)), W.to(dtype)


def both(student, teacher, targets, W, objective, weights=WEIGHTS):
    """Yield (value, gradient, terms) of the fused form, then of the plain form."""
    for head in (LogitsInBlocks(W), WholeLogits(lambda states: states @ W.T)):
        loss, terms = head.loss(student, teacher, targets, objective, weights)
        yield loss.item(), torch.autograd.grad(loss, student)[0], terms


def set_block_size(rows, monkeypatch):
    monkeypatch.setattr(FrozenHead, "block", property(lambda self: rows, lambda self, _: None), raising=False)


@settings(deadline=None, max_examples=60)
@given(
    M=st.integers(1, 40), d=st.integers(1, 24), V=st.integers(2, 300), seed=st.integers(0, 99),
    recipe=st.sampled_from(RECIPES), peaked=st.booleans(),
)  # fmt: skip
def test_fused_equals_plain_in_float64(M, d, V, seed, recipe, peaked):
    objective = dataclasses.replace(NLG_RECIPES[recipe], svd_k=3)
    weights = WEIGHTS if min(M, d) < V else WEIGHTS | {"svd": 0.0}  # else Z may have a rank below M
    (loss, gradient, terms), plain = both(*states_and_head(M, d, V, seed, peaked=peaked), objective, weights)
    assert loss == pytest.approx(plain[0], rel=1e-10, abs=1e-12)
    if not peaked:  # equal states make equal rows, whose spectral gradient is not unique
        assert distance(gradient, plain[1]) < 1e-8
    assert terms.keys() == plain[2].keys()
    for name, term in terms.items():
        assert term.item() == pytest.approx(plain[2][name].item(), rel=1e-10, abs=1e-10), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("M, d, V", [(67, 32, 1000), (20, 64, 1024), (64, 64, 129), (1, 5, 2), (130, 3, 70)])
def test_gradients_agree_to_1e_10_in_float64(recipe, M, d, V):
    objective = dataclasses.replace(NLG_RECIPES[recipe], svd_k=4)
    (_, gradient, _), plain = both(*states_and_head(M, d, V), objective)
    assert distance(gradient, plain[1]) < 1e-10


@pytest.mark.parametrize("name", ["consistency", "diversity", "svd", "non_target_kl"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_single_term_equals_the_plain_one(recipe, name):
    weights = dict.fromkeys(WEIGHTS, 0.0) | {name: 0.4}
    (loss, gradient, terms), plain = both(*states_and_head(30, 16, 200), NLG_RECIPES[recipe], weights)
    assert set(terms) == {"task", name} and loss == pytest.approx(plain[0], rel=1e-12)
    assert distance(gradient, plain[1]) < 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("M, d, V, peaked", [(50, 32, 999, False), (50, 32, 999, True), (7, 24, 4099, False)])
def test_rounding_errors_are_hardly_larger_than_those_of_the_plain_formulas(dtype, recipe, M, d, V, peaked):
    """The truth is float64 on the same rounded inputs. The test allows 1.25 times the error, and one more rounding."""
    weights = WEIGHTS if not peaked else WEIGHTS | {"svd": 0.0}
    narrow = states_and_head(M, d, V, scale=0.5, dtype=dtype, peaked=peaked)
    student, teacher, targets, W = narrow
    wide = student.detach().double().requires_grad_(), teacher.double(), targets, W.double()
    _, (loss, gradient, terms) = both(*wide, NLG_RECIPES[recipe], weights)
    of_fused, plain = both(*narrow, NLG_RECIPES[recipe], weights)
    assert distance(of_fused[1], gradient) <= 1.25 * distance(plain[1], gradient) + torch.finfo(dtype).eps
    assert abs(of_fused[0] - loss) <= 1.25 * abs(plain[0] - loss) + 1e-6 * abs(loss)


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_the_block_size_does_not_change_results(rows, monkeypatch):
    arguments, objective = states_and_head(50, 16, 200), NLG_RECIPES["iclr2026"]
    expected, expected_gradient, _ = next(both(*arguments, objective))
    set_block_size(rows, monkeypatch)
    loss, gradient, _ = next(both(*arguments, objective))
    assert loss == pytest.approx(expected, rel=1e-13) and distance(gradient, expected_gradient) < 1e-13


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tensor_is_larger_than_a_block_of_logits(recipe):
    """The vocabulary has 256 000 entries: a whole matrix of logits for 8192 tokens would take 8 GB."""
    student, teacher, targets, W = states_and_head(200, 2, 256_000, dtype=torch.float32)
    head = LogitsInBlocks(W)
    with Largest() as largest:
        head.loss(student, teacher, targets, NLG_RECIPES[recipe], WEIGHTS)[0].backward()
    assert largest.numbers <= head.block * len(W) < 200 * len(W)
    assert len(head.buffers) == 5


def test_the_non_target_kl_does_not_depend_on_the_target_logit():
    """Its gradient stays the same if the target's row of the head changes."""
    student, teacher, targets, W = states_and_head(12, 8, 50)
    targets = torch.full_like(targets, 7)
    gradients = []
    for factor in (1.0, 50.0):
        head = W.clone()
        head[7] *= factor
        with_term, without = (
            torch.autograd.grad(
                fused_objective(student, teacher, targets, FrozenHead(head), non_target_kl=x)[0], student
            )
            for x in (0.5, 0.0)
        )
        gradients.append(with_term[0] - without[0])
    assert torch.allclose(*gradients, atol=1e-12)


def test_kl_terms_are_exactly_zero_if_teacher_and_student_are_equal():
    student, _, targets, W = states_and_head(20, 8, 90, dtype=torch.float32)
    _, terms = fused_objective(student, student.detach(), targets, FrozenHead(W), lambda1=1.0, non_target_kl=1.0)
    assert terms["consistency"] == 0 and terms["non_target_kl"] == 0


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_equal_and_zero_singular_values_give_finite_gradients(norm):
    W = torch.randn(40, 6, dtype=torch.float64)
    Q = torch.linalg.qr(W)[0]
    equal = torch.eye(6, dtype=torch.float64)  # with an orthonormal head, all singular values are 1
    zero, low_rank = torch.zeros(5, 6, dtype=torch.float64), torch.ones(5, 6, dtype=torch.float64)
    for states, head in ((equal, Q), (zero, W), (low_rank, W), (low_rank, torch.zeros_like(W))):
        states = states.clone().requires_grad_()
        loss, terms = fused_objective(
            states,
            None,
            torch.zeros(len(states), dtype=torch.long),
            FrozenHead(head),
            lambda3=1.0,
            svd_norm=norm,
            svd_k=2,
        )
        loss.backward()
        assert states.grad.isfinite().all()
        assert terms["svd"].item() == pytest.approx(R.svd_share(states @ head.T, 2, norm).item(), abs=1e-7)


SPECTRA = {
    "i^-1/2": lambda i: i**-0.5,
    "i^-1": lambda i: 1 / i,
    "i^-2": lambda i: i**-2,
    "spiked": lambda i: torch.where(i == 1, 1e3, 1 / i),
    "rank 15": lambda i: torch.where(i <= 15, 1 / i, 0.0),
    "rank 5, fewer than k": lambda i: torch.where(i <= 5, 1 / i, 0.0),
    "zero": lambda i: 0 * i,
}
FORMS = {"by eigh": True, "by products": False}


def with_spectrum(name, M, d, seed=0):
    """Return H (M, d) with that spectrum, and its share's value and gradient by the SVD; k = 10."""
    torch.manual_seed(seed)
    rank = min(M, d)
    U, V = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in (M, d))
    sigma = SPECTRA[name](torch.arange(1, rank + 1, dtype=torch.float64))
    return (U * sigma) @ V.T, U, sigma, V


def share_of_spectrum(U, sigma, V, norm, k=10):
    """Return φ and U φ'(Σ) Vᵀ, the definition; φ' is 0 where σ is 0."""
    total = sigma.sum() if norm == "nuclear" else torch.linalg.vector_norm(sigma)
    total = total if total > 0 else torch.tensor(1.0)
    share = -sigma[:k].sum() / total
    slope = -share / total * (torch.ones_like(sigma) if norm == "nuclear" else sigma / total)
    slope[:k] -= 1 / total
    return share, (U * torch.where(sigma > 0, slope, 0.0)) @ V.T


@pytest.mark.parametrize("by_eigh", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("M, d", [(1, 8), (7, 30), (30, 24), (64, 48), (190, 250)])
def test_both_forms_of_the_spectral_share_equal_its_definition(M, d, spectrum, norm, by_eigh):
    """Bars: 1e-9 of the value, 1e-4 of the gradient. (190, 250) is large enough for the Krylov basis."""
    H, *parts = with_spectrum(spectrum, M, d)
    expected, gradient = share_of_spectrum(*parts, norm)
    share, slope = fused.spectral_share(H @ H.T, H, 10, norm, by_eigh)
    assert share.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    unit = 1 / max(parts[1].max().item(), 1e-9)  # a share of all values is constant, so its gradient is rounding alone
    assert (slope - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * unit


@pytest.mark.parametrize("by_eigh", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("values", [{1.0: 40}, {1.0: 7, 0.5: 20, 0.1: 13}, {1.0: 3, 0.3: 200}], ids=str)
def test_equal_values_around_the_kth_keep_the_value(values, norm, by_eigh):
    """The leading k are not unique, and neither is the gradient."""
    torch.manual_seed(0)
    sigma = torch.cat([torch.full((count,), value, dtype=torch.float64) for value, count in values.items()])
    H = torch.linalg.qr(torch.randn(len(sigma), len(sigma), dtype=torch.float64))[0] * sigma
    share, slope = fused.spectral_share(H @ H.T, H, 10, norm, by_eigh)
    total = sigma.sum() if norm == "nuclear" else sigma.norm()
    assert share.item() == pytest.approx(-(sigma[:10].sum() / total).item(), rel=1e-9)
    assert slope.isfinite().all()


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_values_without_a_gap_are_1e_3_off_at_most(norm):
    torch.manual_seed(0)
    H = torch.randn(300, 320, dtype=torch.float64)
    exact = R.svd_share(H, 10, norm).item()
    for by_eigh in FORMS.values():
        assert fused.spectral_share(H @ H.T, H, 10, norm, by_eigh)[0].item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_float32_products_keep_six_digits_of_values_above_a_percent(norm):
    """On a GPU with slow float64. Σ i^-½ has no values below 1 % of the largest; k = 10 > rank stays finite."""
    H, *parts = with_spectrum("i^-1/2", 190, 250)
    expected, gradient = share_of_spectrum(*parts, norm)
    share, slope = fused.spectral_share((H @ H.T).float(), H.float(), 10, norm, by_eigh=False)
    assert share.dtype == slope.dtype == torch.float32
    assert share.item() == pytest.approx(expected.item(), rel=2e-6) and distance(slope.double(), gradient) < 1e-4
    for spectrum in SPECTRA:
        H = with_spectrum(spectrum, 60, 50)[0].float()
        assert all(x.isfinite().all() for x in fused.spectral_share(H @ H.T, H, 10, norm, by_eigh=False))


@pytest.mark.parametrize("by_eigh", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("M", [9, 200])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_give_nan_and_no_exception(bad, M, norm, by_eigh):
    H = torch.randn(M, 210, dtype=torch.float64)
    H[3, 1] = bad
    share, slope = fused.spectral_share(H @ H.T, H, 10, norm, by_eigh)
    assert share.isnan() and slope.isnan().all()


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_many_more_rows_than_columns_use_the_short_side(norm):
    """With the whole S, 4000 × 4000, this test would take minutes."""
    student, _, targets, W = states_and_head(4000, 64, 90)
    with Largest() as largest:
        weights = dict.fromkeys(WEIGHTS, 0.0) | {"svd": 1.0}
        loss, terms = LogitsInBlocks(W).loss(student, None, targets, Objective(svd_norm=norm), weights)
    assert largest.numbers <= 4000 * 90
    expected = R.svd_share(student @ W.T, 10, norm)
    assert terms["svd"].item() == pytest.approx(expected.item(), rel=1e-10)


class Forbidden(TorchDispatchMode):
    """Raises at everything that makes the host wait for a GPU."""

    waits = ("_local_scalar_dense", "eigh", "svd", "nonzero", "is_nonzero", "item", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in function.name() for word in self.waits), function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_the_products_never_make_the_host_wait(norm):
    H = torch.randn(70, 80, dtype=torch.float64)
    with Forbidden():
        fused.spectral_share(H @ H.T, H, 10, norm, by_eigh=False)
    with pytest.raises(AssertionError, match="eigh"), Forbidden():
        fused.spectral_share(H @ H.T, H, 10, norm, by_eigh=True)


@pytest.mark.parametrize(
    "device, capability, tf32, place, dtype",
    [
        ("cpu", None, False, "cpu", torch.float64),
        ("mps", None, False, "cpu", torch.float64),
        ("cuda", (9, 0), False, "cuda", torch.float64),
        ("cuda", (8, 9), False, "cuda", torch.float32),
        ("cuda", (8, 9), True, "cuda", torch.float64),
    ],
)
def test_float64_is_left_where_it_is_slow_or_missing(device, capability, tf32, place, dtype, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        assert fused.spectral_place(torch.device(device)) == (torch.device(place), dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("M, V", [(12, 9000), (190, 5000), (1, 40), (30, 20)])
def test_the_lean_share_of_whole_logits_equals_the_plain_one(M, V, norm):
    """As for Gemma 2, whose logits are capped."""
    torch.manual_seed(0)
    logits = 30 * torch.tanh(torch.randn(M, V) * torch.arange(1, V + 1) ** -0.6)
    results = []
    for function in (R.svd_share, lean_svd_share):
        Z = logits.clone().requires_grad_()
        share = function(Z, 10, norm)
        share.backward()
        results.append((share.item(), Z.grad))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    if M < V:  # else there are noise values, whose gradient is arbitrary
        assert distance(results[1][1], results[0][1]) < 1e-4 or results[0][1].norm() < 1e-6


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_the_spectral_term_of_float32_states_has_float32_precision(norm, decay):
    """A float32 Gram matrix would lose half of the digits."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 48, dtype=torch.float64))[0] for n in (80, 48))
    H = (U * (torch.arange(48) + 1.0) ** -decay @ V.T).float().requires_grad_()
    W = torch.linalg.qr(torch.randn(500, 48))[0].contiguous()
    truth = R.svd_share(H.double() @ W.double().T, 10, norm)
    expected = torch.autograd.grad(truth, H)[0]
    weights = dict.fromkeys(WEIGHTS, 0.0) | {"svd": 1.0}
    objective = Objective(svd_k=10, svd_norm=norm)
    task = LogitsInBlocks(W).loss(H, None, torch.zeros(80, dtype=torch.long), objective, dict.fromkeys(WEIGHTS, 0.0))[0]
    loss, terms = LogitsInBlocks(W).loss(H, None, torch.zeros(80, dtype=torch.long), objective, weights)
    assert terms["svd"].item() == pytest.approx(truth.item(), rel=1e-6)
    gradient = torch.autograd.grad(loss, H)[0] - torch.autograd.grad(task, H)[0]
    assert distance(gradient, expected) < 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_states_that_are_not_finite_give_a_loss_that_is_not_finite_and_no_exception(bad):
    student, teacher, targets, W = states_and_head(9, 4, 30)
    student.data[3, 1] = bad
    loss, _ = fused_objective(student, teacher, targets, FrozenHead(W), lambda1=1.0, lambda3=1.0)
    assert not loss.isfinite()


@given(V=st.integers(1, 400), k=st.integers(1, 30), seed=st.integers(0, 99))
def test_largest_equals_topk(V, k, seed):
    torch.manual_seed(seed)
    z = torch.randn(3, V).round(decimals=1)  # with ties
    largest, columns = fused._largest(z, k, width=8)
    assert torch.equal(largest, z.topk(min(k, V)).values)
    assert torch.equal(z.gather(1, columns), largest)
    assert all(len(set(row)) == len(row) for row in columns.tolist())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mean_entropy_equals_that_of_whole_logits(temperature):
    student, _, _, W = states_and_head(37, 8, 90)
    expected = entropy_share(student.detach() @ W.T, temperature).mean() * torch.log(torch.tensor(90.0))
    assert mean_entropy(student.detach(), FrozenHead(W), temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_trained_head_is_refused():
    with pytest.raises(ValueError, match="trained"):
        FrozenHead(torch.randn(3, 2, requires_grad=True))


def test_the_gradient_scales_with_the_upstream_gradient():
    student, _, targets, W = states_and_head(9, 4, 30)
    loss, _ = fused_objective(student, None, targets, FrozenHead(W), lambda2=0.5)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * loss, student)
    assert torch.allclose(thrice, 3 * once)


def test_an_upstream_gradient_is_not_rounded_to_bfloat16():
    """Rounded to bfloat16, 0.3003 would be 0.18 % too large, and so would every number of the gradient."""
    student, _, targets, W = states_and_head(60, 16, 200, dtype=torch.bfloat16)
    loss, _ = fused_objective(student, None, targets, FrozenHead(W))
    (whole,) = torch.autograd.grad(loss, student, retain_graph=True)
    (scaled,) = torch.autograd.grad(0.3003 * loss, student)
    factor = (scaled.double() * whole.double()).sum() / whole.double().square().sum()
    assert factor == pytest.approx(0.3003, rel=5e-4)


ALL = dict(lambda1=0.1, lambda2=0.1, lambda3=0.1, non_target_kl=0.1)


@pytest.mark.parametrize(
    "states, teacher, targets, message",
    [
        ((0, 16), (0, 16), (0,), "states of shape"),
        ((2, 4, 16), (2, 4, 16), (4,), "states of shape"),
        ((4, 8), (4, 8), (4,), "states of shape"),
        ((4, 16), (1, 16), (4,), "the same rows"),
        ((4, 16), None, (4,), "the same rows"),
        ((4, 16), (4, 16), (3,), "a token for each of 4 rows"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(states, teacher, targets, message):
    head, targets = FrozenHead(torch.randn(50, 16)), torch.zeros(targets, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        fused_objective(torch.randn(states), teacher and torch.randn(teacher), targets, head, **ALL)


def test_an_unknown_setting_is_refused_by_name():
    with pytest.raises(TypeError, match="lambda4"):
        fused_objective(torch.randn(4, 16), None, torch.arange(4), FrozenHead(torch.randn(50, 16)), lambda4=1.0)


@pytest.mark.parametrize("wrong, message", [
    *[({name: k}, f"k is {k}, ") for name in ("svd_k", "top_k") for k in (0, -1, 2.0)],
    *[({"temperature": T}, f"temperature is {T}") for T in (0.0, -1.0, math.inf, math.nan)],
    ({"svd_k": None}, "k is None, "), ({"svd_norm": None}, "unknown norm None"),
])  # fmt: skip
def test_settings_that_the_plain_formulas_refuse_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        fused_objective(torch.randn(4, 16), None, torch.arange(4), FrozenHead(torch.randn(50, 16)), **wrong)


@pytest.mark.parametrize("k, norm", [(0, "nuclear"), (-1, "frobenius"), (None, "nuclear"), (2, "fro"), (2, None)])
@pytest.mark.parametrize("by_eigh", FORMS.values(), ids=FORMS)
def test_the_spectral_share_refuses_what_the_plain_one_refuses(k, norm, by_eigh):
    Z = torch.randn(4, 9, dtype=torch.float64)
    with pytest.raises(ValueError) as plain:
        R.svd_share(Z, k, norm)
    with pytest.raises(ValueError, match=re.escape(str(plain.value))):
        fused.spectral_share(Z @ Z.T, Z, k, norm, by_eigh)


def test_a_second_derivative_is_refused():
    h = torch.randn(4, 16, requires_grad=True)
    loss, _ = fused_objective(h, h.detach(), torch.arange(4), FrozenHead(torch.randn(50, 16)), **ALL)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_training_works_after_a_call_in_inference_mode():
    head, y = FrozenHead(torch.randn(50, 16)), torch.arange(4)
    with torch.inference_mode():
        fused_objective(torch.randn(4, 16), torch.randn(4, 16), y, head, **ALL)
    h = torch.randn(4, 16, requires_grad=True)
    fused_objective(h, torch.randn(4, 16), y, head, **ALL)[0].backward()
    assert h.grad.isfinite().all()


def test_autocast_accepts_bfloat16_states_and_a_float32_head():
    torch.manual_seed(0)
    head, y = FrozenHead(torch.randn(50, 16)), torch.arange(4)
    h, teacher = torch.randn(4, 16).bfloat16().requires_grad_(), torch.randn(4, 16).bfloat16()
    expected, _ = fused_objective(h.float(), teacher.float(), y, head, **ALL)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = fused_objective(h, teacher, y, head, **ALL)
    loss.backward()
    assert torch.equal(loss, expected) and h.grad.dtype == torch.bfloat16


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="outside 0 to 49"):
        fused_objective(torch.randn(2, 16), None, torch.tensor([3, -100]), FrozenHead(torch.randn(50, 16)))


def test_a_loss_scale_prevents_underflow_of_float16_gradients():
    """With 512 rows, gradients of logits are f / 512. Most of 8000 are below float16's smallest number."""
    torch.manual_seed(0)
    h, W, y = torch.randn(512, 64).half(), (0.02 * torch.randn(8000, 64)).half(), torch.randint(0, 8000, (512,))
    h_fused, h_plain = h.clone().requires_grad_(), h.clone().requires_grad_()
    (fused_objective(h_fused, None, y, FrozenHead(W))[0] * 65536).backward()
    (torch.nn.functional.cross_entropy((h_plain @ W.T).float(), y) * 65536).backward()
    assert distance(h_fused.grad, h_plain.grad) < 5e-4  # one rounding of float16 is 2^-11


def test_the_loss_may_be_divided_in_place_and_a_head_that_is_trained_later_is_refused():
    student, teacher, targets, W = states_and_head(6, 4, 20)
    head = LogitsInBlocks(W)
    loss, _ = head.loss(student, teacher, targets, Objective(), WEIGHTS)
    whole = torch.autograd.grad(loss, student, retain_graph=True)[0]
    loss /= 4
    assert torch.allclose(torch.autograd.grad(loss, student)[0], whole / 4)
    W.requires_grad_()
    with pytest.raises(ValueError, match="the head is trained"):
        head.loss(student, teacher, targets, Objective(), WEIGHTS)
