"""The folder of a run: whether it may be used, its settings and its log."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch

from minibalora.base import cli, distributed
from minibalora.base.errors import InputError
from minibalora.base.files import (
    appending,
    check_file,
    check_writable,
    is_full_disk,
    keep_lines,
    recorded_settings,
    write_json,
)

RUN_FILES = ("run.json", "log.jsonl", "report.json", "checkpoint", "model", "records.jsonl", "summary.json")
RUN_FILES += ("adapter_config.json", "adapter_model.safetensors", "eval-before.jsonl", "eval-after.jsonl")
RUN_FILES += ("chat_template.jinja",)
# These move the work or cut it otherwise, which a user short of memory must be free to do; with micro_batch_size the
# spectral term changes a little. Model, teacher and data may have moved, too: their digests are compared instead.
MAY_CHANGE_ON_RESUME = set(
    "model data eval eval_task teacher out features init_cache teacher_cache resume save_every adapter_rank "
    "device micro_batch_size grad_checkpoint compile tf32 fsdp plain".split()
)


def check_out(out: Path, resume: bool) -> None:
    """InputError if `out` can't hold this run: not writable, used by another run, or, to resume, without one."""
    if resume and not os.path.isfile(out / "run.json"):
        raise InputError(f"{out}: holds no run to resume: leave --resume out to start one")
    used = [name for name in RUN_FILES if os.path.lexists(out / name)]
    if used and not resume:
        raise InputError(
            f"{out}: holds a run already ({used[0]}): give another --out, or go on with training by --resume"
        )
    check_writable(out, "--out")


def check_features(path: Path | None, out: Path, resume: bool) -> None:
    """InputError if --features can't be written, which would be known only after training, or is no place for it."""
    if path is None:
        return
    if path.absolute().parent == out.absolute():
        if path.name in RUN_FILES:
            raise InputError(f"--features {path}: is a file of the run itself: give another name")
        return  # check_out has seen to it
    if path.exists() and not (resume and recorded_settings(out).get("features") == str(path)):
        raise InputError(f"--features {path}: exists already: give another name")
    check_file(path, "--features")


def plain_settings(given: dict) -> dict:
    """Flags by their names, as JSON can hold them."""
    plain = int | float | list | None
    return {name: value if isinstance(value, plain) else str(value) for name, value in given.items()}


def check_settings(out: Path, settings: dict, may_change: set[str] = MAY_CHANGE_ON_RESUME) -> None:
    """InputError that names the first setting in which this run is not the one in `out`."""
    recorded = recorded_settings(out)
    if recorded.get("is_toy") is False and settings.get("is_toy"):
        raise InputError(f"the run in {out} was given --model and --data: give the whole command again, and --resume")
    for name, value in settings.items():
        if name not in may_change and recorded.get(name) != value:
            flag, was, same = cli.flag(name), recorded.get(name), "use the same, or another --out"
            if name.endswith("_digest"):
                raise InputError(f"{flag.removesuffix('-digest')} is not what the run in {out} had ({name}): {same}")
            raise InputError(f"{flag} is {value}, but the run in {out} has {was}: {same}")


def start_run(out: Path, settings: dict) -> None:
    """Make the folder and write run.json: settings and versions."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: str(module.__version__) for module in (torch, numpy, safetensors, tokenizers)}
        write_json(out / "run.json", {"settings": settings, "versions": versions})
    except OSError as error:
        if is_full_disk(error):
            raise
        raise InputError(f"{out}: can't write there ({error.strerror}): give another --out") from None


@contextmanager
def open_log(out: Path, step: int) -> Iterator[Callable[[dict], None]]:
    """A function that appends one JSON line to log.jsonl, where rank 0 calls it; what lies beyond the checkpoint's
    `step` is cut off first."""
    if not distributed.is_main():
        yield lambda entry: None
        return
    path = out / "log.jsonl"
    keep_lines(path, lambda entry: type(entry.get("step")) is int and entry["step"] <= step)
    with appending(path) as log:
        yield log
