"""Write MiniLM's data from GLUE's own files: what it learns, what chooses the rate, and what is measured.

Out of domain are STS-B's pairs from the news for its captions, CoLA's sentences from books that no training sentence is
from, and, because equivalent sentences entail each other, RTE's pairs for MRPC and MRPC's for RTE.
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

Sets = dict[str, list[LabelledText]]  # name of a file -> its rows


def write_data(model: Path, glue: Path, tasks: list[str], out: Path) -> None:
    """Write the files of each task, a key of SETS, into a folder of this name in `out`.

    model: the encoder's folder; glue: GLUE's, with CoLA, MRPC, RTE and STS-B. Raises InputError if `out` has other
    data, or those of another model, on which finished runs may have trained.
    """
    write_rows(out / "model.jsonl", [{"digest": weights_digest(model)}])
    for task in tasks:
        for name, examples in SETS[task](glue).items():
            write_rows(out / task / f"{name}.jsonl", [in_columns(example) for example in examples])


def in_columns(example: LabelledText) -> dict:
    names = ("sentence",) if len(example.texts) == 1 else ("sentence1", "sentence2")
    return dict(zip(names, example.texts, strict=True)) | {"label": example.label}


def stsb_scores(glue: Path) -> Sets:
    """In "wrong", a fifth of the rows have the score of another one."""
    learned, measured = (by_cell(glue / "STS-B" / name, "stsb", 1) for name in ("train.tsv", "dev.tsv"))
    captions, news = "main-captions", "main-news"
    sets = split(glue / "STS-B", learned[captions], measured[captions], measured[news])
    return sets | {"wrong": with_wrong_scores(sets["train"])}


def stsb_classes(glue: Path) -> Sets:
    sets = stsb_scores(glue)
    del sets["wrong"]  # a run draws wrong classes
    return {name: [replace(pair, label=int(pair.label + 0.5)) for pair in pairs] for name, pairs in sets.items()}


def cola(glue: Path) -> Sets:
    learned, measured = (by_cell(glue / "CoLA" / name, "cola", 0) for name in ("train.tsv", "dev.tsv"))
    test, other = ([sentence for source, sentences in measured.items() if (source in learned) == is_known
                    for sentence in sentences] for is_known in (True, False))  # fmt: skip
    return split(glue / "CoLA", [sentence for sentences in learned.values() for sentence in sentences], test, other)


def mrpc(glue: Path) -> Sets:
    return pairs_of(glue / "MRPC", "mrpc", glue / "RTE", "rte")


def rte(glue: Path) -> Sets:
    return pairs_of(glue / "RTE", "rte", glue / "MRPC", "mrpc")


def pairs_of(folder: Path, task: str, other_folder: Path, other_task: str) -> Sets:
    """Return a task's sets, with the other task's pairs out of domain: its class 0 is this one's class 1."""
    learned, measured = (read_labelled(folder / name, TASKS[task])[0] for name in ("train.tsv", "dev.tsv"))
    other = read_labelled(other_folder / "dev.tsv", TASKS[other_task])[0]
    return split(folder, learned, measured, [replace(pair, label=1 - pair.label) for pair in other])


SETS = {"stsb-scores": stsb_scores, "stsb-classes": stsb_classes, "cola": cola, "mrpc": mrpc, "rte": rte}


def by_cell(path: Path, task: str, column: int) -> dict[str, list[LabelledText]]:
    """Return the rows of a TSV file by what is in a column, such as the source."""
    cells = {line: row for line, _, row in rows_of_tsv(path)}
    groups = defaultdict(list)
    for example in read_labelled(path, TASKS[task])[0]:
        groups[cells[example.line][column]].append(example)
    return groups


def split(folder: Path, learned: list[LabelledText], test: list[LabelledText], other: list[LabelledText]) -> Sets:
    """Shuffle the rows, and take the dev set from the learned ones. Raises InputError if there are too few."""
    if len(learned) <= DEV or not test or not other:
        raise InputError(f"{folder}: has {len(learned)} rows to learn from, {len(test)} to measure on and {len(other)} "
                         f"out of domain, but more than {DEV}, 0 and 0 are needed: give GLUE's own files")  # fmt: skip
    rng = np.random.default_rng(0)
    learned, test, other = ([rows[i] for i in rng.permutation(len(rows))] for rows in (learned, test, other))
    return {"train": learned[DEV:], "dev": learned[:DEV], "test": test[:TEST], "other": other[:TEST]}


def with_wrong_scores(pairs: list[LabelledText]) -> list[LabelledText]:
    """Give each of the first fifth of the pairs the score of the one before it, and the first that of the last."""
    count = len(pairs) // 5
    before = [pairs[count - 1], *pairs[: count - 1]]
    return [replace(pair, label=other.label) for pair, other in zip(pairs, before, strict=False)] + pairs[count:]
