"""The laboratory's second experiment: a real encoder, all-MiniLM-L6-v2, on GLUE's small tasks.

STS-B's pairs of similar sentences are learned twice: by their score from 0 to 5, and by this score rounded to one of
six classes, because two of the three regularizers need classes. With the two classes of the other tasks, the spectral
term is constant and only these two act: consistency and diversity. `glue_data` says what is out of domain.
"""

from functools import partial
from pathlib import Path

from minibalora.checkpoints.weights import skeleton
from minibalora.lab.grid import ROOT, Size, Sweep, Task, sweeps_of
from minibalora.objective import NLU_RECIPES

NAME = "MiniLM"
CELLS = dict.fromkeys(("stsb-scores", "stsb-classes", "mrpc", "cola", "rte"), ((NAME, "clean"), (NAME, "wrong")))
SIZE = Size(CELLS, ("lora", "pissa", "ba-lora iclr2026"), (1, 2, 3, 4))
PISSA = (2.5e-4, 5e-4, 1e-3, 2e-3)
FOUR_RATES = {"lora": (5e-4, 1e-3, 2e-3, 4e-3), "pissa": PISSA, "ba-lora": PISSA}
THREE_RATES = {method: rates[:3] for method, rates in FOUR_RATES.items()}  # where a run takes longer
SIX_CLASSES = ("--task", "custom", "--text-field", "sentence1", "sentence2", "--label-field", "label")


def sweeps_with(model: Path) -> list[Sweep]:
    """Return the sweeps with the encoder in the folder `model`. Raises InputError if there is none."""
    skeleton(model, "classifier")
    return sweeps_of(SIZE, {task.name: task for task in tasks_of(model)})


def tasks_of(model: Path) -> list[Task]:
    """Return the tasks, each measured in and out of domain by GLUE's first metric.

    Pairs of MRPC and RTE out of domain have other shares of the classes, so there it is the mean of the two recalls.
    The seconds of mrpc and STS-B are measured, those of cola and rte follow from a few runs.
    """
    task = partial(Task, script=ROOT / "train_nlu.py", model=model, model_name=NAME, recipes=NLU_RECIPES)
    classes = partial(task, draws_wrong=True)
    return [
        task("stsb-scores", words=("--task", "stsb", *length(1, 64)), rates=FOUR_RATES, seconds=105,
             scores=in_and_out("pearson")),
        classes("stsb-classes", words=(*SIX_CLASSES, *length(1, 64)), rates=FOUR_RATES, seconds=105,
                scores=in_and_out("accuracy")),
        classes("mrpc", words=("--task", "mrpc", *length(2, 64)), rates=THREE_RATES, seconds=330,
                scores=in_and_out("accuracy", "recall of 0", "recall of 1")),
        classes("cola", words=("--task", "cola", *length(2, 64)), rates=THREE_RATES, seconds=250,
                scores=in_and_out("matthews")),
        classes("rte", words=("--task", "rte", *length(3, 64)), rates=THREE_RATES, seconds=275,
                scores=in_and_out("accuracy", "recall of entailment", "recall of not_entailment")),
    ]  # fmt: skip


def length(epochs: int, tokens: int) -> tuple[str, ...]:
    return "--epochs", str(epochs), "--max-length", str(tokens)


def in_and_out(metric: str, *out_of_domain: str) -> dict[str, list[str]]:
    """Return `Task.scores`: a metric in domain and, out of domain, the same or the mean of others."""
    return {"test": [f"test.jsonl: {metric}"], "other": [f"other.jsonl: {name}" for name in out_of_domain or [metric]]}
