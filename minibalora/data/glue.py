"""Labelled texts: GLUE's own TSV files, JSON and Parquet with the same columns, and custom data; noise and imbalance.

Column names, classes and metrics are those of gluebenchmark.com and of the `glue` data set on Hugging Face.
"""

import glob
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short  # for values from a file in messages

import numpy as np

from minibalora.base.errors import InputError
from minibalora.base.files import entered
from minibalora.data.files import (
    check_complete,
    counted_on,
    has_objects,
    in_short,
    rows_of_file,
    rows_of_tsv,
    shards,
    text_of,
)


@dataclass(frozen=True)
class Task:
    """A classification or regression task, and its spelling in files. A class is the index of its name in `labels`."""

    name: str
    columns: tuple[tuple[str, ...], ...]  # one or two texts, then the label; GLUE's names first, then other names
    labels: tuple[str, ...] | None  # None: the label is a score
    metrics: tuple[str, ...]  # functions of metrics.py
    spellings: dict[str | int, int] = field(default_factory=dict)  # all spellings of a class in a file -> its index
    folded: tuple[str, ...] = ()  # labels that mean only "not class 0"
    header: tuple[str, ...] | None = None  # the columns of GLUE's own files if these have no header
    broken_rows: bool = False  # GLUE's own files have rows with a wrong number of columns, which are left out
    dev: tuple[str, ...] = ("dev.tsv",)

    def class_named(self, name: str | int) -> int | None:
        """Return the class of a name, whatever its case and punctuation; None if it is not one of the task's."""
        return {plain_name(spelling): index for spelling, index in self.spellings.items()}.get(plain_name(name))


def plain_name(name: str | int) -> str:
    return re.sub(r"[\W_]+", "_", str(name).lower())


def _spellings(*classes: str) -> dict[str | int, int]:
    """Return the spellings of each class: its index, as text and as integer, and its names, separated by spaces."""
    indices = {kind(index): index for kind in (int, str) for index in range(len(classes))}
    return indices | {name: index for index, names in enumerate(classes) for name in names.split()}


