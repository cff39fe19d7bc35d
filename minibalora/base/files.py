"""Read JSON files with clear errors; write files whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minibalora.base.errors import InputError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the first bytes of a git-lfs pointer


def refuse_pointer(path: Path) -> None:
    """Raise InputError if the path is a git-lfs pointer."""
    if path.is_file():
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        if is_pointer:
            raise InputError(f"{path}: a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def entered(folder: Path) -> Path:
    """Return the snapshot inside a folder of the Hub's cache (`models--org--name`), any other folder unchanged.

    The snapshot is the one that refs/main names, or the only one. Raises InputError if there are several or none.
    """
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if not os.path.isdir(snapshots):
        return folder
    names = sorted(path.name for path in snapshots.iterdir())
    chosen = main.read_text().strip() if main.is_file() else None
    if chosen not in names and len(names) != 1:
        listed = f"{len(names)} snapshots ({', '.join(names)})" if names else "no snapshot"
        raise InputError(f"{folder}: a folder of the Hub's cache with {listed}: give {snapshots}/NAME")
    return snapshots / (chosen if chosen in names else names[0])


def read_json_object(path: Path) -> dict:
    """Return the JSON object in a file. Raises InputError if it is missing, not UTF-8, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give the folder that holds it") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise InputError(f"{path}: not valid JSON ({error}): mend it or download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not an object: mend it or download it again")
    return value


def recorded_settings(out: Path) -> dict:
    """Return the settings in the run.json of the folder `out`; {} if there are none."""
    settings = read_json_object(out / "run.json").get("settings") if (out / "run.json").exists() else None
    return settings if isinstance(settings, dict) else {}


def check_writable(folder: Path, flag: str) -> None:
    """Check that files can be written to `folder`, which need not exist: try it in a temporary folder where the missing
    folders would be. Raises InputError, which names the flag."""
    existing = nearest(folder).absolute()
    missing = folder.absolute().relative_to(existing)
    try:
        if missing.parts and (existing / missing.parts[0]).is_symlink():
            raise OSError(errno.ENOENT, "a broken link")
        with tempfile.TemporaryDirectory(dir=existing) as temporary:
            trial = Path(temporary, missing)
            trial.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=trial).close()
    except OSError as error:
        raise InputError(f"{flag} {folder}: can't write there ({error.strerror}): give another folder") from None


def nearest(folder: Path) -> Path:
    """Return `folder` if it exists, else the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))


def check_file(path: Path, flag: str) -> None:
    """Check that a file can be written at `path`, in a folder that exists. Raises InputError, which names the flag."""
    if os.path.isdir(path):  # Path.is_dir raises an error for a name that is too long
        raise InputError(f"{flag} {path}: is a folder: give another name")
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
            temporary_of(Path(folder, path.name)).touch()
    except OSError as error:
        raise InputError(f"{flag} {path}: can't write there ({error.strerror}): give another path") from None


def temporary_of(path: Path) -> Path:
    """Return the temporary name, beside `path`, under which `replacing` and `new_folder` write."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path, is_shared: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when the body ends without an error.

    is_shared: other processes may write the same file now, so the temporary name contains the process number.
    """
    temporary = temporary_of(path.with_name(f"{path.name}.{os.getpid()}") if is_shared else path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors lets only the owner read its files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tensors_digest(text: str, *tensors: Tensor) -> str:
    """Return the SHA-256, in hex, of a text and of the tensors' bytes. Shapes and dtypes do not count."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `path` when the body ends without an error.

    Raises InputError if `path` can't be made, or exists and is not an empty folder.
    """
    path = path.absolute()
    is_free = not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
    if not is_free or path == Path.cwd():
        raise InputError(f"{path}: exists already: give another --out")
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"{path}: can't write there ({error.strerror}): give another --out") from None
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def appending(path: Path) -> Iterator[Callable[[dict], None]]:
    """Give a function that appends an object to a JSON Lines file. A kill damages at most the last line."""
    with open(path, "a", encoding="utf-8") as file:

        def append(entry: dict) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield append


def keep_lines(path: Path, is_kept: Callable[[dict], bool]) -> list[dict]:
    """Remove the lines for which `is_kept` is false, and damaged ones, from a JSON Lines file. Returns the remaining
    objects; [] if there is no file."""
    if not path.exists():
        return []
    lines, objects = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and is_kept(value):
            lines.append(f"{line}\n")
            objects.append(value)
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return objects
