"""Tests of the objective: published recipes, λ schedules, the formulas of each recipe, and degenerate batches."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minibalora import regularizers as R
from minibalora.objective import (
    NLG_RECIPES,
    NLU_RECIPES,
    LogitsInBlocks,
    Objective,
    WholeLogits,
    entropy_share,
    head_of,
    lambdas,
    lean_svd_share,
    nlg_loss,
    nlu_loss,
)


def test_nlg_recipes_have_the_published_settings():
    old, new = NLG_RECIPES["2024"], NLG_RECIPES["iclr2026"]
    assert (old.lambda1, old.lambda2, old.lambda3) == (1e-4, 3e-4, 1e-4)
    assert (old.svd_k, old.temperature, old.top_k, old.svd_norm, old.moving_lambdas) == (10, 1, None, "nuclear", False)
    assert (new.lambda1, new.lambda2, new.lambda3) == (0.025, 0.005, 0.005)
    assert (new.svd_k, new.temperature, new.top_k, new.svd_norm, new.moving_lambdas) == (10, 2, 20, "frobenius", True)


@pytest.mark.parametrize("recipe", NLG_RECIPES)
def test_nlg_terms_equal_the_formulas_of_the_recipe(recipe):
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(30, 50), torch.randn(30, 50), torch.randint(50, (30,))
    objective = NLG_RECIPES[recipe]
    weights = lambdas(objective, step=9, steps=10)
    loss, terms = nlg_loss(student, teacher, targets, objective, weights)
    if recipe == "2024":
        expected = R.consistency_kl(student, teacher), R.diversity_entropy(student), R.svd_share(student, 10)
    else:
        expected = (
            R.consistency_kl(student, teacher, 2.0),
            R.diversity_entropy(student, 20),
            R.svd_share(student, 10, "frobenius"),
        )
    assert (terms["consistency"], terms["diversity"], terms["svd"]) == expected
    task = torch.nn.functional.cross_entropy(student, targets)
    total = task + sum(weights[name] * term for name, term in zip(weights, expected, strict=False))
    assert loss.item() == pytest.approx(total.item())


def test_terms_of_weight_zero_are_not_computed():
    """Without these terms, no teacher is needed."""
    _, terms = nlg_loss(torch.randn(3, 5), None, torch.tensor([0, 1, 2]), Objective(), lambdas(Objective(), 0, 1))
    assert list(terms) == ["task"]


def test_iclr2026_weights_follow_the_published_schedule():
    objective, steps = NLG_RECIPES["iclr2026"], 1000
    at = lambda step: lambdas(objective, step, steps)  # noqa: E731
    assert at(0) == {"consistency": 0.025, "diversity": 0, "svd": 0, "non_target_kl": 0}
    assert at(199)["diversity"] == at(200)["svd"] == 0 < at(201)["svd"]
    assert at(225)["diversity"] == pytest.approx(0.0025) and at(225)["svd"] == pytest.approx(0.0025)
    assert at(250)["diversity"] == pytest.approx(0.005) and at(999)["svd"] == 0.005
    assert at(500)["consistency"] == pytest.approx(0.55 * 0.025)
    assert at(999)["consistency"] == pytest.approx(0.1 * 0.025, rel=1e-3)
    consistency = [at(step)["consistency"] for step in range(0, 1000, 10)]
    assert consistency == sorted(consistency, reverse=True)


def test_2024_weights_are_constant():
    first, last = (lambdas(NLG_RECIPES["2024"], step, 100) for step in (0, 99))
    assert first == last == {"consistency": 1e-4, "diversity": 3e-4, "svd": 1e-4, "non_target_kl": 0}


@given(share=st.floats(0, 1, allow_subnormal=False), step=st.integers(0, 99))
def test_adaptive_lambda1_depends_on_the_teachers_entropy_alone(share, step):
    objective = dataclasses.replace(NLG_RECIPES["iclr2026"], adaptive_lambda1=True)
    lambda1 = lambdas(objective, step, 100, teacher_share=share)["consistency"]
    assert lambda1 == pytest.approx(0.0025 + (0.025 - 0.0025) * (1 - share))


def test_entropy_share_is_1_if_flat_and_0_if_peaked():
    assert entropy_share(torch.zeros(2, 7), 2.0).tolist() == pytest.approx([1, 1])
    assert entropy_share(1e4 * torch.eye(3), 2.0).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    flat, sharp = entropy_share(torch.tensor([[1.0, 0]]), 5.0), entropy_share(torch.tensor([[1.0, 0]]), 0.2)
    assert flat > sharp
    assert math.isfinite(entropy_share(torch.randn(4, 9), 1.0).sum())


def test_nlu_recipes_have_the_published_settings():
    old, new = NLU_RECIPES["2024"], NLU_RECIPES["iclr2026"]
    assert (old.lambda1, old.lambda2, old.lambda3) == (1e-4, 4e-4, 1e-4)
    assert (old.consistency, old.svd_k, old.svd_norm, old.moving_lambdas) == ("mse", 5, None, False)
    assert (new.lambda1, new.lambda2, new.lambda3) == (0.15, 0.03, 0.03)
    assert (new.consistency, new.temperature, new.svd_k, new.svd_norm) == ("kl", 1.0, 5, "nuclear")
    assert not new.moving_lambdas


@pytest.mark.parametrize("recipe", NLU_RECIPES)
def test_nlu_terms_equal_the_formulas_of_the_recipe(recipe):
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(16, 7), torch.randn(16, 7), torch.randint(7, (16,))
    objective = dataclasses.replace(NLU_RECIPES[recipe], non_target_kl=0.5)
    weights = lambdas(objective, step=3, steps=10)
    _, terms = nlu_loss(student, teacher, labels, objective, weights)
    if recipe == "2024":
        consistency, svd = R.consistency_mse(student, teacher), R.svd_sum(student, 5)
    else:
        consistency, svd = R.consistency_kl(student, teacher), R.svd_share(student, 5)
    covariance, non_target = R.diversity_covariance(student), R.non_target_kl(student, teacher, labels)
    expected = {"consistency": consistency, "diversity": covariance, "svd": svd, "non_target_kl": non_target}
    assert {name: term for name, term in terms.items() if name != "task"} == expected
    assert terms["task"] == torch.nn.functional.cross_entropy(student, labels)


def test_nlu_consistency_uses_the_temperature_of_the_objective():
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    objective = dataclasses.replace(NLU_RECIPES["iclr2026"], temperature=3.0)
    _, terms = nlu_loss(student, teacher, labels, objective, lambdas(objective, 0, 1))
    assert terms["consistency"] == R.consistency_kl(student, teacher, 3.0)


@pytest.mark.parametrize("recipe", NLU_RECIPES)
@given(N=st.integers(1, 6), D=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]))
def test_small_batches_give_finite_terms_and_gradients(recipe, N, D, seed, scale):
    """This includes N = 1, N < k, D < k, one class and all-zero logits."""
    generator = torch.Generator().manual_seed(seed)
    student = (scale * torch.randn(N, D, generator=generator)).requires_grad_()
    teacher = torch.randn(N, D, generator=generator)
    labels = torch.randn(N, generator=generator) if D == 1 else torch.randint(D, (N,), generator=generator)
    objective = NLU_RECIPES[recipe]
    weights = lambdas(objective, 0, 1)
    loss, terms = nlu_loss(student, teacher, labels, objective, weights)
    loss.backward()
    assert all(term.isfinite() for term in terms.values()) and student.grad.isfinite().all()


@pytest.mark.parametrize("recipe", NLU_RECIPES)
def test_regression_uses_squared_errors_and_no_terms_over_classes(recipe):
    student, teacher, scores = torch.randn(5, 1), torch.randn(5, 1), torch.randn(5, dtype=torch.float64)
    objective = NLU_RECIPES[recipe]
    _, terms = nlu_loss(student, teacher, scores, objective, lambdas(objective, 0, 1))
    assert list(terms) == ["task", "consistency"]
    assert terms["task"].item() == pytest.approx(((student[:, 0] - scores) ** 2).mean().item())
    assert terms["consistency"].item() == pytest.approx(((student - teacher) ** 2).mean().item())


def test_the_spectral_share_of_three_classes_has_no_gradient_but_the_sum_has():
    """With k = 5 > D, the share is the constant −1, as the docstring of nlu_loss says."""
    gradients = []
    for recipe in ("iclr2026", "2024"):
        student = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        objective = dataclasses.replace(NLU_RECIPES[recipe], lambda1=0.0, lambda2=0.0)
        _, terms = nlu_loss(student, None, torch.zeros(8, dtype=torch.long), objective, lambdas(objective, 0, 1))
        gradients.append(torch.autograd.grad(terms["svd"], student)[0].norm().item())
    assert gradients[0] < 1e-6 < 0.1 < gradients[1]


@pytest.mark.parametrize("recipe", NLG_RECIPES)
def test_capped_logits_take_the_lean_spectral_term_unless_plain(recipe, monkeypatch):
    """As for Gemma 2. The numbers are the same; only `--plain` runs the paper's SVD."""
    torch.manual_seed(0)
    W, objective = torch.randn(90, 24, dtype=torch.float64), dataclasses.replace(NLG_RECIPES[recipe], svd_k=4)
    head = lambda states: 5 * torch.tanh(states @ W.T / 5)  # noqa: E731
    model = SimpleNamespace(head=head, head_weight=W, config=SimpleNamespace(logit_cap=5.0))
    states, targets = torch.randn(20, 24, dtype=torch.float64, requires_grad=True), torch.randint(90, (20,))
    weights = {"consistency": 0.3, "diversity": 0.2, "svd": 0.5, "non_target_kl": 0.0}
    teacher, results, calls = states.detach() + 0.1, [], []
    monkeypatch.setattr(R, "_singular_values", lambda Z: calls.append(1) or torch.linalg.svdvals(Z))
    for is_plain in (False, True):
        loss, terms = head_of(model, is_plain).loss(states, teacher, targets, objective, weights)
        results.append((loss.item(), terms["svd"].item(), torch.autograd.grad(loss, states)[0]))
        assert len(calls) == is_plain
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-12)
    assert torch.allclose(results[0][2], results[1][2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"consistency": "KL"}, "consistency 'KL' is kl or mse"),
    ({"svd_norm": "fro"}, "svd_norm 'fro' is nuclear"),
    *[({"temperature": T}, f"temperature is {T}") for T in (0.0, -1.0, math.inf, math.nan)],
    *[({name: k}, f"k is {k}, ") for name in ("svd_k", "top_k") for k in (-1, 2.0)],
    *[({"svd_k": k}, f"k is {k}, ") for k in (0, None)],
    *[({name: λ}, f"{name} is {λ!r}") for name in ("lambda1", "lambda2", "lambda3", "non_target_kl", "router_aux")
      for λ in (-0.1, math.nan, "1")],
])  # fmt: skip
def test_settings_that_do_not_exist_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective(**wrong)


