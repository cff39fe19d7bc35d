"""A classifier's training and evaluation sets; noise and imbalance; the order of a head's classes."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.checkpoints.weights import Checkpoint
from minibalora.data import glue
from minibalora.data.glue import TASKS, LabelledText, Task
from minibalora.data.labelled import ClassRow, encode


@dataclass(frozen=True)
class EvalSet:
    name: str
    examples: list[LabelledText]
    is_folded: bool  # its labels distinguish only class 0 from all others
    skipped: int = 0  # rows without a label
    rows: list[ClassRow] = field(default_factory=list)  # the examples, tokenised
    cut: int = 0  # rows with texts that were cut

    def in_words(self) -> str:
        cut = f", {self.cut:,} of them cut" if self.cut else ""
        left_out = f", {self.skipped:,} without a label left out" if self.skipped else ""
        return f"{self.name}, {len(self.rows):,} rows{cut}{left_out}"

    def encoded(self, tok: Tokenizer, max_length: int) -> "EvalSet":
        rows, cut = encode(self.examples, tok, max_length)
        return replace(self, rows=rows, cut=cut)


def read_sets(
    data: str, task: str, eval_paths: list[str], text_field: list[str], label_field: str
) -> tuple[Task, list[LabelledText], int, list[EvalSet]]:
    """Return the task, the training examples, how many training rows were left out, and the evaluation sets.

    data: a folder of GLUE, whose dev set is the first evaluation set, or a file or set of files. The fields are used by
    the task "custom" only.
    """
    path, dev = Path(data), []
    glue_task = TASKS.get(task)
    if path.is_dir() and glue_task is not None:
        path, dev = glue.glue_files(path, glue_task)
    task = glue_task or glue.custom_task(path, text_field, label_field)
    examples, skipped, _ = glue.read_labelled(path, task)
    eval_sets = read_eval_sets([*dev, *map(Path, eval_paths)], task)
    if not eval_sets:
        raise InputError(f"--data {data}: a file needs --eval with the dev file: give it")
    return task, examples, skipped, eval_sets


def read_eval_sets(paths: list[Path], task: Task) -> list[EvalSet]:
    """Read each file. A set's name is its file's name, or its path if two files have the same name."""
    if len(set(paths)) < len(paths):
        raise InputError(f"--eval names {max(paths, key=paths.count)} twice: name each file once")
    names = Counter(path.name for path in paths)
    sets = {path.name if names[path.name] == 1 else str(path): glue.read_labelled(path, task) for path in paths}
    return [EvalSet(name, examples, folded, skipped) for name, (examples, skipped, folded) in sets.items()]


def disturbed(
    examples: list[LabelledText], classes: int, imbalance: float | None, label_noise: float, seed: int
) -> tuple[list[LabelledText], str]:
    """Return the examples with the requested imbalance and noise, and a description of the changes."""
    changes, count = "", len(examples)
    if imbalance:
        examples = glue.with_imbalance(examples, imbalance, seed)
        changes += f", {count - len(examples):,} left out for the imbalance"
    if label_noise:
        examples = glue.with_label_noise(examples, label_noise, classes, seed)
        changes += f", {round(label_noise * len(examples)):,} with another label"
    return examples, changes


def class_order(folder: str | Path, task: Task) -> list[int] | None:
    """Return, for each class of the task, its row in a checkpoint's head according to `id2label`.

    Published heads for MNLI differ in their order. Names such as LABEL_0 carry no meaning: the task's order is assumed.
    Labels that are the numbers of rows need no names. Returns None if the names belong to other classes.
    """
    order = list(range(1 if task.labels is None else len(task.labels)))
    if _are_rows(task.labels):
        return order
    named = {row: task.class_named(name) for row, name in _names_of_rows(Path(folder)).items()}
    if task.labels is None or all(row == index for row, index in named.items()):
        return order
    if sorted(named) != order or set(named.values()) != set(order):
        return None
    return sorted(named, key=named.get)


def stored_order(order: list[int] | None, classes: int) -> list[int]:
    """Return the inverse of `class_order`: for each row of the checkpoint's head, its class in the task. Without an
    order, a new head has the task's."""
    return [order.index(row) for row in range(classes)] if order else list(range(classes))


def head_in_words(checkpoint: Checkpoint, order: list[int] | None, task: Task, seed: int) -> list[str]:
    """Say what of a classifier's head is new or was never trained, that its classes were rearranged, or their names if
    the labels are numbers."""
    lines = []
    if new := checkpoint.new_modules:
        lines.append(f"no {' and no '.join(new)} in the checkpoint for these classes: new, from seed {seed}")
    elif order != sorted(order):
        lines.append("the checkpoint's head, with its classes in the task's order by id2label")
    elif order and _are_rows(task.labels) and (names := _names_of_rows(checkpoint.folder)):
        lines.append(f"the checkpoint's head, where {', '.join(f'{row} is {name}' for row, name in names.items())}")
    for module in checkpoint.untrained_modules:
        lines.append(f"{module} in the checkpoint was never trained (its biases are 0): trained with the classifier")
    return lines


def _are_rows(labels: Sequence[str] | None) -> bool:
    return labels is not None and list(labels) == [str(row) for row in range(len(labels))]


def _names_of_rows(folder: Path) -> dict[int, str | int]:
    """Return the names of the rows of a checkpoint's head, as its config.json has them."""
    config = read_json_object(folder / "config.json")
    id2label = config.get("id2label")
    if id2label is None and isinstance(config.get("label2id"), dict):
        id2label = {str(row): name for name, row in config["label2id"].items()}
    rows = id2label if isinstance(id2label, dict) else {}
    return {int(row): name for row, name in rows.items() if row.isdigit() and _is_name(name)}


def _is_name(name: object) -> bool:
    return isinstance(name, str | int) and re.fullmatch(r"label_\d+", glue.plain_name(name)) is None


def in_words(examples: list[LabelledText], task: Task, source: str | None) -> str:
    """Describe the rows: their number, and the number of each class."""
    counts = Counter(example.label for example in examples)
    classes = ", ".join(f"{counts[index]:,} of class {label}" for index, label in enumerate(task.labels or ()))
    return f"{source or 'built-in reviews'}, {len(examples):,} rows{f': {classes}' if classes else ''}"
