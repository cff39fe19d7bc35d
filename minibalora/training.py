"""What the training scripts share: exit status, adapting, the loop, stop signals, the run's folder, checkpoints."""

import json
import math
import os
import platform
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from minibalora.data import Row, steps_per_epoch
from minibalora.errors import InputError
from minibalora.files import read_json_object, replacing, write_json
from minibalora.lowrank import adapt, initial_values
from minibalora.objective import weighted_sum

TERMS = ("task", "consistency", "diversity", "svd", "non_target_kl")
RUN_FILES = ("run.json", "log.jsonl", "report.json", "checkpoint", "model")
RUN_FILES += ("adapter_config.json", "adapter_model.safetensors")
# These move the work or cut it otherwise, which a user short of memory must be free to do; with micro_batch_size the
# spectral term changes a little. Model, teacher and data may have moved, too: their digests are compared instead.
MAY_CHANGE_ON_RESUME = {"model", "data", "eval", "teacher", "out", "features", "resume", "save_every"}
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


def adapt_model(model: nn.Module, args: Namespace, is_resumed: bool) -> None:
    """lowrank.adapt with a progress bar; a resumed run takes its factors from the checkpoint and waits for no SVD."""
    init = "pissa_niter_0" if is_resumed and args.init != "lora" else args.init
    bar = iter if is_resumed else partial(tqdm, desc=init, unit="layer", dynamic_ncols=True, leave=False)
    try:
        adapt(model, args.rank, args.alpha, init, args.targets, progress=bar)
    except ValueError as error:
        raise InputError(f"--rank or --targets: {error}") from None


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass, which computes the block once more: less memory, slower."""
    for blocks in model.modules():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def steps_of_run(args: Namespace, rows: int) -> int:
    steps = args.epochs * steps_per_epoch(rows, args.batch_size)
    return min(steps, args.max_steps or steps)


def train(
    args: Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    steps: int,
    gradients: Callable[[int, list[int]], tuple[list[float], dict[str, float], list[list[Row]]]],
    after_step: Callable[[int], dict] = lambda step: {},
) -> tuple[int, list[int]]:
    """Go from `step` to `steps`, both counted in steps done; returns the step reached and the signals that stopped it.

    gradients(step, stop) adds the gradients of one step and returns each micro-batch's part of the loss, the step's
    terms, and the micro-batches. Once `stop` is not empty it may end early: the step is dropped, and the checkpoint is
    that of the last whole one. after_step(step), called after the update, returns what the log's entry has besides.
    """
    parameters = list(trained_parameters(model).values())
    model.train()
    bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
    with open_log(args.out, step) as log, stop_signals() as stop, bar:
        while step < steps and not stop:
            started = time.perf_counter()
            seed_step(args.seed, step)
            # Where the weights themselves are trained, they are float32, and --dtype is that of the activations.
            with torch.autocast(args.device.type, args.dtype, args.method == "full" and args.dtype != torch.float32):
                losses, terms, micro = gradients(step, stop)
            if stop:
                break
            norm = nn.utils.clip_grad_norm_(parameters, args.grad_clip)
            check_finite(losses, norm, step, micro)
            rate = learning_rate(step, steps, args.lr, args.warmup_ratio, args.schedule)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            speed = sum(len(row.ids) for rows in micro for row in rows) / (time.perf_counter() - started)
            entry = {"step": step, "loss": sum(losses)} | dict.fromkeys(TERMS) | terms | {"lr": rate}
            entry |= {"tokens_per_s": round(speed), "memory_bytes": peak_memory(args.device)}
            log(entry | after_step(step))
            show(bar, entry)
            if step % args.save_every == 0 or step == steps:
                save_checkpoint(args.out, model, optimizer, step)
    if stop:
        save_checkpoint(args.out, model, optimizer, step)
    return step, stop


def add_gradients(
    parts: Iterable[tuple[float, dict[str, Tensor]]], weights: dict[str, float], stop: list[int]
) -> tuple[list[float], dict[str, float]]:
    """The backward pass of L over a step's micro-batches, each given by its share of the step and its terms.

    Returns each micro-batch's part of L and the step's terms. `parts` is best a generator, so that only one micro-batch
    is held at a time. Ends early, with gradients of no use, once `stop` is not empty.
    """
    losses, totals = [], {}
    for share, terms in parts:
        loss = share * weighted_sum(terms, weights)
        loss.backward()
        losses.append(loss.detach())
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + share * term.detach()
        if stop:
            return [], {}
    return torch.stack(losses).tolist(), {name: float(total) for name, total in totals.items()}


def seed_step(seed: int, step: int) -> None:
    """Make dropout a pure function of the step, so that a resumed run repeats it exactly.

    SeedSequence mixes both numbers: seed + step would give seed 43 the masks of seed 42, one step later.
    """
    torch.manual_seed(int(numpy.random.SeedSequence([seed, step]).generate_state(1, numpy.uint64)[0]))


def check_finite(losses: list[float], norm: Tensor, step: int, micro: list[list[Row]]) -> None:
    """InputError with the step and the lines of the data whose loss, or else the step's gradient, is not finite."""
    bad = [rows for loss, rows in zip(losses, micro, strict=True) if not math.isfinite(loss)]
    if bad or not norm.isfinite():
        lines = sorted(row.line for rows in bad or micro for row in rows)
        named = ", ".join(map(str, lines[:20])) + (" ..." if len(lines) > 20 else "")
        what = "loss" if bad else "gradient"
        raise InputError(
            f"step {step + 1}: the {what} is not finite (data lines {named}): lower --lr or mend the rows; "
            "the last checkpoint is kept"
        )


def show(bar: tqdm, entry: dict) -> None:
    shown = {"loss": f"{entry['loss']:.4f}"} | {
        name: f"{entry[name]:.3g}" for name in TERMS[1:] if entry[name] is not None
    }
    shown |= {"tokens/s": entry["tokens_per_s"], "GB": f"{entry['memory_bytes'] / 1e9:.1f}"}
    bar.set_postfix(shown, refresh=False)
    bar.update()


def finish(out: Path, step: int, steps: int, stop: list[int]) -> int:
    """Say where the files are and, if the run was stopped, how to go on; returns the exit status."""
    if stop:
        print(f"stopped after step {step} of {steps}; saved to {out}; go on with the same command and --resume")
        return 128 + stop[0]
    print(f"saved to {out}")
    return 0


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


def plain_settings(args: Namespace) -> dict:
    """The flags as JSON can hold them."""
    plain = int | float | list | None
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}


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

    Step 0 also writes checkpoint/initial.safetensors, which never changes: A₀, B₀ and a new classifier head's values.
    """
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
    with _open_checkpoint(out) as (initial, state):
        for name, buffer in initial_values(model).items():
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


def first_step(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, resumed: int | None) -> int:
    """Put the checkpoint of step `resumed` into model and optimizer, or, if that is None, write that of step 0."""
    if resumed is None:
        save_checkpoint(out, model, optimizer, 0)
        return 0
    load_checkpoint(out, model, optimizer)
    print(f"resumed at step {resumed}")
    return resumed


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
