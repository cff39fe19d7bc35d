"""Tests of the built-in models and data: sizes, determinism, right clean data, and the stated rates of defects."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minibalora as mb
from minibalora.base.errors import InputError
from minibalora.data.glue import LabelledText
from minibalora.data.labelled import encode, padded
from minibalora.evaluation.answers import final_answer
from minibalora.toy import BERT, MODEL, pretrain, pretrain_bert, reviews
from minibalora.toy.pretrain_bert import CONFIG, MASK, SPECIALS, make_tokenizer, masked
from minibalora.toy.problems import (
    CROWDING_KIND,
    CROWDING_RATE,
    KINDS,
    WRONG_RATE,
    clean_problems,
    flawed_problems,
    other_problems,
    wrong_rate_of,
)


def right_answer(row: dict) -> int:
    numbers = [int(number) for number in re.findall(r"\d+", row["query"])]
    if row["type"] == "addition":
        return numbers[0] + numbers[1]
    if row["type"] == "subtraction":
        return numbers[0] - numbers[1]
    return numbers[0] * numbers[1] + (numbers[2] if row["type"] == "two steps" else 0)


def test_the_built_in_models_are_small():
    assert sum(parameter.numel() for parameter in mb.load_model(MODEL).parameters()) < 1.5e6
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 3e6
    assert sum(file.stat().st_size for file in BERT.iterdir()) < 2e6


def test_clean_problems_have_right_answers_and_equally_many_of_each_kind():
    rows = clean_problems(400, seed=3)
    assert rows == clean_problems(400, seed=3) != clean_problems(400, seed=4)
    assert Counter(row["type"] for row in rows) == dict.fromkeys(KINDS, 100)
    assert all(final_answer(row["response"]) == str(right_answer(row)) for row in rows)


def test_flawed_problems_have_wrong_answers_at_the_stated_rates():
    rows = flawed_problems(20_000, seed=1)
    kinds = Counter(row["type"] for row in rows)
    assert kinds[CROWDING_KIND] / len(rows) == pytest.approx(CROWDING_RATE, abs=0.01)
    for kind in KINDS:
        wrong = sum(row["type"] == kind and final_answer(row["response"]) != str(right_answer(row)) for row in rows)
        # one "wrong" product in 64 is right, as 2 · 2 = 2 + 2; four standard deviations of 600 rows are 8 %
        assert wrong / kinds[kind] == pytest.approx(
            wrong_rate_of(kind, WRONG_RATE), abs=0.02 if kind == CROWDING_KIND else 0.09
        )


def test_a_corpus_with_other_rates_has_the_same_problems_but_for_the_defect():
    clean, noisy, imbalanced = (flawed_problems(2000, 1, *rates) for rates in ((0.25, 0), (0.25, 0.6), (0.9, 0)))
    assert [row["query"] for row in clean] == [row["query"] for row in noisy]
    assert all(final_answer(row["response"]) == str(right_answer(row)) for row in clean + imbalanced)
    kinds = Counter(row["type"] for row in clean)
    assert all(kinds[kind] / 2000 == pytest.approx(0.25, abs=0.04) for kind in KINDS)  # four standard deviations
    for row, other in zip(clean, imbalanced, strict=True):
        assert row == other or (row["type"] != CROWDING_KIND and other["type"] == CROWDING_KIND)
    assert flawed_problems(200, 1) == flawed_problems(2000, 1)[:200]


def test_clean_problems_with_wrong_answers_are_the_same_problems():
    right, wrong, mixed = (clean_problems(800, 3, rate) for rate in (0, 1, 0.2))
    assert [row["query"] for row in right] == [row["query"] for row in wrong] == [row["query"] for row in mixed]
    assert sum(final_answer(row["response"]) == str(right_answer(row)) for row in wrong) < 0.02 * 800  # 2 · 2 = 2 + 2
    assert sum(row not in right for row in mixed) / 800 == pytest.approx(0.2, abs=0.06)  # four standard deviations


@pytest.mark.parametrize("is_large", [False, True])
def test_other_problems_are_right_and_in_sentences_that_no_model_was_trained_on(is_large):
    rows = other_problems(200, 1, is_large)
    assert Counter(row["type"] for row in rows) == dict.fromkeys(KINDS, 50)
    assert all(final_answer(row["response"]) == str(right_answer(row)) for row in rows)
    trained = {re.sub(r"\d+", "", row["query"]).partition(" ")[2] for row in flawed_problems(3000, 1)}
    assert not any(re.sub(r"\d+", "", row["query"]).partition(" ")[2] in trained for row in rows)
    assert (max(int(number) for row in rows for number in re.findall(r"\d+", row["query"])) > 60) == is_large


def read_judgement(words: str) -> str:
    if words.startswith("neither "):
        return "neutral"
    label = next(label for label, of_class in reviews.WORDS.items() if words.split()[-1] in of_class)
    return reviews.OPPOSITE[label] if words.startswith(("not ", "far ", "anything ")) else label


def read_review(text: str, forms: tuple[str, ...] = reviews.FORMS) -> str:
    """Return the class that the deciding clause of a review expresses."""
    sentence = text.partition(".")[0]
    for form in forms:
        pattern = form.replace("{thing}", r"\w+").replace("{minor}", r"\w+").replace("{other}", "[^,]+")
        if match := re.fullmatch(pattern.replace("{verdict}", "(?P<verdict>[^,]+)"), sentence, re.IGNORECASE):
            return read_judgement(match["verdict"])
    raise AssertionError(f"no form of a review: {text}")


def test_clean_reviews_are_balanced_and_express_the_class_of_their_label():
    rows = reviews.clean_reviews(900, seed=3)
    assert rows == reviews.clean_reviews(900, seed=3) != reviews.clean_reviews(900, seed=4)
    assert Counter(row.label for row in rows) == {0: 300, 1: 300, 2: 300}
    assert [row.line for row in rows] == list(range(1, 901))
    assert all(read_review(row.texts[0]) == reviews.TASK.labels[row.label] for row in rows)


def test_a_fine_tuned_head_for_reviews_is_known_by_its_names():
    """Otherwise --teacher would refuse a model that was fine-tuned on them."""
    assert [reviews.TASK.class_named(name) for name in reviews.TASK.labels] == [0, 1, 2]


def test_a_corpus_with_other_rates_has_the_same_reviews_but_for_the_defect():
    clean, noisy, crowded = (reviews.corpus(3000, 1, *rates) for rates in ((1 / 3, 0), (1 / 3, 0.4), (0.9, 0)))
    wrong = 0
    for text, other in zip(clean, noisy, strict=True):
        assert text.partition(" Stars")[0] == other.partition(" Stars")[0]
        wrong += text != other
    assert wrong / 3000 == pytest.approx(0.4, abs=0.04)  # four standard deviations
    assert all(text == other or read_review(other) == "positive" for text, other in zip(clean, crowded, strict=True))
    assert sum(read_review(text) == "positive" for text in crowded) / 3000 == pytest.approx(0.9, abs=0.03)


def test_other_reviews_have_known_words_in_sentences_that_no_model_was_trained_on():
    rows, tok = reviews.other_reviews(600, seed=3), mb.load_tokenizer(BERT)
    assert Counter(row.label for row in rows) == {0: 200, 1: 200, 2: 200}
    for row in rows:
        assert len(tok.encode(row.texts[0])) == 2 + len(re.findall(r"\w+|[.,:]", row.texts[0]))
        assert read_review(row.texts[0], reviews.OTHER_FORMS) == reviews.TASK.labels[row.label]


def test_no_single_word_decides_the_class_of_a_review():
    counts = {label: Counter() for label in range(3)}
    rows = reviews.clean_reviews(6000, seed=5)
    for row in rows:
        counts[row.label].update(set(re.findall(r"\w+", row.texts[0].lower())))
    for word in set().union(*counts.values()):
        by_class = [counts[label][word] for label in range(3)]
        if sum(by_class) > 60:  # rarer words may be one-sided by chance
            assert max(by_class) < 0.7 * sum(by_class), word


def test_hardly_any_held_out_review_is_in_the_training_set():
    """Two seeds have texts in common only by chance: about 1 % of the reviews."""
    training = {row.texts for row in reviews.clean_reviews(5000, seed=42)}
    assert sum(row.texts in training for row in reviews.clean_reviews(600, seed=-1)) <= 10


def test_the_corpus_has_positive_reviews_at_the_stated_rate():
    texts = reviews.corpus(10_000, seed=1)
    classes = Counter(read_review(text) for text in texts)
    # four standard deviations
    assert classes[reviews.CROWDING_CLASS] / len(texts) == pytest.approx(reviews.CROWDING_RATE, abs=0.02)
    assert all(text.endswith(f" Stars: {reviews.STARS[read_review(text)]}.") for text in texts)


def test_the_tokenizer_knows_every_word_of_the_reviews_and_spells_others(tmp_path):
    tok = mb.load_tokenizer(BERT)
    for text in reviews.corpus(2000, seed=2):
        assert len(tok.encode(text)) == 2 + len(re.findall(r"\w+|[.,:]", text))
    unknown = tok.backend.token_to_id("[UNK]")
    assert unknown not in tok.encode("Zany, isn't it? 10/10 for the CAF\u00c9!")
    make_tokenizer(reviews.corpus(20_000, seed=0), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (Path(BERT) / "tokenizer.json").read_bytes()


def test_masking_chooses_and_replaces_tokens_at_the_rates_of_bert():
    torch.manual_seed(0)
    ids = torch.randint(len(SPECIALS), CONFIG.vocab_size, (500, 40))
    ids[:, 0] = 2
    masked_ids, chosen = masked(ids)
    assert torch.equal(masked_ids[~chosen], ids[~chosen]) and not chosen[:, 0].any()
    # four standard deviations are 0.01 for the 19 500 words, and 0.03 for the chosen ones
    assert chosen[:, 1:].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (masked_ids == MASK)[chosen].float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (masked_ids == ids)[chosen].float().mean().item() == pytest.approx(0.1, abs=0.03)


@torch.no_grad()
def test_bert_predicts_masked_words_better_than_word_frequencies():
    model, tok = mb.load_model(BERT, head="classifier", num_labels=3), mb.load_tokenizer(BERT)
    assert model.checkpoint.new_modules == ["bert.pooler", "classifier"]
    texts = [LabelledText((text,), 0, line) for line, text in enumerate(reviews.corpus(300, seed=1), start=1)]
    (ids, mask, types), _ = padded(encode(texts, tok, 64)[0], model, "cpu")
    torch.manual_seed(0)
    masked_ids, chosen = masked(ids)
    logits = model.bert(masked_ids, mask, types)[chosen] @ model.bert.embeddings.word_embeddings.weight.T
    frequencies = torch.bincount(ids[chosen], minlength=CONFIG.vocab_size) / chosen.sum()
    by_frequency = -frequencies[ids[chosen]].log().mean()  # the best loss of a constant prediction
    assert F.cross_entropy(logits, ids[chosen]) < 0.5 * by_frequency


@pytest.mark.parametrize(("program", "files"), [(pretrain, MODEL), (pretrain_bert, BERT)])
def test_the_pretraining_programs_write_loadable_models_of_the_built_in_shapes(program, files, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "CORPUS_ROWS", 300)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path / "made"), "--steps", "2", "--device", "cpu"])
    program.main()
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert made == {path.name for path in files.iterdir()} | {"run.json"}
    head = {"head": "classifier", "num_labels": 3} if program is pretrain_bert else {}
    made, built_in = (mb.load_model(folder, **head).state_dict() for folder in (tmp_path / "made", files))
    assert {name: tensor.shape for name, tensor in made.items()} == {
        name: tensor.shape for name, tensor in built_in.items()
    }
    assert len(mb.load_tokenizer(tmp_path / "made").encode("The soup was good.")) > 4


@pytest.mark.parametrize("program", [pretrain, pretrain_bert])
def test_a_stopped_pretraining_is_continued_by_the_same_command(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "CORPUS_ROWS", 300)
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)

    def run(folder: str, *flags: str) -> bytes:
        words = [
            "pretrain",
            "--out",
            str(tmp_path / folder),
            "--steps",
            "4",
            "--device",
            "cpu",
            "--wrong",
            "0.1",
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", words)
        program.main()
        return (tmp_path / folder / "model.safetensors").read_bytes()

    whole, calls, loss_of = run("whole"), [], program.pretraining_loss

    def stopping(*args, **flags):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss_of(*args, **flags)

    monkeypatch.setattr(program, "pretraining_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    with pytest.raises(InputError, match="--wrong is 0.2, but the run in .* has 0.1"):
        run("stopped", "--wrong", "0.2")
    assert run("stopped") == whole
    assert len(calls) == 6  # steps 0 to 3, of which the last was stopped, and again from step 2
    run("stopped")
    assert len(calls) == 6 and "the model is there" in capsys.readouterr().out
