"""The checkpoint of a run, from which --resume continues exactly: three files in the run's folder, in checkpoint/.

initial.safetensors   A₀, B₀ and the first values of a new head; never changes
state.safetensors     all that steps change, and Adam's moments, at the last step that was saved
best.safetensors      all that steps change, at the best epoch of a classifier
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
from minibalora.base.errors import InputError, is_out_of_memory
from minibalora.base.files import replacing, tensors_digest
from minibalora.lowrank import initial_values
from minibalora.run.run_folder import check_settings, logged
from minibalora.variants import untrained_state

INITIAL, STATE, BEST = "initial.safetensors", "state.safetensors", "best.safetensors"
ANEW = "start again with another --out"


def resumed_step(out: Path, settings: dict, steps: int) -> int | None:
    """Return the step of the checkpoint in `out`; None if the run was stopped before its first checkpoint.

    Raises InputError if the run in `out` has other settings, if a file of its checkpoint is missing or damaged, or if
    the checkpoint is of a step beyond `steps`.
    """
    check_settings(out, settings)
    check_complete(out)
    step = checkpoint_step(out)
    best = out / "checkpoint" / BEST
    if best.exists():
        with _readable_checkpoint(best), safe_open(best, "pt"):
            pass  # fails now, not after hours of training
    if step is not None and not 0 <= step <= steps:
        raise InputError(f"{out}: its checkpoint is of step {step}, but the run has {steps}: {ANEW}")
    return step


def check_complete(out: Path) -> None:
    """Raise InputError if the checkpoint in `out` lacks a file. A folder without any checkpoint is complete."""
    folder = out / "checkpoint"
    there = {name for name in (INITIAL, STATE, BEST) if (folder / name).exists()}
    if not there or (there == {INITIAL} and not (out / "log.jsonl").exists()):  # killed while saving step 0
        return
    needed = [INITIAL, STATE]
    if any(entry.get("dev") is not None for entry in logged(out)):
        needed.append(BEST)
    missing = [name for name in needed if name not in there]
    if missing:
        raise InputError(f"{folder}: {' and '.join(missing)} missing: put it back from a copy, or {ANEW}")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def changing_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all that the steps of a run change: the trained parameters, and what a variant changes besides them."""
    return trained_parameters(model) | untrained_state(model)


def trained_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the trained parameters, in hex: it tells answers of two states of the model apart."""
    return tensors_digest("", *trained_parameters(model).values())


def save_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write state.safetensors after `step` steps; at step 0, write initial.safetensors first.

    All ranks have the same values, so rank 0 writes them.
    """
    if not distributed.is_main():
        return
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    if step == 0:
        with replacing(folder / INITIAL) as temporary:
            save_file(initial_values(model), temporary)
    tensors = {f"parameter/{name}": tensor.detach() for name, tensor in changing_tensors(model).items()}
    for name, parameter in trained_parameters(model).items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    with replacing(folder / STATE) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})


def checkpoint_step(out: Path) -> int | None:
    """Return the step of the checkpoint, None if there is none. Raises InputError if the checkpoint can't be read."""
    if not (out / "checkpoint" / STATE).exists():
        return None
    with _open_checkpoint(out) as (_, state):
        return int(state.metadata()["step"])


@torch.no_grad()
def load_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the checkpoint into the model and the optimizer. Raises InputError if it does not fit them."""
    names = {parameter: name for name, parameter in trained_parameters(model).items()}
    load_initial_values(out, model)
    with _open_checkpoint(out) as (_, state):
        for name, tensor in changing_tensors(model).items():
            tensor.copy_(state.get_tensor(f"parameter/{name}"))
        step = int(state.metadata()["step"])
        if step > 0:
            in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                index: {moment: state.get_tensor(f"{moment}/{name}").clone() for moment in ("exp_avg", "exp_avg_sq")}
                | {"step": torch.tensor(float(step))}
                for index, name in enumerate(in_order)
            }  # cloned: safetensors returns views of the file, which the next checkpoint replaces
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})


@torch.no_grad()
def load_initial_values(out: Path, model: nn.Module) -> None:
    """Load A₀, B₀ and the first values of a new head into the model, as the run in `out` started with them."""
    with _open_checkpoint(out) as (initial, _):
        for name, tensor in initial_values(model).items():
            tensor.copy_(initial.get_tensor(name))


def keep_best(out: Path, model: nn.Module, step: int, score: float) -> None:
    """Write best.safetensors if no earlier step has a score as high. NaN counts as the lowest score.

    A file of a later step was written before the run was stopped and resumed from an earlier step: it is overwritten.
    """
    score = -math.inf if math.isnan(score) else score
    path = out / "checkpoint" / BEST
    if path.exists():
        with _readable_checkpoint(path), safe_open(path, "pt") as best:
            if int(best.metadata()["step"]) < step and float(best.metadata()["score"]) >= score:
                return
    tensors = {name: tensor.detach() for name, tensor in changing_tensors(model).items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "score": str(score)})


@torch.no_grad()
def load_best(out: Path, model: nn.Module) -> int:
    """Load the state of the best step into the model. Returns that step."""
    path = out / "checkpoint" / BEST
    with _readable_checkpoint(path), safe_open(path, "pt") as best:
        for name, tensor in changing_tensors(model).items():
            tensor.copy_(best.get_tensor(name))
        return int(best.metadata()["step"])


@contextmanager
def _open_checkpoint(out: Path) -> Iterator[tuple]:
    folder = out / "checkpoint"
    with (
        _readable_checkpoint(folder),
        safe_open(folder / INITIAL, "pt") as initial,
        safe_open(folder / STATE, "pt") as state,
    ):
        yield initial, state


@contextmanager
def _readable_checkpoint(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path}: not a readable checkpoint ({error}): {ANEW}") from None
