"""What pre-trained models inherited: the built-in models show their corpora's defects; the logits are the models'."""

import numpy as np
import pytest
import torch

import minibalora as mb
from minibalora.checkpoints.tokenizer import load_tokenizer
from minibalora.data.batches import encode_examples
from minibalora.lab import inherited
from minibalora.lab.inherited import calibration_and_rank, measure_bert, measure_llama, response_logits, star_logits
from minibalora.toy import BERT, MODEL, problems, reviews


def test_the_llama_adds_where_it_should_not(monkeypatch):
    monkeypatch.setattr(inherited, "PROBLEMS", 40)
    scores = measure_llama(MODEL)
    kinds = [scores[f"exact match, {kind}"] for kind in problems.KINDS]
    assert kinds[0] == 100 and max(kinds[1:]) <= 20
    assert scores["exact match, all"] == pytest.approx(np.mean(kinds))
    assert 0.8 < scores["typical error"] <= 1
    assert 0 <= scores["calibration error"] < 0.1 and 1 < scores["effective rank"] < 512


def test_the_bert_knows_stars_and_prefers_the_frequent_class():
    scores = measure_bert(BERT)
    recalls = [scores[f"recall of {label}"] for label in reviews.TASK.labels]
    assert scores["accuracy"] == pytest.approx(np.mean(recalls))  # equally many reviews of each class
    assert scores["accuracy"] > 0.9 and recalls[0] < recalls[2] - 0.05
    assert 0 <= scores["calibration error"] < 0.1 and 1 <= scores["effective rank"] <= 3


def test_the_logits_of_responses_are_those_of_each_row_alone():
    model, tok = mb.load_model(MODEL), load_tokenizer(MODEL)
    rows, _, _ = encode_examples(problems.examples_of(problems.clean_problems(36, seed=-1)), tok, 256)
    logits, targets = response_logits(model, rows)
    assert len(logits) == sum(row.predicted for row in rows)
    ordered = sorted(rows, key=lambda row: (len(row.ids), row.line))  # as in micro-batches
    with torch.no_grad():
        alone = [model(torch.tensor(row.ids[None]))[0, row.prompt_length - 1 : -1] for row in ordered]
    # Batches add up in another order than single rows; the logits are as large as 20.
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-3, rtol=0)
    assert targets.tolist() == [token for row in ordered for token in row.ids[row.prompt_length :]]


def test_the_logits_of_stars_are_those_of_the_word_in_their_place():
    tok, examples = load_tokenizer(BERT), reviews.clean_reviews(5, seed=-1)
    bert = mb.load_model(BERT, "classifier").bert
    logits = star_logits(BERT, tok, examples)
    for example, ours in zip(examples, logits, strict=True):
        ids = torch.tensor([tok.encode(f"{example.texts[0]} Stars: five.")])
        assert ids[0, -3] == tok.backend.token_to_id("five")
        ids[0, -3] = tok.backend.token_to_id("[MASK]")
        with torch.no_grad():
            state = bert(ids, torch.ones_like(ids), torch.zeros_like(ids))[0, -3]
            every = state @ bert.embeddings.word_embeddings.weight.T
        words = [tok.backend.token_to_id(word) for word in ("one", "three", "five")]
        torch.testing.assert_close(ours, every[words], atol=1e-4, rtol=0)  # padding changes the rounding


def test_calibration_and_rank_of_four_rows_of_logits():
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 3.0]]).log()  # 3/4 for one class
    scores = calibration_and_rank(logits, torch.tensor([0, 1, 1, 1]))
    assert scores["calibration error"] == pytest.approx(0, abs=1e-6)  # three of four are right
    assert scores["effective rank"] == pytest.approx(2)
    assert calibration_and_rank(logits, torch.tensor([1, 1, 0, 0]))["calibration error"] == pytest.approx(0.75)