# These replace a label in GLUE's hidden test sets, and in MNLI and SNLI where annotators disagree. A custom task may
# have a class with such a name.
HIDDEN = ("-", "-1", "-1.0", -1)
# The last columns of GLUE's SNLI, whose rows have one or five cells for the first.
ANNOTATIONS = ["label1", "gold_label"]
FRACTION = re.compile(r"[-+]?(\d+\.\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_ENTAILMENT = _spellings("entailment", "not_entailment non-entailment")
_PAIR, _NLI_PAIR = ("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label")
_GOLD_PAIR = ("sentence1", "sentence2", "gold_label")  # MNLI, SNLI, HANS

TASKS = {
    task.name: task
    for task in (
        Task("cola", (("sentence", "label"),), ("0", "1"), ("matthews",), _spellings("unacceptable", "acceptable"),
             header=("source", "label", "mark", "sentence")),
        Task("sst2", (("sentence", "label"), ("text", "label")), ("0", "1"), ("accuracy",),
             _spellings("negative neg", "positive pos")),
        Task("mrpc", (("#1 String", "#2 String", "Quality"), _PAIR), ("0", "1"), ("accuracy", "f1"),
             _spellings("not_equivalent", "equivalent")),
        Task("stsb", (("sentence1", "sentence2", "score"), _PAIR), None, ("pearson", "spearman")),
        Task("qqp", (("question1", "question2", "is_duplicate"), ("question1", "question2", "label"), _PAIR),
             ("0", "1"), ("accuracy", "f1"), _spellings("not_duplicate", "duplicate"), broken_rows=True),
        Task("mnli", (_GOLD_PAIR, _NLI_PAIR, ("context", "hypothesis", "label")),  # the last: ANLI's
             ("entailment", "neutral", "contradiction"), ("accuracy",),
             _spellings("entailment e", "neutral n", "contradiction c"), folded=("non-entailment", "not_entailment"),
             dev=("dev_matched.tsv", "dev_mismatched.tsv")),
        Task("qnli", (("question", "sentence", "label"),), ("entailment", "not_entailment"), ("accuracy",),
             _ENTAILMENT),
        Task("rte", (_PAIR, _GOLD_PAIR, _NLI_PAIR), ("entailment", "not_entailment"), ("accuracy",), _ENTAILMENT),
        Task("wnli", (_PAIR,), ("0", "1"), ("accuracy",), _spellings("not_entailment", "entailment")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class LabelledText:
    texts: tuple[str, ...]  # one, or two for a pair
    label: int | float  # the class, or the score of a regression
    line: int  # its line or row, from 1, counted on through the files of a set


def custom_task(path: str | Path, text_fields: list[str], label_field: str) -> Task:
    """Return a classification task whose classes are the distinct labels of a training file, in order.

    text_fields: one or two columns of a TSV file or fields of objects. Labels are strings, integers or booleans;
    integers are ordered by value. Raises InputError for other labels and for scores (numbers with a fraction).
    """
    fields = [*text_fields, label_field]
    if len(set(fields)) < len(fields):  # a label that is also the text would be learned from itself
        raise InputError(f"--text-field and --label-field name {max(fields, key=fields.count)!r} twice: name each once")
    task, names = Task("custom", (tuple(fields),), (), ("accuracy",)), set()
    for _, where, (*_, label) in _rows(path, task):
        if not isinstance(label, str | int):
            kind = f"the label {short(label)} is a {type(label).__name__}, but a class is a string or an integer"
            raise InputError(f"{where}: {kind}: change the field {label_field!r}, or give --task stsb for scores")
        names.add(str(label))
    names = sorted(names - {""})  # read_labelled names the line of an empty label
    if any(map(FRACTION.fullmatch, names)) and all(map(_is_number, names)):
        first = next(filter(FRACTION.fullmatch, names))
        raise InputError(f"{path}: {label_field!r} has numbers with a fraction ({first}), which are scores and not "
                         "classes: give --task stsb with columns sentence1, sentence2, score")  # fmt: skip
    twins = {}
    for name in names:
        if (other := twins.setdefault(unicodedata.normalize("NFC", name).strip().lower(), name)) != name:
            differ = "differ only in spaces, in upper and lower case, or in how Unicode composes a letter"
            raise InputError(f"{path}: the labels {other!r} and {name!r} {differ}: rename one of the two")
    if len(names) < 2:
        raise InputError(f"{path}: {label_field!r} has {len(names)} different labels: give a file with two or more")
    with suppress(ValueError):  # int() of words
        names = sorted(names, key=int)
    return replace(task, labels=tuple(names), spellings={name: index for index, name in enumerate(names)})


def read_labelled(path: str | Path, task: Task) -> tuple[list[LabelledText], int, bool]:
    """Return the examples of a file or set of files, the number of rows left out, and whether the labels are folded.

    TSV, JSON and Parquet are recognised by their content. Rows without a label (HIDDEN) and QQP's broken rows are
    left out. Folded: the file (HANS, for instance) distinguishes only class 0 from all others; the others are class 1,
    and predictions must pass through `fold` before they are compared. Raises InputError, which names the line, at the
    first bad row.
    """
    examples, skipped, exact, folded = [], 0, False, False
    for line, where, values in _rows(path, task):
        if values is None or _is_hidden(values[-1], task):
            skipped += 1
            continue
        *texts, label = values
        texts = tuple(text_of(text, "a text", where) for text in texts)
        if task.labels is None:
            label = _score(label, where)
        elif label in task.folded:
            label, folded = 1, True
        else:
            label = _class(label, task, where)
            exact |= label > 0
        if exact and folded:
            raise InputError(f"{where}: {task.folded[0]!r} and {task.labels[1]!r} in one file: split the file")
        examples.append(LabelledText(texts, label, line))
    if not examples:
        hidden = f", only {skipped:,} without one (-1 or - hides it)" if skipped else ""
        raise InputError(f"{path}: has no rows with a label{hidden}: give a training or dev file of {task.name}")
    return examples, skipped, folded


def fold(classes: list[int]) -> list[int]:
    """Map every class but 0 to 1, to compare predictions of several classes with folded labels."""
    return [min(label, 1) for label in classes]


def _is_hidden(label: object, task: Task) -> bool:
    is_minus_one = isinstance(label, str) and _is_number(label) and float(label) == -1
    return (label in HIDDEN or is_minus_one) and label not in task.spellings and str(label) not in task.spellings


def _is_label(cell: str, task: Task) -> bool:
    return cell in ("", *task.spellings, *task.folded) or _is_hidden(cell, task)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(source: str | Path, task: Task) -> Iterator[tuple[int, str, list | None]]:
    """Yield line, place, and the texts and label as in the file; None for a broken row of a task with `broken_rows`."""
    return counted_on(
        _object_rows(path, task) if has_objects(path) else _tsv_rows(path, task) for path in shards(source)
    )


def _object_rows(path: Path, task: Task) -> Iterator[tuple[int, str, list]]:
    for line, where, row in rows_of_file(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON {type(row).__name__}, not an object with texts and a label")
        columns = _fitting(task, [name for name, value in row.items() if value is not None])
        values = [row[name] for name in columns or _columns(task, row, where)]
        if task.folded and "heuristic" in row and values[-1] == 1:  # HANS: 1 is not MNLI's class 1
            values[-1] = task.folded[0]
        yield line, where, values


def _tsv_rows(path: Path, task: Task) -> Iterator[tuple[int, str, list[str] | None]]:
    """Read cells between tabs. Quotes are ordinary text, and only a newline ends a row."""
    header = None
    for line, where, cells in rows_of_tsv(path):
        if header is None:
            headerless = task.header and len(cells) == len(task.header) and not _fitting(task, cells)
            header = list(task.header) if headerless else cells
            columns = _columns(task, header, where)
            if twice := [name for name in columns if header.count(name) > 1]:
                raise InputError(f"{where}: has two columns {twice[0]!r}: rename one of the two")
            indices = [header.index(name) for name in columns]
            if not headerless:
                continue
        if header[-2:] == ANNOTATIONS and all(_is_label(cell, task) for cell in cells[len(header) - 2 :]):
            cells = [*cells[: len(header) - 1], *cells[len(header) - 1 :][-1:]]
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        if max(indices) < len(cells) <= len(header):
            yield line, where, [cells[index] for index in indices]
        elif task.broken_rows:
            yield line, where, None
        else:
            raise InputError(f"{where}: has {len(cells)} columns, not {len(header)}, between tabs: correct the row")


def _fitting(task: Task, present: Iterable[str]) -> tuple[str, ...] | None:
    return next((columns for columns in task.columns if set(columns) <= set(present)), None)


def _columns(task: Task, present: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the first of the task's alternatives whose columns are all present. Raises InputError if there is none."""
    if columns := _fitting(task, present):
        return columns
    exact = [other for other in TASKS.values() if set(other.columns[0]) <= set(present)]  # GLUE's names come first
    others = exact or [other for other in TASKS.values() if _fitting(other, present)]
    most = max((len(other.columns[0]) for other in others), default=0)
    if others:
        cure = f"they are those of {' or '.join(other.name for other in others if len(other.columns[0]) == most)}"
    elif any(set(columns[:-1]) <= set(present) for columns in task.columns):
        cure = "name the labels' column as there, or, if this is a test file, give a training or dev file"
    else:
        cure = "rename them; in TSV, tabs stand between columns"
    listed = in_short(map(short, present))
    expected = " or ".join(", ".join(columns) for columns in task.columns)
    if task.header:
        expected += f" or, without a header, {', '.join(task.header)}"
    raise InputError(f"{where}: has the columns {listed}, not {task.name}'s {expected}: {cure}")


def _class(label: object, task: Task, where: str) -> int:
    # pandas writes 1.0 for 1 in a column with an empty cell.
    is_name = isinstance(label, str) and label in task.spellings
    if not is_name and FRACTION.fullmatch(str(label)) and float(label).is_integer():
        label = int(float(label))
    # An integer is a class's index in GLUE, but its name in a custom task; true and false are always names.
    if isinstance(label, bool) or (isinstance(label, int) and label not in task.spellings):
        label = str(label)
    if not isinstance(label, str | int) or label not in task.spellings:
        kind = "" if isinstance(label, str | int) else f" ({type(label).__name__})"
        names = ", ".join(short(name) for name in task.spellings if isinstance(name, str))
        raise InputError(f"{where}: the label {short(label)}{kind} is none of {task.name}'s {names}: correct the row")
    return task.spellings[label]


def _score(label: object, where: str) -> float:
    try:
        score = float(label)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if isinstance(label, bool) or not math.isfinite(score):
        raise InputError(f"{where}: the score {short(label)} is not a finite number: correct the row")
    return score


def task_folder(folder: Path, task: Task) -> Path:
    """Return the folder with a task's files: `folder`, its snapshot, or the folder with the task's name in it."""
    folder = entered(folder)
    return folder / task.name if (folder / task.name).is_dir() else folder


def glue_files(folder: str | Path, task: Task) -> tuple[Path, list[Path]]:
    """Return the training file and the dev file (MNLI has two) of a folder as GLUE or Hugging Face distributes it.

    Hugging Face has Parquet shards in a folder with the task's name; the paths are then patterns.
    """
    folder = task_folder(Path(folder), task)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give {task.name}'s folder of GLUE")
    names = ["train.tsv", *task.dev]
    if not (folder / names[0]).exists() and any(folder.glob("train-*.parquet")):
        names = [name.replace("dev", "validation").replace(".tsv", "-*.parquet") for name in names]
        for name in names:
            check_complete(sorted(folder.glob(name)), folder / name)
        folder = Path(glob.escape(str(folder)))
    for name in names:
        if not glob.glob(str(folder / name)) and not (folder / name).is_file():
            present = short(sorted(other.name for other in folder.iterdir()))
            raise InputError(f"{folder / name}: no such file beside {present}: give {task.name}'s folder of GLUE")
    return folder / names[0], [folder / name for name in names[1:]]


def check_classes(examples: list[LabelledText], task: Task, where: str | Path) -> None:
    """Check that every class of the task has an example. Raises InputError if one has none."""
    present = {example.label for example in examples}
    for label, name in enumerate(task.labels or ()):
        if label not in present:
            raise InputError(f"{where}: has no row of the class {name!r}: give a training file with all classes")


def with_label_noise(examples: list[LabelledText], share: float, classes: int, seed: int) -> list[LabelledText]:
    """Add symmetric noise: give round(share·N) random examples one of the other classes, each equally likely."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(examples), round(share * len(examples)), replace=False)
    shifts = generator.integers(1, classes, len(chosen))
    noisy = list(examples)
    for index, shift in zip(chosen.tolist(), shifts.tolist(), strict=True):
        noisy[index] = replace(noisy[index], label=(noisy[index].label + shift) % classes)
    return noisy


def with_imbalance(examples: list[LabelledText], ratio: float, seed: int) -> list[LabelledText]:
    """Keep the largest class (the first, if tied) and at most round(its size / ratio) examples of every other class.

    ratio >= 1. The examples are drawn at random and stay in order. Raises InputError if no other class would remain.
    """
    rows = defaultdict(list)
    for index, example in enumerate(examples):
        rows[example.label].append(index)
    largest = max(sorted(rows), key=lambda label: len(rows[label]))
    most = round(len(rows[largest]) / ratio)
    if most == 0 and len(rows) > 1:
        raise InputError(
            f"an imbalance of {ratio:g} leaves only the {len(rows[largest])} rows of the largest class: "
            f"take at most {len(rows[largest])}"
        )
    generator = np.random.default_rng(seed)
    indices = []
    for label in sorted(rows):
        is_cut = label != largest and len(rows[label]) > most
        indices += generator.choice(rows[label], most, replace=False).tolist() if is_cut else rows[label]
    return [examples[index] for index in sorted(indices)]
