"""The laboratory's second experiment: a real encoder, all-MiniLM-L6-v2, and STS-B's pairs of similar sentences.

It learns their score from 0 to 5 and, because two of the three regularizers need classes, this score rounded to one of
six classes. It learns from captions of pictures and videos. Out of domain are pairs from the news.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from minibalora.base.errors import InputError
from minibalora.checkpoints.weights import skeleton, weights_digest
from minibalora.data.files import rows_of_tsv
from minibalora.data.glue import TASKS, LabelledText, read_labelled
from minibalora.lab.data import DEV, TEST, write_rows
from minibalora.lab.grid import NLU_WORDS, ROOT, Size, Sweep, Task, sweeps_of
from minibalora.objective import NLU_RECIPES

NAME = "MiniLM"
WORDS = {  # task -> flags for train_nlu.py
    "stsb-scores": ("--task", "stsb"),
    "stsb-classes": ("--task", "custom", "--text-field", "sentence1", "sentence2", "--label-field", "label"),
}
CELLS = {"stsb-scores": ((NAME, "clean"), (NAME, "wrong")), "stsb-classes": ((NAME, "wrong"),)}
SIZE = Size(CELLS, ("lora", "pissa", "ba-lora iclr2026"), (1, 2, 3, 4))
SECONDS = 105  # of a run, with one on each of two cores of an AMD EPYC


def sweeps_with(model: Path) -> list[Sweep]:
    """Return the sweeps with the encoder in the folder `model`. Raises InputError if there is none."""
    skeleton(model, "classifier")
    pissa = (2.5e-4, 5e-4, 1e-3, 2e-3)
    rates = {"lora": (5e-4, 1e-3, 2e-3, 4e-3), "pissa": pissa, "ba-lora": pissa}
    tasks = {name: Task(name, ROOT / "train_nlu.py", (*NLU_WORDS, *words), model, NAME, NLU_RECIPES, rates, SECONDS)
             for name, words in WORDS.items()}  # fmt: skip
    return sweeps_of(SIZE, tasks)


def write_data(model: Path, stsb: Path, out: Path) -> None:
    """Write the files of both tasks into a folder for each in `out`, from train.tsv and dev.tsv in GLUE's folder of
    STS-B. In wrong.jsonl, a fifth of the rows have the score of another one; wrong classes are drawn by a run.

    Raises InputError if `out` has other data, or those of another model, on which finished runs may have trained.
    """
    write_rows(out / "model.jsonl", [{"digest": weights_digest(model)}])
    captions, _ = captions_and_news(stsb / "train.tsv")
    rng = np.random.default_rng(0)
    captions, test, news = ([pairs[i] for i in rng.permutation(len(pairs))]
                            for pairs in (captions, *captions_and_news(stsb / "dev.tsv")))  # fmt: skip
    sets = {"train": captions[DEV:], "dev": captions[:DEV], "test": test[:TEST], "other": news[:TEST]}
    write_sets(out / "stsb-scores", sets | {"wrong": with_wrong_scores(sets["train"])})
    classes = {name: [replace(pair, label=int(pair.label + 0.5)) for pair in pairs] for name, pairs in sets.items()}
    write_sets(out / "stsb-classes", classes)


def write_sets(folder: Path, sets: dict[str, list[LabelledText]]) -> None:
    for name, pairs in sets.items():
        rows = [{"sentence1": pair.texts[0], "sentence2": pair.texts[1], "label": pair.label} for pair in pairs]
        write_rows(folder / f"{name}.jsonl", rows)


def captions_and_news(path: Path) -> tuple[list[LabelledText], list[LabelledText]]:
    """Return the pairs of two genres from a file of STS-B. Raises InputError if they are too few."""
    pairs = read_labelled(path, TASKS["stsb"])[0]
    cells = {line: row for line, _, row in rows_of_tsv(path)}
    captions, news = ([pair for pair in pairs if f"main-{genre}" in cells[pair.line]] for genre in ("captions", "news"))
    if len(captions) <= DEV or not news:
        raise InputError(f"{path}: {len(captions)} pairs of genre main-captions and {len(news)} of main-news, but more "
                         f"than {DEV} and 0 are needed: give GLUE's own file")  # fmt: skip
    return captions, news


def with_wrong_scores(pairs: list[LabelledText]) -> list[LabelledText]:
    """Give each of the first fifth of the pairs the score of the one before it, and the first that of the last."""
    count = len(pairs) // 5
    before = [pairs[count - 1], *pairs[: count - 1]]
    return [replace(pair, label=other.label) for pair, other in zip(pairs, before, strict=False)] + pairs[count:]
