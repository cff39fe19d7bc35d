"""Checks of output paths before a run, and files that are written whole or not at all."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minibalora.base.errors import is_failed_write
from minibalora.base.files import appending, check_file, check_writable, replacing

LONG = "x" * 300


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path, reason",
    [
        ("file", "Not a directory"),
        ("file/out", "Not a directory"),
        (LONG, "File name too long"),
        (f"new/{LONG}/out", "File name too long"),
        ("link", "a broken link"),
        ("link/out", "a broken link"),
        ("/proc/out", "No such file"),
    ],
    ids=["a file", "in a file", "long", "long below", "link", "below a link", "proc"],
)
def test_a_folder_that_can_not_be_made_is_refused_with_the_reason(path, reason, place, refuses):
    refuses(lambda: check_writable(Path(path), "--out"), f"--out {path}", reason)
    assert sorted(file.name for file in place.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("path", ["out", "a/b/c", ".", "a/../out"])
def test_a_folder_that_can_be_made_is_accepted_and_not_made(path, place):
    check_writable(Path(path), "--out")
    assert sorted(file.name for file in place.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("path", [".", "file/plot.png", LONG, "x" * 253, "absent/plot.png", "/proc/plot.png"])
def test_a_file_that_can_not_be_written_is_refused(path, place, refuses):
    """A name of 253 characters is allowed, but its temporary name is longer."""
    refuses(lambda: check_file(Path(path), "--features"), f"--features {path}")
    check_file(Path("plot.png"), "--features")
    assert sorted(file.name for file in place.iterdir()) == ["file", "link"]


@contextmanager
def small_files() -> Iterator[None]:
    """Limit files to 2 kB, as `ulimit -f` does. Python ignores the signal, so writing raises an error.

    No fixture: pytest reports before a fixture ends, and its own output may be a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_grows_too_large_leaves_the_previous_one_whole(tmp_path):
    path = tmp_path / "state.safetensors"
    save_file({"A": torch.ones(10)}, path)
    with pytest.raises(Exception) as caught, small_files(), replacing(path) as temporary:
        save_file({"A": torch.ones(1000)}, temporary)
    assert is_failed_write(caught.value)
    assert len(load_file(path)["A"]) == 10 and list(tmp_path.iterdir()) == [path]


def test_a_log_that_grows_too_large_is_a_failed_write(tmp_path):
    with pytest.raises(OSError) as caught, small_files(), appending(tmp_path / "log.jsonl") as append:
        for step in range(100):
            append({"step": step, "text": "x" * 50})
    assert is_failed_write(caught.value)
