"""Measure what a model forgets: its loss on text that it is not trained on, and how far its predictions have moved."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minibalora.base import progress
from minibalora.base.errors import InputError
from minibalora.checkpoints.template import Template
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.batches import Row, check_fits, encode_examples, micro_batches, pack
from minibalora.data.files import has_objects, shards
from minibalora.data.prompts import counts_in_words, read_examples
from minibalora.evaluation.perplexity import text_windows
from minibalora.lowrank import adapted_layers, evaluating, pretrained
from minibalora.models import LanguageModel
from minibalora.regularizers import consistency_kl


def read_retained(
    paths: list[str], fields: tuple[str | None, ...], template: Template, tok: Tokenizer, config: object, length: int
) -> dict[str, list[Row]]:
    """Return the rows of each file of --retain, and print how many are left out. fields: see `read_examples`.

    A file that begins as JSON or Parquet has prompts and responses, of which the responses are predicted. Any other
    file is plain text: its rows are windows of `length` tokens, of which all but the first are predicted.
    """
    retained = {}
    for path in paths:
        if has_objects(shards(path)[0]):
            examples, left_out = read_examples(path, *fields, template=template)
            if any(left_out.values()):
                print(f"retain {path}: left out {counts_in_words(left_out)}")
            rows, _, _ = encode_examples(examples, tok, sys.maxsize)
            check_fits(rows, path, config, length)
        elif tok.is_encoder_decoder:
            raise InputError(f"--retain {path}: plain text, which a T5 does not predict: give prompts and responses")
        else:
            windows = text_windows(Path(path), tok, config, length)
            rows = [Row(np.array(ids, dtype=np.int32), 1, number) for number, ids in enumerate(windows, start=1)]
        retained[path] = rows
    return retained


@torch.no_grad()
def measure_retained(model: LanguageModel, retained: dict[str, list[Row]], batch_size: int) -> dict[str, float]:
    """Return the loss on the rows of each name and, for an adapted model, KL(pre-trained ‖ tuned): means per predicted
    token, in nats."""
    column = {}
    with evaluating(model):
        for name, rows in retained.items():
            sums = torch.stack([
                torch.stack(sums_of(model, part))
                for part in progress.over(micro_batches(rows, batch_size), f"loss on {name}", "batch", delay=2)
            ]).sum(0)  # fmt: skip
            means = (sums / sum(row.predicted for row in rows)).tolist()
            titles = f"loss on {name}", f"KL(pre-trained ‖ tuned) on {name}"
            column |= dict(zip(titles, means, strict=False))
    return column


def sums_of(model: LanguageModel, rows: list[Row]) -> list[torch.Tensor]:
    """Return sums over the predicted tokens: the cross-entropy and, if the model is adapted, the KL."""
    batch = pack(rows, model.embedding.weight.device)
    logits = model.head(batch.states(model)).float()  # (M, V)
    sums = [F.cross_entropy(logits, batch.targets, reduction="sum")]
    if adapted_layers(model):
        with pretrained(model):
            base = model.head(batch.states(model)).float()
        sums.append(len(batch.targets) * consistency_kl(logits, base))
    return sums
