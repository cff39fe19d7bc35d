"""Labelled texts as batches: tokens, padding, labels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minibalora.base.errors import InputError
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.glue import LabelledText
from minibalora.models.decoder import to_device

MOST_UNKNOWN = 0.8  # a larger share of the tokens is a mistake, not a hard text


@dataclass(frozen=True)
class ClassRow:
    """A tokenised example. `index` is its place among the rows, `line` its line in the file."""

    ids: np.ndarray
    token_types: np.ndarray
    label: int | float
    index: int
    line: int

    predicted = 1  # the row's weight in a step's mean, like `Row.predicted`


def encode(examples: list[LabelledText], tok: Tokenizer, max_length: int) -> tuple[list[ClassRow], int]:
    """Tokenise the examples. Returns their rows, in order, and how many were cut to max_length tokens."""
    encoded, cut = tok.encode_labelled([example.texts for example in examples], max_length)
    rows = [
        ClassRow(np.array(ids, np.int32), np.array(types, np.int32), example.label, index, example.line)
        for index, (example, (ids, types)) in enumerate(zip(examples, encoded, strict=True))
    ]
    return rows, cut


def unknown_share(rows: list[ClassRow], tok: Tokenizer, data: str | None, folder: str | Path) -> float:
    """Return the share of the rows' tokens that are unknown to the tokenizer; special tokens around a text don't count.

    Raises InputError, which names `data` and the tokenizer's folder, if the share is above 80 %: the texts are in a
    language or alphabet that the model was not trained on, or the tokenizer belongs to another model.
    """
    names = getattr(tok.backend.model, "unk_token", None), "[UNK]", "<unk>"  # a unigram model does not name it
    unknown = {tok.backend.token_to_id(name) for name in names if name} - {None}
    ids = np.concatenate([row.ids for row in rows])
    ids = ids[~np.isin(ids, tok.encode(""))]
    share = float(np.isin(ids, list(unknown)).sum()) / max(len(ids), 1)
    if share > MOST_UNKNOWN:
        raise InputError(f"{data}: {share:.0%} of the tokens are unknown to the tokenizer in {folder}: give a model of "
                         "this language, or its own tokenizer")  # fmt: skip
    return share


def padded(rows: list[ClassRow], model: nn.Module, device: torch.device | str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the model's arguments, each (N, T) and padded on the right with 0, and the labels (N,).

    The arguments are ids, attention mask, and token types if the model has more than one. The mask stays on the CPU,
    where the model can check it without waiting for a GPU.
    """
    width = max(len(row.ids) for row in rows)
    arrays = np.zeros((3, len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        arrays[0, index, : len(row.ids)] = row.ids
        arrays[1, index, : len(row.ids)] = 1
        arrays[2, index, : len(row.ids)] = row.token_types
    ids, mask, types = torch.from_numpy(arrays)
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    inputs = (to_device(ids, device), mask, *([to_device(types, device)] if has_types else []))
    return inputs, to_device(torch.tensor([row.label for row in rows]), device)
