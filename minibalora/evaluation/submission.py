"""Write the files for GLUE's server (gluebenchmark.com): index and prediction of every row of a test file."""

import glob
from pathlib import Path

from torch import Tensor

from minibalora.base.errors import InputError
from minibalora.base.files import replacing
from minibalora.data.glue import Task, task_folder

# The test files of GLUE and Hugging Face -> the files that the server takes.
SUBMISSIONS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "qnli": "QNLI"}
SUBMISSIONS |= {"rte": "RTE", "wnli": "WNLI"}
SUBMISSIONS = {name: {"test": file} for name, file in SUBMISSIONS.items()}
SUBMISSIONS["mnli"] = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "diagnostic": "AX"}


def check_task(task: Task | None, labels: list[str] | None) -> None:
    """Check that the task is one of GLUE's and that the labels (None: scores) fit it. Raises InputError if not."""
    if task is None or task.name not in SUBMISSIONS:
        raise InputError("--glue-submission: the model's run names no GLUE task: name it with --task")
    ours, expected = ("scores" if names is None else f"{len(names)} classes" for names in (labels, task.labels))
    if ours != expected:
        raise InputError(f"--glue-submission: the model has {ours}, but {task.name} has {expected}: "
                         "give a model of that task")  # fmt: skip
    if labels is not None:
        class_names(labels, task)


def write_submission(path: Path, indices: list, logits: Tensor, labels: list[str] | None, task: Task) -> str:
    """Write a task's file with the predictions of logits (N, D). Returns a line about it.

    Scores are clipped to the range of STS-B's gold scores, 0 to 5.
    """
    if labels is None:
        scores = logits[:, 0].clamp(0, 5)
        predictions = [f"{score:.3f}" for score in scores.tolist()]
        clipped = f", {int((scores != logits[:, 0]).sum()):,} clipped to 0 to 5"
    else:
        names, clipped = class_names(labels, task), ""
        predictions = [names[index] for index in logits.argmax(1).tolist()]
    rows = [f"{index}\t{prediction}\n" for index, prediction in zip(indices, predictions, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(["index\tprediction\n", *rows]), encoding="utf-8")
    return f"{path}: {len(rows):,} predictions{clipped}"


def class_names(labels: list[str], task: Task) -> list[str]:
    """Return the task's name for each of the model's classes; unknown names are matched by position."""
    named = [task.class_named(name) for name in labels]
    indices = [index if known is None else known for index, known in enumerate(named)]
    if len(set(indices)) < len(indices):
        raise InputError(
            f"--glue-submission: the classes {', '.join(labels)} are not those of {task.name}: give its model"
        )
    return [task.labels[index] for index in indices]


def files_to_submit(data: Path, task: Task) -> list[tuple[Path, str]]:
    """Return the task's test files in a folder, or the single file, each with its name on GLUE's server."""
    names = SUBMISSIONS[task.name]
    if data.is_dir():
        folder = task_folder(data, task)
        escaped = Path(glob.escape(str(folder)))
        shards_of = {stem: escaped / f"{stem}-*.parquet" for stem in names if any(folder.glob(f"{stem}-*.parquet"))}
        files = [(shards_of.get(stem, folder / f"{stem}.tsv"), stem) for stem in names]
        return [(path, names[stem]) for path, stem in files if stem != "diagnostic" or path.exists()]
    stem = next((stem for stem in names if data.name.startswith(stem)), None) if len(names) > 1 else "test"
    if stem is None:
        raise InputError(f"{data}: the name of the file does not begin with {', '.join(names)}: rename it")
    return [(data, names[stem])]
