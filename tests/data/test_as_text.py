"""Classification as text: T5's own questions and words, and its own logits for them."""

import pytest
import torch
from helpers import GOLDEN, golden_example

import minibalora as mb
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.as_text import first_tokens, questions, words_of
from minibalora.data.glue import TASKS, LabelledText, Task
from minibalora.models.t5 import AsText
from minibalora.toy import MODEL

# arXiv 1910.10683, appendix D
ASKED = {
    "cola": ("cola sentence: a", ["unacceptable", "acceptable"]),
    "sst2": ("sst2 sentence: a", ["negative", "positive"]),
    "mrpc": ("mrpc sentence1: a sentence2: b", ["not_equivalent", "equivalent"]),
    "qqp": ("qqp question1: a question2: b", ["not_duplicate", "duplicate"]),
    "mnli": ("mnli hypothesis: b premise: a", ["entailment", "neutral", "contradiction"]),
    "qnli": ("qnli question: a sentence: b", ["entailment", "not_entailment"]),
    "rte": ("rte sentence1: a sentence2: b", ["entailment", "not_entailment"]),
}


class Letters:
    """A tokenizer whose tokens are letters."""

    is_encoder_decoder = True

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        return [list(map(ord, text)) for text in texts]


@pytest.mark.parametrize("name", ASKED)
def test_questions_and_words_are_those_that_t5_was_trained_on(name):
    task = TASKS[name]
    texts = ("a", "b")[: len(task.columns[0]) - 1]
    (asked,) = questions([LabelledText(texts, 1, 7)], task)
    assert (asked.texts, asked.label, asked.line) == ((ASKED[name][0],), 1, 7)
    assert list(words_of(task)) == ASKED[name][1]


def test_braces_in_a_text_are_a_text():
    (asked,) = questions([LabelledText(("{0} {x} {",), 0, 1)], TASKS["sst2"])
    assert asked.texts == ("sst2 sentence: {0} {x} {",)


def test_classes_are_told_apart_by_the_first_token_of_their_words(refuses):
    task = Task("custom", (("text", "label"),), ("good", "bad", "awful"), ("accuracy",))
    assert first_tokens(task, Letters()) == list(map(ord, "gba"))
    twins = Task("custom", (("text", "label"),), ("good", "great"), ("accuracy",))
    refuses(lambda: first_tokens(twins, Letters()), "good", "another class:")


def test_a_decoder_is_refused(refuses):
    tok = mb.load_tokenizer(MODEL)
    assert isinstance(tok, Tokenizer)
    refuses(lambda: first_tokens(TASKS["sst2"], tok), "--as-text", "T5")


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
@torch.no_grad()
def test_logits_are_the_language_models_for_the_first_token(name):
    """test_t5.py compares those with transformers'."""
    ids, mask, _, _ = golden_example(name)
    model, tokens = mb.load_model(GOLDEN / name), [7, 3, 50]
    start = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    expected = model(ids, mask, start)[:, 0, tokens]
    asked = AsText(model, tokens)
    assert torch.allclose(asked(ids, mask), expected, atol=1e-6)
    assert torch.equal(asked.head(asked.features(ids, mask)), asked(ids, mask))
    assert (asked.num_labels, asked.config, asked.own_head) == (3, model.config, [])
    assert asked.t5 is model and asked.checkpoint is model.checkpoint
