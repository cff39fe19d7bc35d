"""Write MiniLM's data from GLUE's own files: what it learns, what chooses the rate, and what is measured.

Out of domain are STS-B's pairs from the news for its captions, CoLA's sentences from publications that no training
sentence is from, RTE's pairs for MRPC, and MRPC's for RTE. The labels of the last two agree only in part: equivalent
sentences entail each other, but a sentence often entails another one that is not equivalent.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from minibalora.base.errors import InputError
from minibalora.checkpoints.weights import weights_digest
from minibalora.data.files import rows_of_tsv
from minibalora.data.glue import TASKS, LabelledText, read_labelled
from minibalora.lab.data import DEV, TEST, write_rows

Sets = dict[str, list[LabelledText]]  # by the names of their files
FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B"}


def write_glue_data(model: Path, glue: Path, tasks: list[str], out: Path) -> None:
    """Write the files of each task, a key of READERS, into a folder of this name in `out`.

    model: the encoder's folder; glue: GLUE's, with those in FOLDERS. Raises InputError if `out` has other data, or
    those of another model, on which finished runs may have trained.
    """
    write_rows(out / "model.jsonl", [{"digest": weights_digest(model)}])
    for task in tasks:
        for name, examples in READERS[task](glue).items():
            write_rows(out / task / f"{name}.jsonl", [in_columns(example) for example in examples])


def in_columns(example: LabelledText) -> dict:
    names = ("sentence",) if len(example.texts) == 1 else ("sentence1", "sentence2")
    return dict(zip(names, example.texts, strict=True)) | {"label": example.label}


def stsb_scores(glue: Path) -> Sets:
    """Return STS-B's captions and news. In "wrong", a fifth of the training pairs have the score of another one."""
    learned, measured = (by_column(glue, "stsb", name, "genre") for name in ("train.tsv", "dev.tsv"))
    captions, news = "main-captions", "main-news"
    sets = split(glue / FOLDERS["stsb"], learned[captions], measured[captions], measured[news])
    return sets | {"wrong": with_wrong_scores(sets["train"])}


def stsb_classes(glue: Path) -> Sets:
    """Return the same pairs with their scores rounded to classes, without "wrong": a run draws wrong classes."""
    sets = stsb_scores(glue)
    del sets["wrong"]
    return {name: [replace(pair, label=int(pair.label + 0.5)) for pair in pairs] for name, pairs in sets.items()}


def cola(glue: Path) -> Sets:
    """Return CoLA's sentences; "other" has those of dev.tsv from sources that train.tsv lacks."""
    learned, measured = (by_column(glue, "cola", name, "source") for name in ("train.tsv", "dev.tsv"))
    every = [sentence for sentences in learned.values() for sentence in sentences]
    known = [sentence for source in measured if source in learned for sentence in measured[source]]
    unknown = [sentence for source in measured if source not in learned for sentence in measured[source]]
    return split(glue / FOLDERS["cola"], every, known, unknown)


def mrpc(glue: Path) -> Sets:
    return pairs_of(glue, "mrpc", "rte")


def rte(glue: Path) -> Sets:
    return pairs_of(glue, "rte", "mrpc")


READERS = {"stsb-scores": stsb_scores, "stsb-classes": stsb_classes, "mrpc": mrpc, "cola": cola, "rte": rte}


def pairs_of(glue: Path, task: str, other: str) -> Sets:
    """Return a task's pairs and, out of domain, those of the other one. Their classes have the opposite order."""
    learned, measured = (labelled_rows(glue, task, name) for name in ("train.tsv", "dev.tsv"))
    swapped = [replace(pair, label=1 - pair.label) for pair in labelled_rows(glue, other, "dev.tsv")]
    return split(glue / FOLDERS[task], learned, measured, swapped)


def labelled_rows(glue: Path, task: str, name: str) -> list[LabelledText]:
    """Return the rows of a task's file. Raises InputError if some have no label."""
    path = glue / FOLDERS[task] / name
    examples, skipped, _ = read_labelled(path, TASKS[task])
    if skipped:
        raise InputError(f"{path}: {skipped:,} rows have no label: give GLUE's own file")
    return examples


def by_column(glue: Path, task: str, name: str, column: str) -> dict[str, list[LabelledText]]:
    """Return the rows of a task's file by what they have in a column. Raises InputError if there is no such column."""
    path = glue / FOLDERS[task] / name
    cells = {line: row for line, _, row in rows_of_tsv(path)}
    first = next(iter(cells.values()), [])
    header = TASKS[task].header or first
    if column not in header or len(first) != len(header):
        raise InputError(f"{path}: has no column {column!r}: give GLUE's own file")
    groups = defaultdict(list)
    for example in labelled_rows(glue, task, name):
        groups[cells[example.line][header.index(column)]].append(example)
    return groups


def split(folder: Path, learned: list[LabelledText], test: list[LabelledText], other: list[LabelledText]) -> Sets:
    """Shuffle the rows, and take the dev set from the learned ones. Raises InputError if there are too few."""
    uses = {"learn from": (learned, DEV), "measure on": (test, 0), "measure on out of domain": (other, 0)}
    for use, (rows, least) in uses.items():
        if len(rows) <= least:
            raise InputError(f"{folder}: has {len(rows)} rows to {use}, but more than {least} are needed: give GLUE's "
                             "own files")  # fmt: skip
    rng = np.random.default_rng(0)
    learned, test, other = ([rows[i] for i in rng.permutation(len(rows))] for rows in (learned, test, other))
    return {"train": learned[DEV:], "dev": learned[:DEV], "test": test[:TEST], "other": other[:TEST]}


def with_wrong_scores(pairs: list[LabelledText]) -> list[LabelledText]:
    """Return the pairs with the scores of the first fifth of them moved by one place, the last to the first."""
    count = len(pairs) // 5
    changed, others = pairs[:count], pairs[:count][-1:] + pairs[:count][:-1]
    return [replace(pair, label=other.label) for pair, other in zip(changed, others, strict=True)] + pairs[count:]
