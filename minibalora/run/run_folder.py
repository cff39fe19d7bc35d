"""The folder of a run: checks before it is used, its settings and its log."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch

from minibalora.base import cli, distributed
from minibalora.base.errors import InputError, is_failed_write
from minibalora.base.files import (
    appending,
    check_file,
    check_writable,
    keep_lines,
    recorded_settings,
    temporary_of,
    write_json,
)

RUN_FILES = ("run.json", "log.jsonl", "report.json", "checkpoint", "model", "records.jsonl", "summary.json")
RUN_FILES += ("adapter_config.json", "adapter_model.safetensors", "eval-before.jsonl", "eval-after.jsonl")
RUN_FILES += ("chat_template.jinja",)
# A user who is short of memory must be free to change these on --resume; micro_batch_size changes the spectral term a
# little. Model, teacher and data may have moved, so their digests are compared instead of their paths.
MAY_CHANGE_ON_RESUME = set(
    "model data eval eval_task retain retain_every teacher out features init_cache teacher_cache resume save_every "
    "adapter_rank device micro_batch_size grad_checkpoint compile tf32 fsdp plain".split()
)


def check_apart(out: Path, model: str | Path, data: str | None) -> None:
    """Raise InputError if `out` is also the folder of the model or of the data: our files would change what other tools
    load there, or count as data."""
    for flag, path in (("--model", model), ("--data", data)):
        if path is not None and os.path.realpath(path) == os.path.realpath(out):
            raise InputError(f"--out {out}: is also the folder in {flag}: give another --out")


def check_out(out: Path, resume: bool) -> None:
    """Raise InputError if `out` can't hold this run: not writable, used by another run, or nothing to resume."""
    used = [name for name in RUN_FILES if os.path.lexists(out / name)]
    if resume and not os.path.isfile(out / "run.json"):
        if used:
            raise InputError(f"{out}: run.json missing: put it back from a copy, or start again with another --out")
        raise InputError(f"{out}: holds no run to resume: leave --resume out to start one")
    if used and not resume:
        raise InputError(
            f"{out}: holds a run already ({used[0]}): give another --out, or --resume to continue that run"
        )
    check_writable(out, "--out")


def check_features(path: Path | None, out: Path, resume: bool) -> None:
    """Raise InputError if --features names a file that can't be written or that exists: before training, not after."""
    if path is None:
        return
    if path.absolute().parent == out.absolute():
        if path.name in RUN_FILES:
            raise InputError(f"--features {path}: is a file of the run itself: give another name")
        check_writable(temporary_of(path), "--features")  # a name that fits; `out` may not exist yet
        return
    if os.path.exists(path) and not (resume and recorded_settings(out).get("features") == str(path)):
        raise InputError(f"--features {path}: exists already: give another name")
    check_file(path, "--features")


def plain_settings(flags: dict) -> dict:
    """Return the flags by name, with values that JSON can hold."""
    plain = int | float | list | None
    return {name: value if isinstance(value, plain) else str(value) for name, value in flags.items()}


def check_settings(out: Path, settings: dict, may_change: set[str] = MAY_CHANGE_ON_RESUME) -> None:
    """Raise InputError, which names the first setting that differs from the run in `out`."""
    recorded = recorded_settings(out)
    if recorded.get("is_toy") is False and settings.get("is_toy"):
        raise InputError(f"the run in {out} had --model and --data: give the whole command again, with --resume")
    for name, value in settings.items():
        if name not in may_change and recorded.get(name) != value:
            flag, was, mend = cli.flag(name), recorded.get(name), "give the same, or another --out"
            if name.endswith("_digest"):
                raise InputError(
                    f"{flag.removesuffix('-digest')} differs from that of the run in {out} ({name}): {mend}"
                )
            raise InputError(f"{flag} is {value}, but the run in {out} has {was}: {mend}")


def start_run(out: Path, settings: dict) -> None:
    """Make the folder and write run.json, with the settings and the versions of the libraries."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: str(module.__version__) for module in (torch, numpy, safetensors, tokenizers)}
        write_json(out / "run.json", {"settings": settings, "versions": versions})
    except OSError as error:
        if is_failed_write(error):
            raise
        raise InputError(f"{out}: can't write there ({error.strerror}): give another --out") from None


@contextmanager
def open_log(out: Path, step: int) -> Iterator[Callable[[dict], None]]:
    """Remove the lines after the checkpoint's `step` from log.jsonl. Give a function that appends a line to it, on
    rank 0, and does nothing on other ranks."""
    if not distributed.is_main():
        yield lambda entry: None
        return
    path = out / "log.jsonl"
    keep_lines(path, lambda entry: type(entry.get("step")) is int and entry["step"] <= step)
    with appending(path) as log:
        yield log


def logged(out: Path) -> list[dict]:
    """Return the undamaged lines of log.jsonl; [] without a log."""
    path, entries = out / "log.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]
