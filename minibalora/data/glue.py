"""Labelled texts: GLUE's own TSV files, JSON with the same columns, and data of one's own; label noise and imbalance.

Column names, classes and metrics are those of gluebenchmark.com and of the `glue` data set on Hugging Face.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short  # of what a file holds, for messages

import numpy as np

from minibalora.base.errors import InputError
from minibalora.data.files import read_rows


@dataclass(frozen=True)
class Task:
    """What is learned, and how its files spell it. A class is an integer, the index of its name in `labels`."""

    name: str
    columns: tuple[tuple[str, ...], ...]  # one or two texts, then the label; GLUE's names first, then what others use
    labels: tuple[str, ...] | None  # None: the label is a score
    metrics: tuple[str, ...]  # functions of metrics.py
    spellings: dict[str | int, int] = field(default_factory=dict)  # all that a file may call a class; integers in JSON
    folded: tuple[str, ...] = ()  # labels that say no more than "not class 0"
    unlabelled: tuple[str | int, ...] = ()  # in place of a label: the row is left out
    header: tuple[str, ...] | None = None  # the columns of GLUE's own files where these do not name them
    broken_rows: bool = False  # rows with too few columns are known and left out
    dev: tuple[str, ...] = ("dev.tsv",)


_BINARY = {"0": 0, "1": 1, 0: 0, 1: 1}
_ENTAILMENT = {"entailment": 0, "not_entailment": 1, "non-entailment": 1, 0: 0, 1: 1}
_PAIR, _NLI_PAIR = ("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label")
_GOLD_PAIR = ("sentence1", "sentence2", "gold_label")  # MNLI, SNLI, HANS

TASKS = {
    task.name: task
    for task in (
        Task("cola", (("sentence", "label"),), ("0", "1"), ("matthews",), _BINARY,
             header=("source", "label", "mark", "sentence")),
        Task("sst2", (("sentence", "label"), ("text", "label")), ("0", "1"), ("accuracy",),
             _BINARY | {"negative": 0, "positive": 1}),
        Task("mrpc", (("#1 String", "#2 String", "Quality"), _PAIR), ("0", "1"), ("accuracy", "f1"), _BINARY),
        Task("stsb", (("sentence1", "sentence2", "score"), _PAIR), None, ("pearson", "spearman")),
        Task("qqp", (("question1", "question2", "is_duplicate"), ("question1", "question2", "label"), _PAIR),
             ("0", "1"), ("accuracy", "f1"), _BINARY, broken_rows=True),
        Task("mnli", (_GOLD_PAIR, _NLI_PAIR), ("entailment", "neutral", "contradiction"), ("accuracy",),
             {"entailment": 0, "neutral": 1, "contradiction": 2, 0: 0, 1: 1, 2: 2},
             folded=("non-entailment", "not_entailment"), unlabelled=("-", -1),
             dev=("dev_matched.tsv", "dev_mismatched.tsv")),
        Task("qnli", (("question", "sentence", "label"),), ("entailment", "not_entailment"), ("accuracy",),
             _ENTAILMENT),
        Task("rte", (_PAIR, _GOLD_PAIR, _NLI_PAIR), ("entailment", "not_entailment"), ("accuracy",), _ENTAILMENT),
        Task("wnli", (_PAIR,), ("0", "1"), ("accuracy",), _BINARY),
    )
}  # fmt: skip


@dataclass(frozen=True)
class LabelledText:
    texts: tuple[str, ...]  # one, or two for a pair
    label: int | float  # the class, or the score of a regression
    line: int  # where it stands in its file, from 1 (in a JSON array: which item)


def custom_task(path: str | Path, text_fields: list[str], label_field: str) -> Task:
    """Classification with the classes of a training file: its distinct labels in order, integers by their value.

    text_fields: one or two columns of a TSV file or fields of JSON objects. Labels are strings, integers or booleans.
    """
    task = Task("custom", ((*text_fields, label_field),), (), ("accuracy",))
    found = [values[-1] for _, values in _rows(Path(path), task)]
    # anything else is no class, and read_labelled names its line
    names = sorted({str(label) for label in found if isinstance(label, str | int)} - {""})
    if len(names) < 2:
        raise InputError(f"{path}: {label_field!r} has {len(names)} different labels: give a file with two or more")
    with suppress(ValueError):  # of int, where they are words
        names = sorted(names, key=int)
    return replace(task, labels=tuple(names), spellings={name: index for index, name in enumerate(names)})


def read_labelled(path: str | Path, task: Task) -> tuple[list[LabelledText], int, bool]:
    """The examples of a file, how many rows were left out, and whether the labels are folded.

    TSV or JSON is recognised by the content. Left out are rows without a label (MNLI, where annotators disagree) and
    QQP's broken ones. Folded: the file (HANS, say) tells class 0 from all others and no more, the others are class 1,
    and predictions have to be compared after `fold`. InputError names the line of the first bad row.
    """
    examples, skipped, exact, folded = [], 0, False, False
    for line, values in _rows(Path(path), task):
        if values is None or values[-1] in task.unlabelled:
            skipped += 1
            continue
        *texts, label = values
        where = f"{path}, line {line}"
        texts = tuple(_text(text, where) for text in texts)
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
        raise InputError(f"{path}: has no rows with a label: give a training or dev file of {task.name}")
    return examples, skipped, folded


def fold(classes: list[int]) -> list[int]:
    """Any class but 0 becomes 1: how a model of several classes answers a file whose labels are folded."""
    return [min(label, 1) for label in classes]


def _rows(path: Path, task: Task) -> Iterator[tuple[int, list | None]]:
    """Line, and the texts and label as they stand there; None for a row that is known to be broken."""
    try:
        with open(path, "rb") as file:
            is_json = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a TSV or JSON Lines file") from None
    return _json_rows(path, task) if is_json else _tsv_rows(path, task)


def _json_rows(path: Path, task: Task) -> Iterator[tuple[int, list]]:
    for line, where, row in read_rows(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON {type(row).__name__}, not an object with texts and a label")
        yield line, [row[name] for name in _columns(task, row, where)]


def _tsv_rows(path: Path, task: Task) -> Iterator[tuple[int, list[str] | None]]:
    """Cells stand between tabs, quotes are text like any other, and only a newline ends a row."""
    wanted = None
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip(b"\r\n"):
                continue
            where = f"{path}, line {line}"
            cells = _decoded(raw, where).rstrip("\r\n").split("\t")
            if wanted is None:
                headerless = task.header and len(cells) == len(task.header) and not _fitting(task, cells)
                header = task.header if headerless else cells
                wanted = [header.index(name) for name in _columns(task, header, where)]
                if not headerless:
                    continue
            if max(wanted) < len(cells):
                yield line, [cells[index] for index in wanted]
            elif task.broken_rows:
                yield line, None
            else:
                raise InputError(f"{where}: has {len(cells)} columns, not {len(header)}, between tabs: mend the row")


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not valid UTF-8: convert the file to UTF-8") from None


def _fitting(task: Task, found: Iterable[str]) -> tuple[str, ...] | None:
    return next((columns for columns in task.columns if set(columns) <= set(found)), None)


def _columns(task: Task, found: Iterable[str], where: str) -> tuple[str, ...]:
    """The first of the task's alternatives whose columns are all there; InputError says what is there instead."""
    if columns := _fitting(task, found):
        return columns
    own = [other for other in TASKS.values() if set(other.columns[0]) <= set(found)]  # GLUE's names come first
    others = own or [other for other in TASKS.values() if _fitting(other, found)]
    most = max((len(other.columns[0]) for other in others), default=0)
    if others:
        mend = f"they are those of {' or '.join(other.name for other in others if len(other.columns[0]) == most)}"
    elif any(set(columns[:-1]) <= set(found) for columns in task.columns):
        mend = "a test file has no labels, give a training or dev file"
    else:
        mend = "rename them; in TSV, tabs stand between columns"
    listed = ", ".join(map(short, found)) or "none"
    wanted = " or ".join(", ".join(columns) for columns in task.columns)
    if task.header:
        wanted += f" or, without a header, {', '.join(task.header)}"
    raise InputError(f"{where}: has the columns {listed}, not {task.name}'s {wanted}: {mend}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: a text is {type(value).__name__}, not a string: mend the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the text {short(value)} has half of a character: mend the row") from None
    return value


