"""Rows of data files: JSON Lines, JSON arrays and Parquet, plain or gzipped, in one file or in shards.

An error names the file and the line or row.
"""

import glob
import gzip
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from reprlib import repr as short  # for values from a file in messages
from typing import BinaryIO

from minibalora.base.errors import InputError
from minibalora.base.files import entered, refuse_pointer

Row = tuple[int, str, object]  # line or row number, from 1; the place, as errors name it; the value
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".tsv")
UNREAD = (".csv", ".txt", ".arrow", ".zip", ".zst", ".bz2", ".xz")  # forms of data that are not read
ENDING = f"({'|'.join(map(re.escape, (*SUFFIXES, *UNREAD, '.gz')))})+$"
# JSON files that the `datasets` library writes beside the data.
DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
SHARD = r"\d+(-of-\d+)?(-[0-9a-f]{16})?(?=\.)"  # the part of a file name that numbers a shard
TIMES = ("DATE", "TIME", "TIMESTAMP")  # Parquet's names for types that are not read
BOM = b"\xef\xbb\xbf"
# First bytes of formats that are not read here, and the cure.
FOREIGN = {
    b"PK\x03\x04": "a ZIP archive: unpack it (if it is an Excel file: save it as TSV)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"BZh": "compressed with bzip2: unpack it",
    b"\xfd7zX": "compressed with xz: unpack it",
    b"\xff\xff\xff\xff": "an Arrow file: write it again with to_parquet or to_json",
    b"ARRO": "an Arrow file: write it again with to_parquet or to_json",
}


def read_rows(source: str | Path) -> Iterator[Row]:
    """Yield each row of JSON Lines, a JSON array or Parquet, from all files of `source` (see `shards`).

    Line numbers continue from file to file; the place names the file and the line in it. Raises InputError at the
    first row that cannot be read.
    """
    return counted_on(map(rows_of_file, shards(source)))


