"""The laboratory's second experiment: a real model, all-MiniLM-L6-v2, and STS-B's pairs of similar sentences.

Its task is a score from 0 to 5, or, because two of the three regularizers say nothing about a score, this score rounded
to one of six classes. It learns from captions of pictures. Out of domain are pairs from the news.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from minibalora.checkpoints.weights import skeleton
from minibalora.data.files import rows_of_tsv
from minibalora.data.glue import TASKS, LabelledText, read_labelled
from minibalora.lab.data import DEV, TEST, write_rows
from minibalora.lab.grid import CLASSIFY, QUICK, ROOT, Size, Sweep, Task, rates_of, sweeps_of
from minibalora.objective import NLU_RECIPES

NAME = "MiniLM"
CELLS = ((NAME, "clean"), (NAME, "wrong"))
SEEDS = (1, 2, 3, 4)
SIZES = (Size({"scores": CELLS}, ("full", *QUICK.arms), SEEDS), Size({"classes": CELLS}, QUICK.arms, SEEDS))
WORDS = {"scores": ("stsb",), "classes": ("custom", "--text-field", "sentence1", "sentence2", "--label-field", "label")}
SECONDS = 105  # of a run


def sweeps_with(model: Path) -> list[Sweep]:
    """Return the sweeps with the MiniLM in the folder `model`. Raises InputError if there is no such model."""
    skeleton(model, "classifier")
    rates = rates_of((1e-4, 2e-4, 4e-4), (5e-4, 1e-3, 2e-3, 4e-3), (2.5e-4, 5e-4, 1e-3, 2e-3))
    tasks = {name: Task(name, ROOT / "train_nlu.py", (*CLASSIFY, *words), model, NLU_RECIPES, rates, SECONDS)
             for name, words in WORDS.items()}  # fmt: skip
    return [sweep for size in SIZES for sweep in sweeps_of(size, tasks)]


def write_data(stsb: Path, out: Path) -> None:
    """Write the files of both tasks into out/scores and out/classes, from GLUE's folder of STS-B."""
    captions, test, news = (pairs_of(stsb / f"{part}.tsv", genre) for part, genre in
                            (("train", "captions"), ("dev", "captions"), ("dev", "news")))  # fmt: skip
    rng = np.random.default_rng(0)
    captions, test, news = ([pairs[i] for i in rng.permutation(len(pairs))] for pairs in (captions, test, news))
    dev, train = captions[:DEV], captions[DEV:]
    sets = {"train": train, "wrong": with_wrong_scores(train), "dev": dev, "test": test[:TEST], "other": news[:TEST]}
    for task, as_label in (("scores", float), ("classes", round)):
        (out / task).mkdir(parents=True, exist_ok=True)
        for name, pairs in sets.items():
            rows = [{"sentence1": pair.texts[0], "sentence2": pair.texts[1], "label": as_label(pair.label)}
                    for pair in pairs]  # fmt: skip
            write_rows(out / task / f"{name}.jsonl", rows)


def pairs_of(path: Path, genre: str) -> list[LabelledText]:
    """Return the pairs of a file of STS-B that have this genre."""
    genres = {line: cells[1] for line, _, cells in rows_of_tsv(path)}
    return [pair for pair in read_labelled(path, TASKS["stsb"])[0] if genres[pair.line] == f"main-{genre}"]


def with_wrong_scores(pairs: list[LabelledText]) -> list[LabelledText]:
    """Give each of the first fifth of the pairs the score of the one before it."""
    count = len(pairs) // 5
    scores = np.roll([pair.label for pair in pairs[:count]], 1).tolist()
    return [replace(pair, label=score) for pair, score in zip(pairs, scores, strict=False)] + pairs[count:]
