"""The checkpoints in a run's folder, from which it goes on exactly: checkpoint/*.safetensors.

initial.safetensors   A₀, B₀ and what a new head began with; never changes
state.safetensors     what is trained and Adam's moments, of the last step saved
best.safetensors      what is trained, of the best epoch of a classifier
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minibalora.base import distributed
from minibalora.base.errors import InputError
from minibalora.base.files import replacing, tensors_digest
from minibalora.lowrank import initial_values
from minibalora.run.run_folder import check_settings


def resumed_step(out: Path, settings: dict, steps: int) -> int | None:
    """The step of the checkpoint in `out` to go on from; None if the run was stopped before its first checkpoint.

    InputError if the run in `out` is another one than `settings`, or its checkpoint can't be of a run of `steps`.
    """
    check_settings(out, settings)
    step = checkpoint_step(out)
    best = out / "checkpoint" / "best.safetensors"
    if best.exists():
        with _readable_checkpoint(best), safe_open(best, "pt"):
            pass  # now, not after hours of training
    if step is not None and not 0 <= step <= steps:
        raise InputError(f"{out}: its checkpoint is of step {step}, but the run has {steps}: start anew")
    return step


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_digest(model: nn.Module) -> str:
    """SHA-256 of what was trained, in hex: answers of another state of the model are not this one's."""
    return tensors_digest("", *trained_parameters(model).values())


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
        for name, tensor in initial_values(model).items():
            tensor.copy_(initial.get_tensor(name))


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