def counted_on(files: Iterable[Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows of all files, with line numbers that continue from one file to the next."""
    before = 0
    for rows in files:
        line = 0
        for line, where, value in rows:
            yield before + line, where, value
        before += line


def shards(source: str | Path) -> list[Path]:
    """Return the files of `source` in order: the file itself, the files that match a pattern, or the files of a folder.

    A folder may hold one set of files that differ only in their shard numbers, or several sets of which exactly one is
    called "train...". Raises InputError if nothing matches, or if the folder is ambiguous.
    """
    if os.path.isdir(source):
        return _shards_of_folder(entered(Path(source)))
    if os.path.exists(source) or not glob.has_magic(str(source)):
        return [Path(source)]
    paths = [Path(path) for path in sorted(glob.glob(str(source))) if os.path.isfile(path)]
    if not paths:
        raise InputError(f"{source}: no file matches this pattern: give a data file, a pattern or a folder")
    _numbers(paths, source)  # a pattern may choose some shards, but of one set
    return paths


def _shards_of_folder(folder: Path) -> list[Path]:
    sets: dict[str, list[Path]] = {}
    unread, paths = [], sorted(folder.rglob("*"))
    runs = {path.parent for path in paths if path.name == "run.json"} - {folder}  # runs of ours may be in it
    for path in paths:
        name, plain = str(path.relative_to(folder)), path.name.removesuffix(".gz")
        if name.startswith(".") or path.name in DESCRIPTIONS or runs & {*path.parents} or not path.is_file():
            continue
        if plain.endswith(SUFFIXES):
            sets.setdefault(re.sub(SHARD, "*", name), []).append(path)
        elif plain.endswith(UNREAD):
            unread.append(name)
    chosen = list(sets) if len(sets) == 1 else [name for name in sets if Path(name).name.startswith("train")]
    if not sets:
        only = f" ({unread[0]} can't be read)" if unread else ""
        raise InputError(f"{folder}: a folder without data files{only}: give a JSON Lines, Parquet or TSV file")
    if len(chosen) != 1:
        choices = ", ".join(list(sets)[:6]) + (" ..." if len(sets) > 6 else "")
        raise InputError(f"{folder}: a folder with {len(sets)} sets of files ({choices}): give one, as '{folder}/NAME'")
    check_complete(sets[chosen[0]], folder)
    _refuse_unread(folder, {str(path.relative_to(folder)) for path in sets[chosen[0]]}, unread)
    return sets[chosen[0]]


def _refuse_unread(folder: Path, read: set[str], unread: list[str]) -> None:
    """Raise InputError for a shard of the set `read` in a form that is not read, unless it is there in both forms."""
    stems = {re.sub(ENDING, "", name) for name in read}
    patterns = {re.sub(SHARD, "*", f"{stem}.") for stem in stems}
    for stem, name in [(re.sub(ENDING, "", name), name) for name in unread]:
        if stem not in stems and re.sub(SHARD, "*", f"{stem}.") in patterns:
            raise InputError(f"{folder}: has the shard {name}, which can't be read: convert or unpack it, or give a "
                             "pattern of the files to read")  # fmt: skip


def check_complete(paths: list[Path], source: str | Path) -> None:
    """Raise InputError if shards are missing: names such as train-00001-of-00003 say how many there are."""
    numbers, total = _numbers(paths, source)
    first = 1 if total in numbers else 0
    if missing := sorted(set(range(first, first + total)) - numbers):
        raise InputError(f"{source}: has shards of {total}, but not number {missing[0]}: download it, or give a "
                         "pattern of the files to read")  # fmt: skip


def _numbers(paths: list[Path], source: str | Path) -> tuple[set[int], int]:
    """Return the numbers in the names of shards, and how many shards there are in all; 0 if the names do not say so."""
    found = [match.groups() for path in paths if (match := re.search(r"(\d+)-of-(\d+)", path.name))]
    totals = sorted({int(total) for _, total in found})
    if len(totals) > 1:
        raise InputError(f"{source}: has shards of {totals[0]} and of {totals[1]}, two versions of the data: give one")
    return {int(number) for number, _ in found}, (totals or [0])[0]


def named(source: str | Path) -> str:
    """Return the name of `source` for messages, with the files that are read if it is a pattern or a folder."""
    paths = shards(source)
    if paths == [Path(source)]:
        return str(source)
    return f"{source} ({paths[0].name}{f' to {paths[-1].name}, {len(paths)} files' if len(paths) > 1 else ''})"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a data file for reading bytes, unpacked if it is gzipped.

    Raises InputError if the file is missing, damaged (also while the body reads it), a git-lfs pointer or of a
    foreign format.
    """
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            refuse_pointer(path)
            for magic, cure in FOREIGN.items():
                if start.startswith(magic):
                    raise InputError(f"{path}: {cure}")
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give a JSON Lines, Parquet or TSV file") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {reason}: give a JSON Lines, Parquet or TSV file") from None


def has_objects(path: Path) -> bool:
    """Return whether the file holds JSON or Parquet, judged by its first bytes."""
    with opened(path) as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    return start.startswith((b"[", b"{", b"PAR1"))


def rows_of_file(path: Path) -> Iterator[Row]:
    """Yield each row of one file of JSON Lines, a JSON array or Parquet."""
    with opened(path) as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
        file.seek(0)
        if start.startswith(b"PAR1"):
            yield from _parquet_rows(file, path)
        elif start.startswith(b"["):
            for number, value in enumerate(_parse(file.read(), path, 1), start=1):
                yield number, f"{path}, item {number}", value
        elif path.name.removesuffix(".gz").endswith((".csv", ".tsv")) and not start.startswith(b"{"):
            raise InputError(f"{path}: CSV and TSV are not read here: convert it to JSON Lines, for instance with "
                             "pandas.read_csv(...).to_json(name, orient='records', lines=True)")  # fmt: skip
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, f"{path}, line {number}", _parse(line, path, number)


def rows_of_tsv(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Yield line, place and cells between tabs of each line that is not blank. Quotes are ordinary text."""
    with opened(path) as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip(b"\r\n"):
                where = f"{path}, line {line}"
                yield line, where, line_of(raw, where).split("\t")


def line_of(raw: bytes, where: str) -> str:
    """Return a line as text, without its end. Raises InputError if it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not valid UTF-8: convert the file to UTF-8") from None


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet, types
    except ImportError:
        raise InputError(
            f"{path}: a Parquet file, which needs pyarrow: pip install '.[parquet]', or convert it to JSON Lines"
        ) from None
    number = 0
    try:
        content = parquet.ParquetFile(file)
        counts = Counter(content.schema_arrow.names)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise InputError(f"{path}: has two columns {twice[0]!r}: rename one of the two")
        floats = [field.name for field in content.schema_arrow if types.is_floating(field.type)]
        whole = {name for name in floats if _is_whole(content, name)}
        for batch in content.iter_batches(batch_size=1024, columns=_columns_to_read(content)):
            names = batch.schema.names
            columns = [_cells(batch.column(name), name in whole) for name in names]
            for cells in zip(*columns, strict=True):
                number += 1
                row = dict(zip(names, map(_without_nulls, cells), strict=True))
                yield number, f"{path}, row {number}", row
    except InputError:
        raise
    except (OSError, ValueError, OverflowError, NotImplementedError) as error:  # pyarrow's errors are their subclasses
        reason = str(error).partition("\n")[0][:200]
        raise InputError(
            f"{path}: a Parquet file that is damaged after row {number} ({reason}): download it again"
        ) from None


def _columns_to_read(content: object) -> list[str]:
    """Return a Parquet file's columns, as the paths of the fields inside them, without times inside an object or list:
    no text is a time, and Python has no value for some of Arrow's."""
    fields = [content.schema.column(index) for index in range(len(content.schema))]
    top = set(content.schema_arrow.names)
    return [field.path for field in fields if field.path in top or field.logical_type.type not in TIMES]


def _is_whole(content: object, name: str) -> bool:
    """Return whether a column of floats has empty cells and otherwise only whole numbers: integers, which pandas turned
    into floats to make room for the empty cells."""
    column = content.read(columns=[name]).column(0)
    try:
        return column.null_count > 0 and column.cast("int64") is not None
    except (ValueError, NotImplementedError):  # a fraction, or a float of 16 bits
        return False


def _cells(column: object, is_whole: bool) -> list:
    """Return a column as Python values, with numbers as they were written. A date or time, which is not read, becomes a
    fixed date, so that a field that needs it is refused."""
    from pyarrow import types

    if types.is_temporal(column.type):
        return [date.min if is_given else None for is_given in column.is_valid().to_pylist()]
    if is_whole:
        column = column.cast("int64")
    elif types.is_float32(column.type):
        column = column.cast("string").cast("float64")  # 0.1, and not the 0.10000000149011612 nearest to it
    return column.to_pylist()


def _without_nulls(cell: object) -> object:
    """Leave out the null fields of objects inside a cell: in Parquet all objects of a column have all fields."""
    if isinstance(cell, dict):
        return {name: _without_nulls(value) for name, value in cell.items() if value is not None}
    return [_without_nulls(value) for value in cell] if isinstance(cell, list) else cell


class Written(float):
    """A number in JSON whose text is not the one that Python gives it, such as 2.10."""

    __slots__ = ("text",)

    def __str__(self) -> str:
        return self.text


def _float(text: str) -> float:
    value = float(text)
    if str(value) != text and math.isfinite(value):
        value = Written(value)
        value.text = text
    return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Return an object's fields. Raises KeyError for a name that is there twice: the last would win in silence."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return fields


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float)


def _parse(raw: bytes, path: Path, line: int) -> object:
    try:
        return JSON.decode(raw.rstrip().decode("utf-8-sig"))
    except KeyError as error:
        where = f"{path}, line {line}" if raw.count(b"\n") < 2 else path
        raise InputError(f"{where}: has an object with two fields {short(error.args[0])}: remove one") from None
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not valid UTF-8: convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line + error.lineno - 1}: broken JSON ({error.msg}): give one object per line, or an array"
        ) from None
    except RecursionError:
        raise InputError(f"{path}, line {line}: JSON nested too deeply: correct the line") from None
    except ValueError:  # Python limits the digits of an integer
        raise InputError(f"{path}, line {line}: JSON with a number of thousands of digits: correct the line") from None


def in_short(names: Iterable[object]) -> str:
    """List the names of fields or columns in a message, the first twenty of many."""
    texts = [f"{name:.80}" for name in map(str, names)]
    more = f" and {len(texts) - 20:,} more" if len(texts) > 20 else ""
    return ", ".join(texts[:20]) + more or "none"


def text_of(value: object, name: str, where: str, cure: str = "make it a text") -> str:
    """Return a text, or a number as text. Raises InputError, which names the value `name`, for anything else."""
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        kind = "a date or time, which is not read" if isinstance(value, date) else type(value).__name__
        raise InputError(f"{where}: {name} is {kind}, not a string: {cure}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("ascii", "backslashreplace").decode()
        raise InputError(f"{where}: {name} has {half}, half of a character: correct the row") from None
    return value
