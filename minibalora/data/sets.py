"""What a classifier learns from and is measured on, and what is done to it first: noise, imbalance, questions."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data import glue
from minibalora.data.glue import TASKS, LabelledText, Task
from minibalora.data.labelled import ClassRow, encode


@dataclass(frozen=True)
class EvalSet:
    name: str
    examples: list[LabelledText]
    is_folded: bool  # its labels tell class 0 from all others, and no more
    rows: list[ClassRow] = field(default_factory=list)  # the examples, tokenised

    def encoded(self, tok: Tokenizer, max_length: int) -> "EvalSet":
        return replace(self, rows=encode(self.examples, tok, max_length)[0])


def read_sets(
    data: str, task: str, eval_paths: list[str], text_field: list[str], label_field: str
) -> tuple[Task, list[LabelledText], int, list[EvalSet]]:
    """The task, what to learn from, how many rows were left out of it, and what to measure on, first the dev set.

    data: a folder of GLUE's, which has the dev set, or a file. The fields are those of the task "custom".
    """
    path, dev = Path(data), []
    known = TASKS[task] if task != "custom" else None
    if path.is_dir() and known is not None:
        path, dev = glue.glue_files(path, known)
    known = known or glue.custom_task(path, text_field, label_field)
    examples, skipped, _ = glue.read_labelled(path, known)
    eval_sets = read_eval_sets([*dev, *map(Path, eval_paths)], known)
    if not eval_sets:
        raise InputError(f"--data {data}: a file needs --eval with the dev file: give it")
    return known, examples, skipped, eval_sets


def read_eval_sets(paths: list[Path], task: Task) -> list[EvalSet]:
    """Each file by its name, or by its path where another has the same name."""
    if len(set(paths)) < len(paths):
        raise InputError(f"--eval names {max(paths, key=paths.count)} twice: name each file once")
    names = Counter(path.name for path in paths)
    sets = {path.name if names[path.name] == 1 else str(path): glue.read_labelled(path, task) for path in paths}
    return [EvalSet(name, examples, is_folded) for name, (examples, _, is_folded) in sets.items()]


def disturbed(
    examples: list[LabelledText], classes: int, imbalance: float | None, label_noise: float, seed: int
) -> tuple[list[LabelledText], str]:
    """The examples with imbalance and noise, as far as they are asked for, and what was done, in words."""
    told, count = "", len(examples)
    if imbalance:
        examples = glue.with_imbalance(examples, imbalance, seed)
        told += f", {count - len(examples):,} left out for the imbalance"
    if label_noise:
        examples = glue.with_label_noise(examples, label_noise, classes, seed)
        told += f", {round(label_noise * len(examples)):,} with another label"
    return examples, told


def check_class_order(folder: str, task: Task) -> None:
    """InputError if config.json says that a class of the head is another class of the task.

    Published heads of MNLI differ in their order. Names that the task does not know, such as LABEL_0, say nothing.
    """
    id2label = read_json_object(Path(folder) / "config.json").get("id2label")
    known = {str(name).lower().replace("-", "_"): index for name, index in task.spellings.items()} | task.spellings
    for index, name in (id2label if isinstance(id2label, dict) else {}).items():
        ours = known.get(name, known.get(str(name).lower().replace("-", "_"))) if isinstance(name, str) else None
        if ours is not None and str(ours) != index:
            which = f"class {index} is {name!r}, which is class {ours} of {task.name}"
            raise InputError(f"{folder}/config.json: {which}: put the head's rows and id2label into the task's order")


def in_words(examples: list[LabelledText], task: Task, source: str | None) -> str:
    """How many rows there are, and of which class."""
    counts = Counter(example.label for example in examples)
    classes = ", ".join(f"{counts[index]:,} of class {label}" for index, label in enumerate(task.labels or ()))
    return f"{source or 'built-in reviews'}, {len(examples):,} rows{f': {classes}' if classes else ''}"
