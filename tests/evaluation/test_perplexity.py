"""Loss, perplexity and KL on text, compared with plain sums over the logits of the built-in model."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import stretch

import minibalora as mb
from minibalora.data.batches import encode_examples
from minibalora.data.prompts import example_from
from minibalora.evaluation.perplexity import mean_loss, mean_predictions, predict, text_windows, whole_text
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

EXAMPLES = [example_from(row, line) for line, row in enumerate(clean_problems(12, seed=5), start=1)]
TEXT = "".join(example.prompt + example.response + "\n" for example in EXAMPLES)


@pytest.fixture(scope="module")
def toy():
    return mb.load_model(MODEL), mb.load_tokenizer(MODEL)


def test_mean_loss_is_per_token_whatever_the_batch(toy):
    model, tok = toy
    rows, _, _ = encode_examples(EXAMPLES, tok, 512)
    with torch.no_grad():
        logits = [model(torch.from_numpy(row.ids).long()[None])[0].log_softmax(-1) for row in rows]
    for taken in (rows, whole_text(rows)):
        picked = [
            -log_p[t - 1, row.ids[t]].item()
            for row, log_p in zip(taken, logits, strict=True)
            for t in range(row.prompt_length, len(row.ids))
        ]
        for batch_size in (1, 5, 12):
            assert mean_loss(model, taken, batch_size) == pytest.approx(sum(picked) / len(picked), rel=1e-4)


def test_windows_cover_the_text_once_and_begin_with_bos(toy, tmp_path):
    model, tok = toy
    config = replace(model.config, max_position_embeddings=10_000)
    (tmp_path / "text.txt").write_text(TEXT)
    ids = tok.encode_responses([TEXT])[0]
    for length in (2, 7, 100, 10_000):
        windows = text_windows(tmp_path / "text.txt", tok, config, length)
        assert all(window[0] == tok.bos_id and len(window) <= length for window in windows)
        assert [token for window in windows for token in window[1:]] == ids
    assert len(text_windows(tmp_path / "text.txt", tok, config, 100, limit=3)) == 3


def test_a_byte_order_mark_is_no_text(toy, tmp_path):
    model, tok = toy
    windows = []
    for name, mark in [("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")]:
        (tmp_path / name).write_bytes(mark + TEXT.encode())
        windows.append(text_windows(tmp_path / name, tok, model.config, 100))
    assert windows[0] == windows[1]


def test_predictions_equal_plain_sums_for_the_base_and_the_tuned_model(toy):
    _, tok = toy
    base, model = mb.load_model(MODEL), mb.adapt(mb.load_model(MODEL), rank=4)
    stretch(model)
    ids = tok.encode(EXAMPLES[0].prompt)
    result = predict(model, ids)
    with torch.no_grad():
        log_p, log_f = (m(torch.tensor([ids]))[0, :-1].double().log_softmax(-1) for m in (base, model))
    targets = torch.tensor(ids[1:])[:, None]
    assert result["tokens"] == len(ids) - 1
    assert result["loss"] == pytest.approx(-log_f.gather(1, targets).sum().item(), rel=1e-5)
    assert result["base_loss"] == pytest.approx(-log_p.gather(1, targets).sum().item(), rel=1e-5)
    assert result["kl"] == pytest.approx((log_p.exp() * (log_p - log_f)).sum().item(), rel=1e-4)
    assert predict(base, ids) == pytest.approx({"tokens": len(ids) - 1, "loss": result["base_loss"]})


def test_an_untrained_adapter_has_no_kl(toy):
    result = predict(mb.adapt(mb.load_model(MODEL), rank=4), toy[1].encode("Ada has 3 apples."))
    assert result["kl"] == 0 and result["loss"] == result["base_loss"]


def test_means_are_weighted_by_tokens():
    windows = [
        {"tokens": 3, "loss": 6.0, "base_loss": 3.0, "kl": 1.5},
        {"tokens": 1, "loss": 2.0, "base_loss": 5.0, "kl": 0.5},
    ]
    result = mean_predictions([{"window": number} | window for number, window in enumerate(windows)])
    assert result == pytest.approx(
        {"tokens": 4, "loss": 2, "base_loss": 2, "kl": 0.5, "perplexity": math.e**2, "base_perplexity": math.e**2}
    )
    assert math.isfinite(mean_predictions([{"tokens": 1, "loss": 1e6}])["perplexity"])


def test_unreadable_texts_are_refused(toy, tmp_path, refuses):
    model, tok = toy
    for content, words in [(b"", "fewer than two tokens"), (b"\xff\xfe\x00", "not valid UTF-8")]:
        (tmp_path / "text.txt").write_bytes(content)
        refuses(lambda: text_windows(tmp_path / "text.txt", tok, model.config, 100), "text.txt", words)
    refuses(lambda: text_windows(tmp_path / "nowhere", tok, model.config, 100), "nowhere")
    refuses(lambda: text_windows(tmp_path, tok, model.config, 100), str(tmp_path))
