"""The machinery around a training loop, so that the loop in the script shows the method alone."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor, nn

from minibalora import variants
from minibalora.base import distributed
from minibalora.base.errors import InputError
from minibalora.base.progress import Progress
from minibalora.data.batches import micro_batches, rows_of_step, steps_per_epoch
from minibalora.lean_product import factors_kept
from minibalora.lowrank import adapted_layers
from minibalora.run.checkpoint import load_checkpoint, save_checkpoint, trained_parameters
from minibalora.run.run_folder import open_log
from minibalora.run.settings import Hardware, Optimisation, Output

TERMS = ("task", "consistency", "diversity", "svd", "non_target_kl")


@dataclass(frozen=True)
class Part:
    """A micro-batch, and its share of the step's predicted tokens or examples, over which means are taken."""

    rows: list
    share: float


class _Stopped(Exception):
    """A stop signal has arrived. Never leaves the `with` block of a Run."""


class Run:
    """The steps of a run, from its checkpoint to the last: micro-batches, gradients, log, checkpoints, signals.

        with Run(output, optimisation, hardware, model, optimizer, steps, resumed) as run:
            for step, parts in run.steps(rows):
                for part in parts:
                    with run.autocast():
                        loss, terms = ...
                    (part.share * loss).backward()
                    run.note(part, loss, terms)
                run.update()

    steps: the number of steps in the run; resumed: the step of the checkpoint to continue from, None for a new run.
    The attribute `step` counts the finished steps. SIGINT and SIGTERM end the `with` block: the unfinished step is
    dropped, the last finished one is saved, and `signal` is the signal's number (0 without a signal). Several ranks
    finish the step, because they ask each other for signals only once per step. A second signal acts at once, as before
    the `with` block.
    """

    def __init__(
        self,
        output: Output,
        optimisation: Optimisation,
        hardware: Hardware,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        resumed: int | None,
    ):
        self.output, self.optimisation, self.hardware = output, optimisation, hardware
        self.model, self.optimizer, self.last_step = model, optimizer, steps
        self.resumed, self.step = resumed, resumed or 0
        self.parameters = list(trained_parameters(model).values())
        self.is_mixed = is_mixed(model, hardware)
        self.signal = self._received = 0
        self.entry = {}  # the line for log.jsonl, to which a script may add after `update`

    def __enter__(self) -> "Run":
        if self.resumed is None:
            save_checkpoint(self.output.folder, self.model, self.optimizer, 0)
        else:
            load_checkpoint(self.output.folder, self.model, self.optimizer)
            print(f"resumed at step {self.resumed}")
        self.model.train()
        with ExitStack() as opened:
            bar = Progress("steps", self.last_step, "step", self.step, is_shown=distributed.is_main(), stays=True)
            self._bar = opened.enter_context(bar)
            self._log = opened.enter_context(open_log(self.output.folder, self.step))
            opened.enter_context(self._noting_signals())
            opened.enter_context(factors_kept(self.model))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type | None, *_) -> bool:
        self._opened.close()
        if kind is not _Stopped:
            return False
        self.optimizer.zero_grad()
        save_checkpoint(self.output.folder, self.model, self.optimizer, self.step)
        return True

    def steps(self, rows: list) -> Iterator[tuple[int, list[Part]]]:
        """Yield each step that is left, counted from 0, with this rank's micro-batches.

        rows: all training rows, `batches.Row` or `labelled.ClassRow`. The log and the checkpoint of a step are written
        when the next step is asked for.
        """
        settings = self.optimisation
        while True:
            self._end_if_stopped()
            if self.step == self.last_step:
                return
            self._started = time.perf_counter()
            seed_step(settings.seed, self.step)
            variants.before_step(self.model, self.step, settings.seed)
            indices = rows_of_step(len(rows), settings.batch_size, settings.seed, self.step)
            self._micro = micro_batches([rows[index] for index in indices], settings.micro_batch_size)
            self._losses, self._terms = [], {}
            counts = [sum(row.predicted for row in part) for part in self._micro]
            parts = [Part(part, count / sum(counts)) for part, count in zip(self._micro, counts, strict=True)]
            yield self.step, distributed.deal(parts, idle=replace(parts[-1], share=0.0))

            self._log(self.entry)
            self._show()
            if self.step % self.output.save_every == 0 or self.step == self.last_step:
                save_checkpoint(self.output.folder, self.model, self.optimizer, self.step)

    def autocast(self) -> torch.autocast:
        """Return the context for the forward pass: with --method full, float32 weights and activations in --dtype."""
        return torch.autocast(self.hardware.device.type, self.hardware.dtype, self.is_mixed)

    def note(self, part: Part, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Save a micro-batch's L and terms for the log, without waiting for a GPU. In one process, stop at a signal."""
        self._losses.append(part.share * loss.detach())
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + part.share * term.detach()
        if distributed.size() == 1:
            self._end_if_stopped()

    def update(self) -> None:
        """Take a step with the gradients of all ranks, clipped. Raises InputError if a number is not finite."""
        settings = self.optimisation
        distributed.sum_gradients(self.parameters)
        penalty = variants.add_penalty(self.model)  # after the sum: once a step, not once for each rank
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip)
        of_step = [norm] if penalty is None else [norm, penalty]  # the same on every rank
        numbers = torch.stack([*self._losses, *self._terms.values(), *of_step])
        columns = distributed.gathered(numbers).T.tolist()  # a step's only wait for a GPU
        count, end = len(self._losses), len(columns) - len(of_step)
        norm = columns[end][0]
        losses = [loss for column in columns[:count] for loss in column]
        losses = losses[: len(self._micro)]  # in the order before dealing; the rest are those of idle ranks
        terms = {name: sum(column) for name, column in zip(self._terms, columns[count:end], strict=True)}
        if penalty is not None:
            terms["orthogonality"] = columns[-1][0]
        check_finite(losses, norm, self.step, self._micro)

        rate = learning_rate(self.step, self.last_step, settings.lr, settings.warmup_ratio, settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("ratio", 1.0)
        self.optimizer.step()
        variants.after_step(self.model, self.step + 1, self.last_step)  # reads the gradients
        self.optimizer.zero_grad()
        self.step += 1
        speed = sum(len(row.ids) for rows in self._micro for row in rows) / (time.perf_counter() - self._started)
        self.entry = {"step": self.step, "loss": sum(losses)} | dict.fromkeys(TERMS) | terms | {"lr": rate}
        self.entry |= {"tokens_per_s": round(speed), "memory_bytes": peak_memory(self.hardware.device)}

    def say_end(self) -> int:
        """Print where the files are and, if the run was stopped, how to resume it. Returns the exit status."""
        out = self.output.folder
        if self.signal:
            reached = f"stopped after step {self.step} of {self.last_step}"
            print(f"{reached}; saved to {out}; give the same command with --resume to continue")
            return 128 + self.signal
        print(f"saved to {out}")
        return 0

    def _end_if_stopped(self) -> None:
        self.signal = distributed.largest(self._received)
        if self.signal:
            raise _Stopped

    def _show(self) -> None:
        entry = self.entry
        numbers = {"loss": f"{entry['loss']:.4f}"}
        numbers |= {name: f"{entry[name]:.3g}" for name in TERMS[1:] if entry[name] is not None}
        numbers |= {"tokens/s": entry["tokens_per_s"], "GB": f"{entry['memory_bytes'] / 1e9:.1f}"}
        self._bar.update(note=", ".join(f"{name} {number}" for name, number in numbers.items()))

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def receive(number: int, _) -> None:
            self._received = number
            signal.signal(number, previous[number])

        for number in previous:
            signal.signal(number, receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def steps_of_run(optimisation: Optimisation, rows: int) -> int:
    steps = optimisation.epochs * steps_per_epoch(rows, optimisation.batch_size)
    return min(steps, optimisation.max_steps or steps)


def optimizer_of(model: nn.Module, rate_of_b: float = 1.0) -> torch.optim.AdamW:
    """Return AdamW for all trained parameters, without weight decay, as published. `Run.update` sets the rate.

    rate_of_b: LoRA+'s factor of B's rate.
    """
    trained = trained_parameters(model).values()
    groups = trained if rate_of_b == 1 else variants.lora_plus(model, 0.0, rate_of_b)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def is_mixed(model: nn.Module, hardware: Hardware) -> bool:
    """Return whether the weights are in float32 and products are not: where all weights train, AdamW's small steps
    would be lost in bfloat16."""
    return not adapted_layers(model) and hardware.dtype != torch.float32


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Return the rate of `step` (from 0): a linear rise in the warm-up, then a cosine or linear decay to 0."""
    warm = math.ceil(warmup_ratio * steps)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * ((1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress)


def seed_step(seed: int, step: int) -> None:
    """Make dropout a function of seed, step and rank, so that a resumed run repeats it exactly.

    SeedSequence mixes the numbers: with seed + step, seed 43 would get the masks of seed 42 one step later.
    """
    numbers = [seed, step, distributed.rank()] if distributed.rank() > 0 else [seed, step]
    torch.manual_seed(int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0]))


def check_finite(losses: list[float], norm: float, step: int, micro: list[list]) -> None:
    """Raise InputError if a loss or the gradient is not finite. The message has the step and the lines of the data."""
    bad = [rows for loss, rows in zip(losses, micro, strict=True) if not math.isfinite(loss)]
    if bad or not math.isfinite(norm):
        lines = sorted(row.line for rows in bad or micro for row in rows)
        numbers = ", ".join(map(str, lines[:20])) + (" ..." if len(lines) > 20 else "")
        what = "loss" if bad else "gradient"
        raise InputError(
            f"step {step + 1}: the {what} is not finite (data lines {numbers}): lower --lr or mend the rows; "
            "the last checkpoint is kept"
        )


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes so far: of all tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # the standard library can't measure it there
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