def test_top_k_0_means_the_whole_vocabulary_in_both_forms():
    W, states, targets = torch.randn(9, 5), torch.randn(4, 5), torch.arange(4)
    weights = {"consistency": 0.0, "diversity": 1.0, "svd": 0.0, "non_target_kl": 0.0}
    for head in (WholeLogits(lambda states: states @ W.T), LogitsInBlocks(W)):
        terms = [head.loss(states, None, targets, Objective(top_k=k), weights)[1]["diversity"] for k in (0, None)]
        assert terms[0] == terms[1]


def test_forms_refuse_the_settings_that_the_plain_one_refuses():
    W, states, targets = torch.randn(9, 5), torch.randn(4, 5), torch.arange(4)
    weights = {"consistency": 0.1, "diversity": 0.0, "svd": 0.1, "non_target_kl": 0.0}
    heads = [WholeLogits(lambda states: states @ W.T, is_plain) for is_plain in (True, False)] + [LogitsInBlocks(W)]
    wrong = [(Objective(svd_norm=None), "unknown norm None"), (Objective(consistency="mse"), "'mse' is for classes")]
    for head, (objective, message) in itertools.product(heads, wrong):
        with pytest.raises(ValueError, match=message):
            head.loss(states, states, targets, objective, weights)


def test_masked_logits_are_refused_by_the_lean_spectral_term_too():
    logits = torch.randn(4, 9)
    logits[:, 7:] = torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match="cannot be compared as numbers"):
        lean_svd_share(logits, 2, "nuclear")


