"""Classifiers: padding, answers in row order, and every number in the table."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import minibalora as mb
from minibalora.data import labelled
from minibalora.data.glue import TASKS, LabelledText, custom_task
from minibalora.data.labelled import ClassRow
from minibalora.evaluation import class_scoring, metrics


def random_rows(lengths, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        ClassRow(
            rng.integers(4, 61, length).astype(np.int32),
            (np.arange(length) > length // 2).astype(np.int32),
            int(rng.integers(classes)),
            index,
            index + 1,
        )
        for index, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def bert():
    return mb.load_model(GOLDEN / "bert", head="classifier")


def rows_of_labels(labels):
    return [replace(row, label=label) for row, label in zip(random_rows([2] * len(labels)), labels, strict=True)]


def one_hot(predicted, classes):
    return torch.eye(classes)[torch.tensor(predicted)]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_batch_is_padded_on_the_right_and_its_mask_counts_the_tokens(bert, lengths):
    rows = random_rows(lengths)
    (ids, mask, types), labels = labelled.padded(rows, bert, "cpu")
    assert ids.shape == mask.shape == types.shape == (len(rows), max(lengths)) and ids.dtype == torch.int64
    assert mask.sum(1).tolist() == lengths and labels.tolist() == [row.label for row in rows]
    assert (mask.diff(dim=1) <= 0).all() and not ids[mask == 0].any() and not types[mask == 0].any()
    for row, row_ids, row_types in zip(rows, ids, types, strict=True):
        assert row_ids[: len(row.ids)].tolist() == row.ids.tolist()
        assert row_types[: len(row.ids)].tolist() == row.token_types.tolist()


@pytest.mark.parametrize(("name", "arguments"), [
    ("bert", 3), ("bert_relu", 3), ("roberta", 2), ("deberta", 2), ("gpt2_classifier", 2), ("llama_classifier", 2),
])  # fmt: skip
def test_token_types_go_only_to_a_model_that_has_more_than_one(name, arguments):
    model = mb.load_model(GOLDEN / name, head="classifier")
    inputs, _ = labelled.padded(random_rows([3, 5]), model, "cpu")
    assert len(inputs) == arguments
    assert model(*inputs).shape == (2, model.num_labels)


def test_labels_are_integers_for_classes_and_floats_for_scores(bert):
    assert labelled.padded(rows_of_labels([2, 0]), bert, "cpu")[1].dtype == torch.int64
    assert labelled.padded(rows_of_labels([2.0, 0.5]), bert, "cpu")[1].is_floating_point()


def test_rows_keep_order_texts_labels_and_lines_and_cut_texts_are_counted():
    class Words:
        def encode_labelled(self, texts, max_length):
            ids = [[len(word) for text in pair for word in text.split()] for pair in texts]
            return [(part[:max_length], [0] * len(part[:max_length])) for part in ids], sum(
                len(part) > max_length for part in ids
            )

    examples = [LabelledText(("a bb ccc",), 1, 7), LabelledText(("dddd", "a"), 0, 3)]
    rows, cut = labelled.encode(examples, Words(), 2)
    assert [row.ids.tolist() for row in rows] == [[1, 2], [4, 1]] and cut == 1
    assert [(row.label, row.index, row.line) for row in rows] == [(1, 0, 7), (0, 1, 3)]


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), size=st.integers(1, 10), seed=st.integers(0, 9))
def test_answers_come_in_the_rows_order_whatever_the_batch_size(bert, lengths, size, seed):
    """Equal up to float32 rounding: padding changes only the order of summation."""
    rows = random_rows(lengths, seed=seed)
    for part, width in ((None, 3), (bert.features, 24)):
        expected = torch.cat([(part or bert)(*labelled.padded([row], bert, "cpu")[0]) for row in rows]).detach()
        got = class_scoring.answers(bert, rows, size, "cpu", part=part)
        assert got.shape == (len(rows), width)
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_float32_without_dropout_or_gradient_and_the_mode_is_restored(is_training, dtype):
    model = mb.load_model(GOLDEN / "bert", head="classifier", dtype=dtype).train(is_training)
    rows = random_rows([4, 7, 2])
    first, second = (class_scoring.answers(model, rows, 2, "cpu") for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32 and not first.requires_grad
    assert model.training == is_training


def test_scores_of_a_task_are_its_metrics_accuracy_recalls_and_ranks():
    gold, predicted = [0, 1, 1, 0, 1], [0, 1, 0, 1, 1]
    scores = class_scoring.class_scores(one_hot(predicted, 2), rows_of_labels(gold), TASKS["mrpc"], False, batch_size=5)
    assert list(scores) == [
        "accuracy", "f1", "recall of 0", "recall of 1", "rank of batch logits", "effective rank of them",
    ]  # fmt: skip
    assert scores["accuracy"] == 3 / 5 and scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["recall of 0"] == 1 / 2 and scores["recall of 1"] == pytest.approx(2 / 3)


def test_a_tasks_metric_is_computed_by_metrics_py():
    gold, predicted = [0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1]
    scores = class_scoring.class_scores(one_hot(predicted, 2), rows_of_labels(gold), TASKS["cola"], False, batch_size=4)
    assert scores["matthews"] == metrics.matthews(predicted, gold)
    assert list(scores)[:2] == ["matthews", "accuracy"]


def test_ranks_are_means_over_batches_of_consecutive_rows():
    """Two batches: rank 1 with one singular value, rank 2 with two equal ones."""
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    scores = class_scoring.class_scores(logits, rows_of_labels([0, 0, 0, 1]), TASKS["sst2"], False, batch_size=2)
    assert scores["rank of batch logits"] == 1.5 and scores["effective rank of them"] == pytest.approx(1.5)
    together = class_scoring.class_scores(logits, rows_of_labels([0, 0, 0, 1]), TASKS["sst2"], False, batch_size=4)
    assert together["rank of batch logits"] == 2


def test_folded_labels_are_compared_with_folded_predictions():
    gold, predicted = [0, 1, 1, 0], [0, 1, 2, 2]
    scores = class_scoring.class_scores(one_hot(predicted, 3), rows_of_labels(gold), TASKS["mnli"], True, batch_size=4)
    assert scores["accuracy"] == 3 / 4
    assert scores["recall of entailment"] == 1 / 2 and scores["recall of not entailment"] == 1
    assert "recall of neutral" not in scores


def test_the_recall_of_a_class_without_examples_is_nan():
    scores = class_scoring.class_scores(one_hot([2, 0], 3), rows_of_labels([2, 2]), TASKS["mnli"], False, batch_size=2)
    assert math.isnan(scores["recall of entailment"]) and math.isnan(scores["recall of neutral"])
    assert scores["recall of contradiction"] == 1 / 2 and scores["accuracy"] == 1 / 2


def test_scores_of_a_regression_are_only_correlations():
    gold, predicted = [0.5, 2.0, 5.0, 3.5], [0.1, 3.0, 4.0, 2.5]
    scores = class_scoring.class_scores(torch.tensor(predicted)[:, None], rows_of_labels(gold), TASKS["stsb"], False, 2)
    assert list(scores) == ["pearson", "spearman"]
    assert scores["pearson"] == pytest.approx(np.corrcoef(predicted, gold)[0, 1], abs=1e-6)
    assert scores["spearman"] == pytest.approx(metrics.spearman(predicted, gold))


def test_a_constant_regression_has_no_correlation_and_no_dev_metric():
    scores = class_scoring.class_scores(torch.ones(3, 1), rows_of_labels([1.0, 2.0, 3.0]), TASKS["stsb"], False, 2)
    assert math.isnan(scores["pearson"]) and math.isnan(class_scoring.dev_metric(scores, TASKS["stsb"]))


@pytest.mark.parametrize(("task", "scores", "expected"), [
    ("mrpc", {"accuracy": 0.5, "f1": 0.8, "recall of 0": 0.0}, 0.65),
    ("stsb", {"pearson": 0.25, "spearman": 0.75}, 0.5),
    ("cola", {"matthews": -0.5, "accuracy": 1.0}, -0.5),
    ("mnli", {"accuracy": 0.75, "recall of neutral": 0.0}, 0.75),
])  # fmt: skip
def test_the_best_epoch_is_chosen_by_the_mean_of_glues_metrics(task, scores, expected):
    assert class_scoring.dev_metric(scores, TASKS[task]) == pytest.approx(expected)


def test_a_custom_task_is_chosen_by_accuracy(tmp_path):
    (tmp_path / "data.tsv").write_text("text\tkind\na\tham\nb\tspam\n")
    task = custom_task(tmp_path / "data.tsv", ["text"], "kind")
    scores = class_scoring.class_scores(one_hot([0, 1], 2), rows_of_labels([0, 0]), task, False, 2)
    assert class_scoring.dev_metric(scores, task) == scores["accuracy"] == 0.5
