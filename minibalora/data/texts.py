"""Texts without labels: TSV with a header, JSON, Parquet, or lines of standard input."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.data.files import (
    Row,
    counted_on,
    has_objects,
    in_short,
    line_of,
    rows_of_file,
    rows_of_tsv,
    shards,
    text_of,
)
from minibalora.data.glue import TASKS, LabelledText, Task

ONE_TEXT = ("text",), ("sentence",)  # the columns if the task is unknown
INDICES = ("index", "idx", "id")  # GLUE's, Hugging Face's, QQP's


def columns_of(task: Task | None) -> list[tuple[str, ...]]:
    """Return the alternatives for the columns of the texts, best first."""
    alternatives = [columns[:-1] for a_task in ([task] if task else TASKS.values()) for columns in a_task.columns]
    return alternatives if task else [*ONE_TEXT, *alternatives]


def table(source: Path) -> Iterator[Row]:
    """Yield the rows of TSV, JSON or Parquet files as objects."""
    return counted_on(rows_of_file(path) if has_objects(path) else _tsv_rows(path) for path in shards(source))


def _tsv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a TSV file as objects. CoLA's files without a header get one."""
    header = None
    for line, where, cells in rows_of_tsv(path):
        if cells == [""]:  # a byte order mark alone
            continue
        if header is None:
            is_cola = len(cells) == 4 and "sentence" not in cells and cells[1] in ("0", "1")
            header = TASKS["cola"].header if is_cola else cells
            if not is_cola:
                continue
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        if len(cells) != len(header):
            raise InputError(f"{where}: has {len(cells)} columns, not {len(header)}, between tabs: correct the row")
        yield line, where, dict(zip(header, cells, strict=True))


def lines(columns: list[tuple[str, ...]]) -> Iterator[Row]:
    """Yield the lines of standard input as objects: JSON as it is, plain texts under the first of `columns`."""
    for line, raw in enumerate(sys.stdin.buffer, start=1):
        where = f"standard input, line {line}"
        text = line_of(raw, where)
        if re.match(r'\{\s*"', text):
            try:
                yield line, where, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: broken JSON ({error}): correct the line") from None
        elif text.strip():
            texts = text.split("\t") if len(columns[0]) == 2 else [text]
            if len(texts) != len(columns[0]):
                raise InputError(f"{where}: has {len(texts)} texts between tabs, not a pair: correct the line")
            yield line, where, dict(zip(columns[0], texts, strict=True))


def read_texts(rows: Iterator[Row], columns: list[tuple[str, ...]], source: str) -> list[tuple[LabelledText, object]]:
    """Return each row's texts, from the first of `columns` that it has, with label 0; and its index.

    The index is in one of the columns INDICES, or else it is the row's number, from 0. Raises InputError for a row
    without texts.
    """
    texts = []
    for line, where, row in rows:
        fields = next((names for names in columns if isinstance(row, dict) and set(names) <= set(row)), None)
        if fields is None:
            present = in_short(map(repr, row)) if isinstance(row, dict) else f"a JSON {type(row).__name__}"
            needed = " or ".join(", ".join(names) for names in columns)
            raise InputError(f"{where}: has the columns {present}, not {needed}: name them with --text-field")
        values = tuple(text_of(row[name], f"the field {name!r}", where) for name in fields)
        index = next((row[name] for name in INDICES if name in row), len(texts))
        texts.append((LabelledText(values, 0, line), index))
    if not texts:
        raise InputError(f"{source}: has no texts: give a file with a text per row")
    return texts