def test_weights_stay_beyond_the_last_step_and_a_run_has_a_step():
    objective = NLG_RECIPES["iclr2026"]
    assert lambdas(objective, 150, 100) == lambdas(objective, 200, 100) == lambdas(objective, 100, 100)
    assert lambdas(objective, -10, 100) == lambdas(objective, 0, 100)
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"a run of {steps} steps"):
            lambdas(objective, 0, steps)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.inf])
def test_a_share_outside_0_and_1_is_refused_but_a_rounded_1_is_not(share):
    objective = Objective(lambda1=1.0, adaptive_lambda1=True)
    with pytest.raises(ValueError, match=f"not {share}"):
        lambdas(objective, 0, 1, share)
    assert lambdas(objective, 0, 1, 1 + 1e-6)["consistency"] == pytest.approx(0.1, rel=1e-4)


def test_the_entropy_share_refuses_a_temperature_of_0():
    for share in (entropy_share, LogitsInBlocks(torch.randn(9, 5)).entropy_share):
        with pytest.raises(ValueError, match="temperature is 0"):
            share(torch.randn(4, 5), 0.0)


def test_rows_without_a_target_and_a_consistency_of_classes_are_refused():
    logits, objective = torch.randn(3, 5), NLG_RECIPES["2024"]
    weights = lambdas(objective, 0, 1)
    for loss in (nlg_loss, nlu_loss):
        with pytest.raises(ValueError, match="a target lies outside 0 to 4"):
            loss(logits, logits, torch.tensor([1, -100, 2]), objective, weights)
    with pytest.raises(ValueError, match="consistency 'mse' is for classes"):
        nlg_loss(logits, logits, torch.tensor([1, 0, 2]), NLU_RECIPES["2024"], weights)
    with pytest.raises(ValueError, match="adaptive_lambda1 needs teacher_share"):
        lambdas(Objective(adaptive_lambda1=True), 0, 1)


def test_regression_refuses_other_shapes_and_gives_the_teacher_no_gradient():
    student, teacher = torch.randn(4, 1), torch.randn(4, 1, requires_grad=True)
    weights = lambdas(NLU_RECIPES["2024"], 0, 1)
    for wrong in (
        (student, teacher, torch.randn(4, 1)),
        (student, teacher[:1], torch.randn(4)),
        (student, None, torch.randn(4)),
    ):
        with pytest.raises(ValueError, match="give the same rows"):
            nlu_loss(*wrong, NLU_RECIPES["2024"], weights)
    loss, _ = nlu_loss(student.requires_grad_(), teacher, torch.randn(4), NLU_RECIPES["2024"], weights)
    loss.backward()
    assert teacher.grad is None


def test_the_entropy_share_leaves_masked_entries_out():
    assert entropy_share(torch.tensor([[1.0, 1.0, -torch.inf, -torch.inf]]), 1.0).item() == pytest.approx(0.5)
