"""The laboratory's second experiment: a real encoder, all-MiniLM-L6-v2, on GLUE's small tasks.

STS-B's pairs of similar sentences are learned twice: by their score from 0 to 5 and, because two of the three
regularizers need classes, by this score rounded to one of six classes. `glue_data` says what is out of domain.
"""

from pathlib import Path

from minibalora.checkpoints.weights import skeleton
from minibalora.lab.grid import ROOT, Size, Sweep, Task, sweeps_of
from minibalora.objective import NLU_RECIPES

NAME = "MiniLM"
BOTH = ((NAME, "clean"), (NAME, "wrong"))
CELLS = {"stsb-scores": BOTH, "stsb-classes": ((NAME, "wrong"),), "mrpc": BOTH, "cola": BOTH, "rte": BOTH}
SIZE = Size(CELLS, ("lora", "pissa", "ba-lora iclr2026"), (1, 2, 3, 4))
WORDS = {  # task -> flags for train_nlu.py
    "stsb-scores": "--task stsb --epochs 1 --max-length 64",
    "stsb-classes": "--task custom --text-field sentence1 sentence2 --label-field label --epochs 1 --max-length 64",
    "mrpc": "--task mrpc --epochs 2 --max-length 64",
    "cola": "--task cola --epochs 2 --max-length 64",
    "rte": "--task rte --epochs 3 --max-length 128",
}
# Of a run, with one on each of two cores of an AMD EPYC.
SECONDS = {"stsb-scores": 105, "stsb-classes": 105, "mrpc": 300, "cola": 250, "rte": 480}


def sweeps_with(model: Path) -> list[Sweep]:
    """Return the sweeps with the encoder in the folder `model`. Raises InputError if there is none."""
    skeleton(model, "classifier")
    tasks = {name: Task(name, ROOT / "train_nlu.py", tuple(words.split()), model, NAME, NLU_RECIPES, rates_of(name),
                        SECONDS[name], draws_wrong=name != "stsb-scores")
             for name, words in WORDS.items()}  # fmt: skip
    return sweeps_of(SIZE, tasks)


def rates_of(task: str) -> dict[str, tuple[float, ...]]:
    """Return the learning rates of each method: four, or three where a run takes longer."""
    count = 4 if SECONDS[task] < 200 else 3
    pissa = (2.5e-4, 5e-4, 1e-3, 2e-3)[:count]
    return {"lora": (5e-4, 1e-3, 2e-3, 4e-3)[:count], "pissa": pissa, "ba-lora": pissa}
