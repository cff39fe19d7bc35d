"""Greedy decoding, final answers and losses, on the built-in model."""

from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN

import minibalora as mb
from minibalora.data import encode_examples, example_from
from minibalora.evaluate import exact_match, final_answer, mean_loss, scores, whole_text
from minibalora.generate import generate
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

EXAMPLES = [example_from(row, line) for line, row in enumerate(clean_problems(12, seed=5), start=1)]


@pytest.fixture(scope="module")
def toy():
    return mb.load_model(MODEL), mb.load_tokenizer(MODEL)


@torch.no_grad()
def test_a_batch_gives_each_prompt_the_text_that_it_gives_alone_and_without_a_cache(toy):
    model, tok = toy
    prompts = [example.prompt for example in EXAMPLES]
    assert len({len(ids) for ids in tok.encode_prompts(prompts)}) > 3
    together = generate(model, tok, prompts, max_new_tokens=40)
    assert [generate(model, tok, [prompt], max_new_tokens=40)[0] for prompt in prompts] == together
    ids = tok.encode(prompts[0])
    for _ in range(40):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == tok.eos_id:
            break
    assert tok.decode(ids[len(tok.encode(prompts[0])) :]) == together[0]


def test_generation_stops_at_the_limit(toy):
    model, tok = toy
    (text,) = generate(model, tok, [EXAMPLES[0].prompt], max_new_tokens=3)
    assert len(tok.encode_responses([text])[0]) == 3


@pytest.mark.parametrize(
    "text, answer",
    [
        ("7 + 5 = 12\n#### 12\nThe answer is: 12", "12"),
        ("The answer is: 3\nThe answer is: 1,200.", "1200"),
        ("so we get\n#### -7 ", "-7"),
        ("The answer is: 5\nand more", "5"),
        ("twelve", None),
        ("The answer is:", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_exact_match_counts_right_answers_by_kind(toy, monkeypatch):
    replies = iter(["The answer is: 5", "The answer is: 6", "no idea", "The answer is: 8"])
    monkeypatch.setattr("minibalora.evaluate.generate", lambda model, tok, prompts, n: [next(replies) for _ in prompts])
    rows = [("q1", "5", "a"), ("q2", "6", "b"), ("q3", "7", "b"), ("q4", "9", "b")]
    examples = [
        example_from({"query": q, "response": f"The answer is: {answer}", "type": kind}, 1) for q, answer, kind in rows
    ]
    examples.append(example_from({"query": "q5", "response": "no final answer"}, 1))
    assert exact_match(*toy, examples, max_new_tokens=9, batch_size=3) == {"a": (1, 1), "b": (1, 3)}


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


def test_scores_restore_the_mode_and_name_every_kind(toy):
    model, tok = toy
    model.train()
    column = scores(model, tok, EXAMPLES, EXAMPLES[:2], 4)
    assert model.training
    model.eval()
    assert len([name for name in column if name.startswith("exact match")]) == 5
    assert list(column)[-1] == "loss on pre-training text"


@pytest.mark.parametrize(("prompt_tokens", "generated"), [(10, 5), (38, 2), (39, 1)])
def test_generation_ends_at_the_last_learned_position(prompt_tokens, generated):
    """GPT-2's golden checkpoint has 40 of them."""
    tok = SimpleNamespace(encode_prompts=lambda texts: [[5] * prompt_tokens], eos_id=None, decode=list)
    (ids,) = generate(mb.load_model(GOLDEN / "gpt2"), tok, ["a prompt"], max_new_tokens=5)
    assert len(ids) == generated


def test_a_prompt_that_fills_all_learned_positions_is_refused(refuses):
    tok = SimpleNamespace(encode_prompts=lambda texts: [[5] * 40], eos_id=None, decode=list)
    refuses(lambda: generate(mb.load_model(GOLDEN / "gpt2"), tok, ["a prompt"], 5), "40 tokens", "40 positions")
