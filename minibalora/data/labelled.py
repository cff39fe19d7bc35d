"""From labelled texts to batches: tokens, padding, labels."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.glue import LabelledText


@dataclass(frozen=True)
class ClassRow:
    """A tokenised example; `index` is its place among the rows, `line` that in its file."""

    ids: np.ndarray
    token_types: np.ndarray
    label: int | float
    index: int
    line: int

    predicted = 1  # what a step's mean counts of it, as `Row.predicted`


def encode(examples: list[LabelledText], tok: Tokenizer, max_length: int) -> tuple[list[ClassRow], int]:
    """The examples' rows, in order, and how many of them were cut to max_length tokens."""
    encoded, cut = tok.encode_labelled([example.texts for example in examples], max_length)
    rows = [
        ClassRow(np.array(ids, np.int32), np.array(types, np.int32), example.label, index, example.line)
        for index, (example, (ids, types)) in enumerate(zip(examples, encoded, strict=True))
    ]
    return rows, cut


def padded(rows: list[ClassRow], model: nn.Module, device: torch.device | str) -> tuple[tuple[Tensor, ...], Tensor]:
    """The model's arguments, each (N, T) and padded on the right with 0, and the labels (N,).

    Arguments are ids and attention mask, and token types for a model that has more than one.
    """
    width = max(len(row.ids) for row in rows)
    arrays = np.zeros((3, len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        arrays[0, index, : len(row.ids)] = row.ids
        arrays[1, index, : len(row.ids)] = 1
        arrays[2, index, : len(row.ids)] = row.token_types
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    inputs = tuple(torch.from_numpy(array).to(device) for array in (arrays if has_types else arrays[:2]))
    return inputs, torch.tensor([row.label for row in rows], device=device)
