"""The metrics: values of scikit-learn and SciPy, ranges, and invariances."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from helpers import GOLDEN
from hypothesis import assume, given
from hypothesis import strategies as st

from minibalora.evaluation import metrics
from minibalora.evaluation.metrics import (
    accuracy,
    calibration_error,
    effective_rank,
    f1,
    matthews,
    pass_at_k,
    pearson,
    recalls,
    spearman,
    wilson,
)

EXPECTED = json.loads((GOLDEN / "metrics.json").read_text())
CLASSES = 4
classes = st.integers(0, CLASSES - 1)
class_pairs = st.lists(st.tuples(classes, classes), min_size=1, max_size=40)
tied_scores = st.integers(-20, 20).map(lambda n: n / 4)
score_pairs = st.lists(st.tuples(tied_scores, tied_scores), min_size=2, max_size=30)
spectra = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def both(pairs):
    return (list(side) for side in zip(*pairs, strict=True))


def varied(*sides):
    assume(all(len(set(side)) > 1 for side in sides))


@pytest.mark.parametrize("case", EXPECTED["classification"] + EXPECTED["regression"])
def test_values_equal_those_of_scikit_learn_and_scipy(case):
    for name, expected in case["expected"].items():
        if name == "recalls":
            assert recalls(case["predicted"], case["gold"], len(expected)) == expected
        else:
            expected = math.nan if expected is None else expected
            result = getattr(metrics, name)(case["predicted"], case["gold"])
            assert isinstance(result, float)
            assert result == pytest.approx(expected, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("case", EXPECTED["spectra"])
def test_the_effective_rank_follows_its_definition(case):
    assert effective_rank(case["logits"]) == pytest.approx(case["effective_rank"], rel=1e-12)


# Classes.


@given(class_pairs)
def test_ranges(pairs):
    predicted, gold = both(pairs)
    assert 0 <= accuracy(predicted, gold) <= 1 and 0 <= f1(predicted, gold) <= 1
    assert -1 <= matthews(predicted, gold) <= 1  # exactly: counts are integers
    for k, recall in enumerate(recalls(predicted, gold, CLASSES)):
        assert (recall is None) == (k not in gold) and (recall is None or 0 <= recall <= 1)


@given(st.lists(classes, min_size=1, max_size=40))
def test_a_perfect_prediction_has_the_highest_score(gold):
    assert accuracy(gold, gold) == 1
    assert f1(gold, gold) == (1 if 1 in gold else 0)
    assert matthews(gold, gold) == (1 if len(set(gold)) > 1 else 0)
    assert set(recalls(gold, gold, CLASSES)) <= {1, None}


@given(class_pairs, st.permutations(range(CLASSES)), st.randoms())
def test_matthews_is_invariant_to_class_names_row_order_and_swapped_arguments(pairs, names, random):
    value = matthews(*both(pairs))
    assert matthews(*both([(names[p], names[g]) for p, g in pairs])) == value
    assert matthews(*both([(g, p) for p, g in pairs])) == value
    random.shuffle(pairs)
    assert matthews(*both(pairs)) == value


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_two_classes_have_the_textbook_formulas(pairs):
    predicted, gold = (np.array(side, dtype=int) for side in both(pairs))
    tp, tn = ((predicted == k) @ (gold == k).astype(int) for k in (1, 0))
    fp, fn = (predicted == 1).sum() - tp, (gold == 1).sum() - tp
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(product) if product else 0
    assert matthews(predicted, gold) == pytest.approx(expected, abs=1e-12)
    assert matthews(1 - predicted, gold) == pytest.approx(-expected, abs=1e-12)
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    expected = 2 * precision * recall / (precision + recall) if tp else 0
    assert f1(predicted, gold) == pytest.approx(expected, abs=1e-12)


@given(class_pairs)
def test_accuracy_is_the_mean_of_recalls_weighted_by_rows(pairs):
    predicted, gold = both(pairs)
    weighted = [recall * gold.count(k) for k, recall in enumerate(recalls(predicted, gold, CLASSES)) if recall]
    assert accuracy(predicted, gold) == pytest.approx(sum(weighted) / len(gold))


def test_large_counts_do_not_overflow():
    gold = np.tile(np.array([0, 1], dtype=np.int32), 200_000)
    predicted = gold.copy()
    predicted[:100_000] = 1 - predicted[:100_000]  # a quarter is wrong, of both classes alike
    assert matthews(predicted, gold) == 0.5 and f1(predicted, gold) == 0.75


# Confidence.


def test_the_calibration_error_of_five_predictions():
    confidence, is_right = [0.95, 0.95, 0.85, 0.72, 0.78], [True, False, True, False, True]
    # |1 − 1.90| in the highest bin, |1 − 0.85| below it, and |1 − 1.50| in (0.7, 0.8]: 1.55 of 5 predictions
    assert calibration_error(confidence, is_right) == pytest.approx(0.31)
    # In one bin, the confident error and the doubtful right answers cancel out: |3 − 4.25| / 5.
    assert calibration_error(confidence, is_right, bins=1) == pytest.approx(0.25)


def test_the_upper_edge_belongs_to_a_bin():
    assert calibration_error([0.5, 0.45], [True, False]) == pytest.approx(0.05 / 2)  # both in (0.4, 0.5]: |1 − 0.95|
    assert calibration_error([0.5, 0.55], [False, True]) == pytest.approx((0.5 + 0.45) / 2)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=10))
def test_predictions_that_are_right_as_often_as_they_are_confident_are_calibrated(groups):
    groups = [(count, min(right, count)) for count, right in groups]
    confidence = [right / count for count, right in groups for _ in range(count)]
    is_right = [index < right for count, right in groups for index in range(count)]
    assert calibration_error(confidence, is_right) == pytest.approx(0, abs=1e-12)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.randoms())
def test_the_calibration_error_is_at_least_the_gap_of_the_means_and_has_no_order(pairs, random):
    confidence, is_right = both(pairs)
    error = calibration_error(confidence, is_right)
    assert abs(np.mean(is_right) - np.mean(confidence)) - 1e-12 <= error <= 1
    random.shuffle(pairs)
    assert calibration_error(*both(pairs)) == pytest.approx(error, abs=1e-12)


# Scores.


@given(score_pairs)
def test_correlations_are_in_range_or_undefined(pairs):
    predicted, gold = both(pairs)
    undefined = len(set(predicted)) == 1 or len(set(gold)) == 1
    for metric in (pearson, spearman):
        value = metric(predicted, gold)
        assert math.isnan(value) if undefined else -1 <= value <= 1
        assert metric(gold, predicted) == pytest.approx(value, abs=1e-12, nan_ok=True)


@given(score_pairs, st.floats(0.1, 10), st.floats(-10, 10, allow_subnormal=False))
def test_pearson_is_invariant_to_affine_maps(pairs, scale, shift):
    predicted, gold = both(pairs)
    varied(predicted, gold)
    mapped = np.array(predicted) * scale + shift
    assert pearson(mapped, gold) == pytest.approx(pearson(predicted, gold), abs=1e-9)
    assert pearson(-mapped, gold) == pytest.approx(-pearson(predicted, gold), abs=1e-9)
    assert pearson(mapped, predicted) == pytest.approx(1)


@given(score_pairs)
def test_spearman_is_invariant_to_monotone_maps(pairs):
    predicted, gold = both(pairs)
    varied(predicted, gold)
    assert spearman(np.exp(predicted), gold) == spearman(predicted, gold)
    assert spearman(np.exp(predicted), predicted) == pytest.approx(1)
    assert spearman(-(np.array(predicted) ** 3), predicted) == pytest.approx(-1)


@pytest.mark.parametrize("metric", [pearson, spearman])
@pytest.mark.parametrize("predicted", [[0.1, 0.1, 0.1], [1.0, math.nan, 2.0], [math.nan] * 3])
def test_constant_or_nan_scores_have_no_correlation(metric, predicted):
    assert math.isnan(metric(predicted, [1.0, 2.0, 3.0])) and math.isnan(metric([1.0, 2.0, 3.0], predicted))
    assert math.isnan(metric([1.0], [1.0]))


def test_single_precision_is_widened_first():
    scores = np.array([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 4], dtype=np.float32)
    assert pearson(scores, [0, 1, 2, 4]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [accuracy, f1, matthews, pearson, spearman])
def test_predictions_and_labels_of_different_length_are_a_bug(metric):
    for predicted, gold in (([1], [1, 0]), ([], []), ([[1, 0]], [[1, 0]])):
        with pytest.raises(AssertionError):
            metric(predicted, gold)


# Spectra.


@given(spectra, st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_the_effective_rank_is_in_range_and_invariant_to_scale_and_rotation(sigma, more_rows, seed):
    logits = np.diag(sigma)
    logits = np.concatenate([logits, np.zeros((more_rows, len(sigma)))])
    rank = effective_rank(logits)
    assert 1 - 1e-12 <= rank <= len(sigma) * (1 + 1e-12)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(logits), len(logits))))[0]
    assert effective_rank(-3 * rotation @ logits) == pytest.approx(rank, rel=1e-9)
    assert effective_rank(logits.T) == pytest.approx(rank, rel=1e-9)


def test_the_effective_rank_counts_equal_singular_values():
    assert effective_rank(np.eye(7)[:, :4]) == pytest.approx(4)
    assert effective_rank(np.outer([1, 2, 3], [4, 5])) == pytest.approx(1, abs=1e-12)
    assert effective_rank(np.zeros((3, 2))) == 0


@pytest.mark.parametrize("case", EXPECTED["intervals"])
def test_wilsons_interval_equals_scipys(case):
    result = wilson(case["right"] / case["total"], case["total"])
    assert result == pytest.approx((case["low"], case["high"]), abs=1e-6)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_passing_sample(samples, data):
    passed, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(combinations(range(samples), k))
    expected = sum(any(sample < passed for sample in draw) for draw in draws) / len(draws)
    assert pass_at_k(samples, passed, k) == pytest.approx(expected)
