"""The folder of a run: its settings, its log, and the checkpoints from which it goes on exactly."""

import math
import os
import platform
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minibalora.base import cli, distributed
from minibalora.base.errors import InputError
from minibalora.base.files import (
    appending,
    check_writable,
    is_full_disk,
    keep_lines,
    read_json_object,
    replacing,
    write_json,
)
from minibalora.lowrank import initial_values

RUN_FILES = ("run.json", "log.jsonl", "report.json", "checkpoint", "model", "records.jsonl", "summary.json")
RUN_FILES += ("adapter_config.json", "adapter_model.safetensors", "eval-before.jsonl", "eval-after.jsonl")
# These move the work or cut it otherwise, which a user short of memory must be free to do; with micro_batch_size the
# spectral term changes a little. Model, teacher and data may have moved, too: their digests are compared instead.
MAY_CHANGE_ON_RESUME = {
    "model",
    "data",
    "eval",
    "eval_task",
    "teacher",
    "out",
    "features",
    "init_cache",
    "resume",
    "save_every",
    "adapter_rank",
}
MAY_CHANGE_ON_RESUME |= {"device", "micro_batch_size", "grad_checkpoint", "compile", "tf32", "teacher_cache", "fsdp"}


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


def plain_settings(args: Namespace) -> dict:
    """The flags as JSON can hold them."""
    plain = int | float | list | None
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}


def recorded_settings(out: Path) -> dict:
    """The settings in the run.json of the folder `out`, {} if there are none."""
    settings = read_json_object(out / "run.json").get("settings") if (out / "run.json").exists() else None
    return settings if isinstance(settings, dict) else {}


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


def resumed_step(args: Namespace, settings: dict, steps: int) -> int | None:
    """The step of the checkpoint to go on from; None for a new run and for one stopped before its first checkpoint.

    InputError if the run in --out is another one than `settings`, or its checkpoint can't be of a run of `steps`.
    """
    if not args.resume:
        return None
    check_settings(args.out, settings)
    step = checkpoint_step(args.out)
    best = args.out / "checkpoint" / "best.safetensors"
    if best.exists():
        with _readable_checkpoint(best), safe_open(best, "pt"):
            pass  # now, not after hours of training
    if step is not None and not 0 <= step <= steps:
        raise InputError(f"{args.out}: its checkpoint is of step {step}, but the run has {steps}: start anew")
    return step


def first_step(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, resumed: int | None) -> int:
    """Put the checkpoint of step `resumed` into model and optimizer, or, if that is None, write that of step 0."""
    if resumed is None:
        save_checkpoint(out, model, optimizer, 0)
        return 0
    load_checkpoint(out, model, optimizer)
    print(f"resumed at step {resumed}")
    return resumed


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """checkpoint/state.safetensors: trained parameters and Adam's moments after `step` steps, in one atomic file.

    Step 0 also writes checkpoint/initial.safetensors, which never changes: A₀, B₀ and a new classifier head's values.
    All ranks have the same, so rank 0 writes it.
    """
    if not distributed.is_main():
        return
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    if step == 0:
        with replacing(folder / "initial.safetensors") as temporary:
            save_file(initial_values(model), temporary)
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    with replacing(folder / "state.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})


def checkpoint_step(out: Path) -> int | None:
    """The step of the checkpoint, None if the run was stopped before its first; InputError if it can't be read."""
    if not (out / "checkpoint" / "state.safetensors").exists():
        return None
    with _open_checkpoint(out) as (_, state):
        return int(state.metadata()["step"])


@torch.no_grad()
def load_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint into model and optimizer; InputError if it does not fit them."""
    parameters = trained_parameters(model)
    load_initial_values(out, model)
    with _open_checkpoint(out) as (_, state):
        for name, parameter in parameters.items():
            parameter.copy_(state.get_tensor(f"parameter/{name}"))
        step = int(state.metadata()["step"])
        if step > 0:
            moments = {
                index: {moment: state.get_tensor(f"{moment}/{name}").clone() for moment in ("exp_avg", "exp_avg_sq")}
                | {"step": torch.tensor(float(step))}
                for index, name in enumerate(parameters)
            }  # cloned, for a tensor of safetensors is a view of its file, which the next checkpoint replaces
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})


@torch.no_grad()
def load_initial_values(out: Path, model: nn.Module) -> None:
    """Put A₀, B₀ and what a new head began with into the model, as they were at the start of the run in `out`."""
    with _open_checkpoint(out) as (initial, _):
        for name, buffer in initial_values(model).items():
            buffer.copy_(initial.get_tensor(name))


def keep_best(out: Path, model: nn.Module, step: int, score: float) -> None:
    """checkpoint/best.safetensors: what is trained, as of the step with the highest score so far, the first of equals.

    A NaN counts as lowest. A file of a later step is of a run that was stopped after it and resumed before it: that
    step will come again.
    """
    score = -math.inf if math.isnan(score) else score
    path = out / "checkpoint" / "best.safetensors"
    if path.exists():
        with _readable_checkpoint(path), safe_open(path, "pt") as best:
            if int(best.metadata()["step"]) < step and float(best.metadata()["score"]) >= score:
                return
    tensors = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "score": str(score)})


@torch.no_grad()
def load_best(out: Path, model: nn.Module) -> int:
    """Put the best step's parameters into the model; returns that step."""
    path = out / "checkpoint" / "best.safetensors"
    with _readable_checkpoint(path), safe_open(path, "pt") as best:
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(best.get_tensor(name))
        return int(best.metadata()["step"])


@contextmanager
def _open_checkpoint(out: Path) -> Iterator[tuple]:
    folder = out / "checkpoint"
    with (
        _readable_checkpoint(folder),
        safe_open(folder / "initial.safetensors", "pt") as initial,
        safe_open(folder / "state.safetensors", "pt") as state,
    ):
        yield initial, state


@contextmanager
def _readable_checkpoint(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error}): start anew") from None


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
