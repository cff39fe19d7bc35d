"""Tests of the plan's warnings: each is given exactly where the plain formula has no gradient, and its advice works."""

import math
import re
from dataclasses import replace

import pytest
import torch

from minibalora import regularizers as R
from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective
from minibalora.run.term_warnings import nlg_warnings, nlu_warnings

SHARE = Objective(lambda3=0.1, svd_norm="nuclear")


def gradient(term, N, D, *settings) -> float:
    """Return the norm of a term's gradient at random logits (N, D)."""
    Z = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return torch.autograd.grad(term(Z, *settings), Z)[0].norm().item()


def advised(line: str, flag: str, otherwise: int) -> int:
    match = re.search(rf"{flag}(?: and --batch-size of)? (\d+)", line.split(": give ")[1])
    return int(match[1]) if match else otherwise


@pytest.mark.parametrize("D", range(2, 9))
@pytest.mark.parametrize("N", range(1, 8))
def test_the_nuclear_share_of_classes_is_warned_of_where_it_has_no_gradient_and_the_advice_gives_it_one(N, D):
    for k in range(1, 9):
        lines = nlu_warnings(replace(SHARE, svd_k=k), D, N, has_random_teacher=False)
        assert len(lines) == (gradient(R.svd_share, N, D, k) == 0)
        if lines and D > 2:
            ways = [way for way in lines[0].split(", or ") if "lambda" not in way]
            lines[0].index("always -1 with")
            for way in ways:
                way = way if ": give " in way else f": give {way}"
                new = advised(way, "--micro-batch-size", N), advised(way, "--svd-k", k)
                assert gradient(R.svd_share, new[0], D, new[1]) > 0
                assert not nlu_warnings(replace(SHARE, svd_k=new[1]), D, new[0], has_random_teacher=False)


@pytest.mark.parametrize("of_row", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_the_nuclear_share_of_tokens_is_warned_of_where_it_has_no_gradient_and_the_advice_gives_it_one(of_row, rows, k):
    lines = nlg_warnings(replace(SHARE, svd_k=k), rows, [of_row] * 9)
    assert len(lines) == (gradient(R.svd_share, rows * of_row, 50, k) == 0)
    if lines:
        assert f"always -1 with --svd-k {k} and {rows * of_row} response token" in lines[0]
        more = advised(lines[0], "--micro-batch-size", rows)
        assert more * of_row > k >= (more - 1) * of_row
        fewer = advised(lines[0], "--svd-k", 0)
        assert fewer == rows * of_row - 1 and (fewer == 0 or gradient(R.svd_share, rows * of_row, 50, fewer) > 0)


def test_the_frobenius_share_of_one_token_is_constant_and_of_few_tokens_favours_equal_singular_values():
    objective = NLG_RECIPES["iclr2026"]
    assert gradient(R.svd_share, 1, 50, 10, "frobenius") == 0 < gradient(R.svd_share, 8, 50, 10, "frobenius")
    (line,) = nlg_warnings(objective, 1, [1, 1, 1])
    assert line.startswith("frobenius share: always -1 with --svd-k 10 and 1 response token in")
    (line,) = nlg_warnings(objective, 4, [2, 2, 2, 2, 90])
    assert line.startswith(
        "frobenius share: a sum of all singular values with --svd-k 10 and 8 response tokens in most"
    )
    flat, strong = torch.eye(8), torch.diag(torch.tensor([1.0, 1.0, *[0.01] * 6]))
    assert R.svd_share(flat, 10, "frobenius") < R.svd_share(strong, 10, "frobenius")  # as the warning says
    assert R.svd_share(flat, 2, "frobenius") > R.svd_share(strong, 2, "frobenius")  # with the advice
    assert not nlg_warnings(objective, 4, [3] * 9) and not nlg_warnings(objective, 32, [2] * 9 + [1])


def test_two_classes_meet_any_spectral_share_without_a_change_in_answers():
    """Adding a number to each row gives logits of D − 1 directions, and the covariance of two classes 0."""
    (line,) = nlu_warnings(replace(SHARE, svd_k=5), 2, 32, has_random_teacher=False)
    assert "2 classes" in line and line.endswith("which changes no answer: give --lambda3 0")
    for D in (2, 3, 4):
        Z = torch.randn(32, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        shifted = Z - Z.mean(1, keepdim=True)
        assert torch.allclose(Z.softmax(1), shifted.softmax(1))
        assert R.svd_share(shifted, D - 1).item() == pytest.approx(-1) and R.svd_share(Z, D - 1) > -0.9


def test_the_covariance_of_one_row_is_warned_of():
    assert gradient(R.diversity_covariance, 1, 3) == 0 < gradient(R.diversity_covariance, 2, 3)
    assert gradient(R.diversity_covariance, 9, 2) > 0
    objective = Objective(lambda2=0.1)
    (line,) = nlu_warnings(objective, 3, 1, has_random_teacher=False)
    assert line.startswith("covariance: always 0 with 1 row") and line.endswith("of 2 or more, or --lambda2 0")
    assert not nlu_warnings(objective, 3, 2, False) and not nlu_warnings(objective, 2, 9, False)


def test_the_entropy_of_one_logit_is_warned_of():
    assert gradient(R.diversity_entropy, 8, 50, 1) == 0 < gradient(R.diversity_entropy, 8, 50, 2)
    assert nlg_warnings(Objective(lambda2=0.1, top_k=1), 4, [9] * 9) == [
        "entropy: always 0 with --top-k 1, so it changes nothing: give --top-k 2 or more, or --lambda2 0"
    ]
    assert not nlg_warnings(Objective(lambda2=0.1, top_k=2), 4, [9] * 9)


def test_a_new_head_is_warned_of_once_for_each_term_that_asks_the_teacher():
    objective = replace(NLU_RECIPES["2024"], non_target_kl=0.5)
    lines = nlu_warnings(objective, 3, 32, has_random_teacher=True)
    assert [line.partition(":")[0] for line in lines] == ["consistency", "non-target KL"]
    assert lines[0].endswith("or --lambda1 0") and lines[1].endswith("or --non-target-kl 0")
    assert all("give --teacher DIR" in line for line in lines)
    assert not nlu_warnings(objective, 3, 32, has_random_teacher=False)
    assert not nlu_warnings(Objective(), 2, 1, has_random_teacher=True) and not nlg_warnings(Objective(), 1, [1])


def test_published_recipes_are_warned_of_where_their_terms_are_constants():
    new = NLU_RECIPES["iclr2026"]
    assert nlu_warnings(new, 3, 32, has_random_teacher=False) == [
        "nuclear share: always -1 with --svd-k 5 and 3 classes, so it changes nothing: give --svd-k 1, or --lambda3 0"
    ]
    assert len(nlu_warnings(new, 3, 1, has_random_teacher=True)) == 3
    assert [line.partition(":")[0] for line in nlu_warnings(new, 1, 1, has_random_teacher=True)] == ["consistency"]
    assert not nlu_warnings(NLU_RECIPES["2024"], 3, 32, False)  # a sum over N has no norm to be a share of
    assert gradient(R.svd_sum, 1, 3, 5) > 0 and math.isfinite(gradient(R.svd_sum, 32, 2, 5))
    assert (
        not nlg_warnings(NLG_RECIPES["2024"], 4, [100] * 9) and len(nlg_warnings(NLG_RECIPES["2024"], 4, [2] * 9)) == 1
    )