def _class(label: object, task: Task, where: str) -> int:
    # JSON's integers are GLUE's classes, but names of one's own; true and false are always names
    if isinstance(label, bool) or (isinstance(label, int) and label not in task.spellings):
        label = str(label)
    if not isinstance(label, str | int) or label not in task.spellings:
        known = ", ".join(short(name) for name in task.spellings if isinstance(name, str))
        raise InputError(f"{where}: the label {short(label)} is none of {task.name}'s {known}: mend the row")
    return task.spellings[label]


def _score(label: object, where: str) -> float:
    try:
        score = float(label)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if isinstance(label, bool) or not math.isfinite(score):
        raise InputError(f"{where}: the score {short(label)} is no finite number: mend the row")
    return score


def glue_files(folder: str | Path, task: Task) -> tuple[Path, list[Path]]:
    """The training file and the dev file, or MNLI's two, of a folder as GLUE hands it out."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give {task.name}'s folder of GLUE")
    paths = [folder / name for name in ("train.tsv", *task.dev)]
    for path in paths:
        if not path.is_file():
            there = short(sorted(other.name for other in folder.iterdir()))
            raise InputError(f"{path}: no such file beside {there}: give {task.name}'s folder of GLUE")
    return paths[0], paths[1:]


def check_classes(examples: list[LabelledText], task: Task, where: str | Path) -> None:
    """InputError if a class of the task has no example to learn it from."""
    present = {example.label for example in examples}
    for label, name in enumerate(task.labels or ()):
        if label not in present:
            raise InputError(f"{where}: has no row of the class {name!r}: give a training file with all classes")


def with_label_noise(examples: list[LabelledText], share: float, classes: int, seed: int) -> list[LabelledText]:
    """Symmetric noise: round(share·N) examples, drawn at random, each get one of the other classes, all as likely."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(examples), round(share * len(examples)), replace=False)
    shifts = generator.integers(1, classes, len(chosen))
    noisy = list(examples)
    for index, shift in zip(chosen.tolist(), shifts.tolist(), strict=True):
        noisy[index] = replace(noisy[index], label=(noisy[index].label + shift) % classes)
    return noisy


def with_imbalance(examples: list[LabelledText], ratio: float, seed: int) -> list[LabelledText]:
    """The largest class whole (of several, the first), of every other at most round(its size / ratio) examples.

    ratio >= 1. What stays is drawn at random and keeps its order; InputError if nothing of the other classes would.
    """
    rows = defaultdict(list)
    for index, example in enumerate(examples):
        rows[example.label].append(index)
    largest = max(sorted(rows), key=lambda label: len(rows[label]))
    most = round(len(rows[largest]) / ratio)
    if most == 0 and len(rows) > 1:
        raise InputError(
            f"an imbalance of {ratio:g} leaves nothing beside the {len(rows[largest])} rows of the largest class: "
            f"take at most {len(rows[largest])}"
        )
    generator = np.random.default_rng(seed)
    kept = []
    for label in sorted(rows):
        is_cut = label != largest and len(rows[label]) > most
        kept += generator.choice(rows[label], most, replace=False).tolist() if is_cut else rows[label]
    return [examples[index] for index in sorted(kept)]
