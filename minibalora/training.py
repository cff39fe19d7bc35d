"""What the training scripts share: exit status, learning rate, stop signals, the run's folder, checkpoints."""

import json
import math
import os
import platform
import signal
import sys
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

from minibalora.errors import InputError
from minibalora.files import read_json_object, replacing, write_json
from minibalora.lowrank import adapted_layers

RUN_FILES = ("run.json", "log.jsonl", "checkpoint", "adapter_config.json", "adapter_model.safetensors", "model")
# These move the work or cut it otherwise, which a user short of memory must be free to do; with micro_batch_size the
# spectral term changes a little. Model and data may have moved, too: their digests are compared instead.
MAY_CHANGE_ON_RESUME = {"model", "data", "eval", "out", "resume", "save_every"}
MAY_CHANGE_ON_RESUME |= {"device", "micro_batch_size", "grad_checkpoint", "compile"}


def run_script(main: Callable[[], int]) -> None:
    """Exit with main's status; 2 and one line for what the user can mend, 1 and one line for a full disk or memory."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    try:
        sys.exit(main())
    except InputError as error:
        _exit_with_line(2, error)
    except KeyboardInterrupt:
        _exit_with_line(130, "interrupted outside the training loop: a run that has begun goes on with --resume")
    except torch.OutOfMemoryError:
        _exit_with_line(1, "out of GPU memory: lower --micro-batch-size or add --grad-checkpoint, with --resume")
    except (OSError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        _exit_with_line(1, f"the disk is full ({error}): make room and go on with --resume; the checkpoint is intact")


def _exit_with_line(status: int, message: object) -> None:
    line = " ".join(str(message).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


def _is_full_disk(error: Exception) -> bool:
    """By the text, for safetensors passes no error number on."""
    return any(text in str(error) for text in ("No space left", "quota exceeded"))


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """The rate of `step` (from 0) of `steps`: a linear rise over the first share, then cosine or linear down to 0."""
    warm = math.ceil(warmup_ratio * steps)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * ((1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; a second signal acts at once, as it did before."""
    received = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_out(out: Path, resume: bool) -> None:
    """InputError if `out` can't hold this run: not writable, used by another run, or, to resume, without one."""
    if resume and not os.path.isfile(out / "run.json"):
        raise InputError(f"{out}: holds no run to resume: leave --resume out to start one")
    used = [name for name in RUN_FILES if os.path.lexists(out / name)]
    if used and not resume:
        raise InputError(f"{out}: holds a run already ({used[0]}): go on with it by --resume, or give another --out")
    existing = next(path for path in (out, *out.absolute().parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{out}: can't write there, {existing} is no folder that you may write to: give another --out")


def check_settings(out: Path, settings: dict) -> None:
    """InputError that names the first setting in which this run is not the one in `out`."""
    recorded = read_json_object(out / "run.json").get("settings")
    recorded = recorded if isinstance(recorded, dict) else {}
    if recorded.get("is_toy") is False and settings["is_toy"]:
        raise InputError(f"the run in {out} was given --model and --data: give the whole command again, and --resume")
    for name, value in settings.items():
        if name not in MAY_CHANGE_ON_RESUME and recorded.get(name) != value:
            flag = name if "digest" in name else f"--{name.replace('_', '-')}"
            was = recorded.get(name)
            raise InputError(f"{flag} is {value}, but the run in {out} has {was}: use the same, or another --out")


def start_run(out: Path, settings: dict) -> None:
    """Make the folder and write run.json: settings and versions."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version()}
        versions |= {module.__name__: str(module.__version__) for module in (torch, numpy, safetensors, tokenizers)}
        write_json(out / "run.json", {"settings": settings, "versions": versions})
    except OSError as error:
        if _is_full_disk(error):
            raise
        raise InputError(f"{out}: can't write there ({error.strerror}): give another --out") from None


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """checkpoint/state.safetensors: trained parameters and Adam's moments after `step` steps, in one atomic file.

    Step 0 also writes checkpoint/initial.safetensors, the factors A₀ and B₀, which never change.
    """
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    if step == 0:
        with replacing(folder / "initial.safetensors") as temporary:
            save_file(_initial_factors(model), temporary)
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
    with _open_checkpoint(out) as (initial, state):
        for name, buffer in _initial_factors(model).items():
            buffer.copy_(initial.get_tensor(name))
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


@contextmanager
def _open_checkpoint(out: Path) -> Iterator[tuple]:
    folder = out / "checkpoint"
    try:
        with (
            safe_open(folder / "initial.safetensors", "pt") as initial,
            safe_open(folder / "state.safetensors", "pt") as state,
        ):
            yield initial, state
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: not a readable checkpoint ({error}): start anew") from None


def _initial_factors(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = adapted_layers(model)
    return {f"{name}.{leaf}": buffer for name, layer in layers for leaf, buffer in layer.named_buffers()}


@contextmanager
def open_log(out: Path, step: int) -> Iterator[Callable[[dict], None]]:
    """A function that appends one JSON line to log.jsonl; what lies beyond the checkpoint's `step` is cut off first."""
    path = out / "log.jsonl"
    if path.exists():
        kept = [
            line
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if _is_logged_by(line, step)
        ]
        with replacing(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    with open(path, "a", encoding="utf-8") as file:

        def log(entry: dict) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        yield log


def _is_logged_by(line: str, step: int) -> bool:
    """False for a later step's line and for one that is damaged, as by a kill."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far; on a CPU, the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # the standard library can't tell there
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
