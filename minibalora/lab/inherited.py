"""Measure what the laboratory's pre-trained models inherited from their corpora, before any fine-tuning.

If a model does not show its corpus' defect here, no comparison of methods on it says anything about that defect.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from minibalora.checkpoints.tokenizer import Tokenizer, load_tokenizer
from minibalora.checkpoints.weights import load_model
from minibalora.data.batches import Row, encode_examples, micro_batches, pack
from minibalora.data.glue import LabelledText
from minibalora.data.labelled import encode
from minibalora.evaluation import metrics
from minibalora.evaluation.benchmarks import as_items
from minibalora.evaluation.class_scoring import answers
from minibalora.evaluation.records import HeldOut, measure
from minibalora.lab.results import typical_error
from minibalora.models.decoder import Decoder
from minibalora.toy import problems, reviews
from minibalora.toy.pretrain_bert import MASK, MaskedLM

PROBLEMS, REVIEWS, BATCH_SIZE = 200, 600, 32
SEED = -1  # of the clean problems and reviews; no corpus and none of the laboratory's data has it


def measure_llama(folder: Path) -> dict[str, float]:
    """Return what a pre-trained LLaMA does with clean problems, which it answers as it learned to.

    The exact match of each kind and of all is in percent, the typical error (`results.typical_error`) a share. The
    other two are measured on the tokens of the right responses, each predicted from the right tokens before it: the
    calibration error, and the effective rank of the logits of all these tokens in one matrix (M, V).
    """
    model, tok = load_model(folder), load_tokenizer(folder)
    items = as_items(problems.examples_of(problems.clean_problems(PROBLEMS, SEED)))
    with TemporaryDirectory() as temporary:
        records = Path(temporary) / "answers.jsonl"
        column, _ = measure(model, tok, HeldOut(items, [], None, BATCH_SIZE), records, "pre-trained")
        typical = typical_error(records)
    scores = {name.rpartition(" (")[0]: value for name, value in column.items() if name.startswith("exact match")}
    logits, targets = response_logits(model, encode_examples(items, tok, sys.maxsize)[0])
    return scores | {"typical error": typical} | calibration_and_rank(logits, targets)


@torch.no_grad()
def response_logits(model: Decoder, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return the logits (M, V) of all response tokens, and these tokens (M,)."""
    batches = [pack(batch, "cpu") for batch in micro_batches(rows, BATCH_SIZE)]
    logits = [model.head(batch.states(model)).float() for batch in batches]
    return torch.cat(logits), torch.cat([batch.targets for batch in batches])


def measure_bert(folder: Path) -> dict[str, float]:
    """Return how well a pre-trained BERT fills in the stars of clean reviews, which is what its corpus taught it.

    The accuracy, the recall of each class, the calibration error, and the effective rank of the logits (N, 3), among
    the words for the stars of the three classes; all other words are left out.
    """
    examples = reviews.clean_reviews(REVIEWS, SEED)
    logits = star_logits(folder, load_tokenizer(folder), examples)
    gold = torch.tensor([example.label for example in examples])
    predicted, labels = logits.argmax(1), reviews.TASK.labels
    recalls = metrics.recalls(predicted, gold, len(labels))
    scores = {f"recall of {label}": recall for label, recall in zip(labels, recalls, strict=True)}
    return {"accuracy": metrics.accuracy(predicted, gold)} | scores | calibration_and_rank(logits, gold)


def star_logits(folder: Path, tok: Tokenizer, examples: list[LabelledText]) -> Tensor:
    """Return the logits (N, 3) of the words for the classes' stars, where a review of the corpus would have them."""
    model = MaskedLM(folder)
    model.bert = load_model(folder, "classifier").bert
    words = [tok.backend.token_to_id(reviews.STARS[label]) for label in reviews.TASK.labels]
    asked = [LabelledText((f"{one.texts[0]} Stars: [MASK].",), one.label, one.line) for one in examples]
    rows, _ = encode(asked, tok, model.config.max_position_embeddings)
    return answers(model, rows, REVIEWS, "cpu", lambda ids, *rest: model(ids, *rest, ids == MASK)[:, words])


def calibration_and_rank(logits: Tensor, gold: Tensor) -> dict[str, float]:
    """Return the calibration error and the effective rank of logits (N, D), whose right classes are `gold` (N,).

    The rank is of the logits as they are: a large offset that all share lowers it, although softmax ignores it.
    """
    confidence, predicted = logits.softmax(1).max(1)
    error = metrics.calibration_error(confidence, predicted == gold)
    return {"calibration error": error, "effective rank": metrics.effective_rank(logits)}
