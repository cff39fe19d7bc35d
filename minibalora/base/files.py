"""Reading JSON with errors that a user can act on; writing files that are never half there."""

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

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how the file begins that stands in for a large one


def refuse_pointer(path: Path) -> None:
    """Raise InputError if a file that exists is a git-lfs pointer."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
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
    """The JSON object in a file; InputError if it is missing, not UTF-8, not JSON or not an object."""
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
    """The settings in the run.json of the folder `out`, {} if there are none."""
    settings = read_json_object(out / "run.json").get("settings") if (out / "run.json").exists() else None
    return settings if isinstance(settings, dict) else {}


def check_writable(folder: Path, flag: str) -> None:
    """InputError that names the flag if nothing can be written to `folder`, which need not exist yet."""
    existing = nearest(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = f"you may not write to {existing}" if existing.is_dir() else f"{existing} is not a folder"
        raise InputError(f"{folder}: can't write there, {why}: give another {flag}")


def nearest(folder: Path) -> Path:
    """`folder`, or, as long as it does not exist, the first of the folders above it that does."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))


def check_file(path: Path, flag: str) -> None:
    """InputError that names the flag if no file can be written at `path`, in a folder that exists."""
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a folder: give another name")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"{flag} {path}: can't write there ({error.strerror}): give another folder") from None


@contextmanager
def replacing(path: Path, is_shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the body ends without error.

    is_shared: other processes may write the same file now, so each needs a temporary path of its own.
    """
    temporary = path.with_name(f".{path.name}{f'.{os.getpid()}' if is_shared else ''}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors makes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tensors_digest(text: str, *tensors: Tensor) -> str:
    """SHA-256, in hex, of a text and of the bytes of tensors, on any device. Shapes and dtypes do not count."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it becomes `path` when the body ends without error.

    InputError if `path` exists, unless as an empty folder, or can't be made.
    """
    path = path.absolute()
    is_free = not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
    if not is_free or path == Path.cwd():
        raise InputError(f"{path}: exists already: give another --out")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
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
    """A function that appends an object to a JSON Lines file. A kill costs at most the line that is being written."""
    with open(path, "a", encoding="utf-8") as file:

        def append(entry: dict) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield append


def keep_lines(path: Path, is_kept: Callable[[dict], bool]) -> list[dict]:
    """Remove all other lines from a JSON Lines file, and those that a kill damaged. Returns the objects that are kept;
    [] if there is no file."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and is_kept(value):
            kept.append((line, value))
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line, _ in kept), encoding="utf-8")
    return [value for _, value in kept]


def is_full_disk(error: Exception) -> bool:
    """Judged by the text, because safetensors does not pass the error number on."""
    return any(text in str(error) for text in ("No space left", "quota exceeded"))
