"""Rows of a JSON Lines file or a JSON array, packed with gzip or not; an error names the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from minibalora.base.errors import InputError


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Line and value of each row of a JSON Lines file or JSON array; InputError names the line of the first bad one."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            file.seek(0)
            if is_array:
                yield from enumerate(_parse(file.read(), path, 1), start=1)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, _parse(line, path, number)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give a JSON Lines file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}: give a JSON Lines file") from None


def _parse(raw: bytes, path: Path, line: int) -> object:
    if raw.startswith(b"PAR1"):
        raise InputError(f"{path}: a Parquet file: convert it to JSON Lines")
    try:
        return json.loads(raw.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not valid UTF-8: convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line + error.lineno - 1}: broken JSON ({error.msg}): give an object a line, or an array"
        ) from None
    except RecursionError:
        raise InputError(f"{path}, line {line}: JSON nested too deeply: mend the line") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError(f"{path}, line {line}: JSON with a number of thousands of digits: mend the line") from None
