"""What the training scripts share: adapting, the optimisation loop, stop signals."""

import math
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from minibalora.base import distributed
from minibalora.base.errors import InputError
from minibalora.base.files import tensors_digest
from minibalora.checkpoints.weights import read
from minibalora.data.batches import Row, steps_per_epoch
from minibalora.lowrank import adapt, adapted_layers, lora_factors, pissa_factors, truncate
from minibalora.models import blocks_of
from minibalora.models.mixture import Mixture
from minibalora.nf4 import NF4
from minibalora.run.init_cache import cached_factors
from minibalora.run.run_folder import load_initial_values, open_log, save_checkpoint, trained_parameters

TERMS = ("task", "consistency", "diversity", "svd", "non_target_kl")


def adapt_model(model: nn.Module, args: Namespace, is_resumed: bool) -> None:
    """lowrank.adapt with a progress bar; a resumed run takes its factors from the checkpoint and waits for no SVD.

    Several ranks compute the factors of each layer once, on one of them.
    """
    is_silent = not distributed.is_main()
    bar = partial(tqdm, desc=args.init, unit="layer", dynamic_ncols=True, leave=False, disable=is_silent)
    is_shared = distributed.is_torchrun()
    is_later = is_resumed or is_shared
    try:
        adapt(
            model,
            args.rank,
            args.alpha,
            args.init,
            args.targets,
            progress=iter if is_later else bar,
            factors=partial(room_for_factors if is_later else first_factors, args),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--rank or --targets: {error}") from None
    if is_shared and not is_resumed and args.init != "lora":
        share_factors(model, args, bar)


def first_factors(args: Namespace, _, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A and B by --init of a weight (n, m), on the run's device; PiSSA's from --init-cache, if they are there."""
    if args.init == "lora":
        return lora_factors(torch.empty(1, device=args.device).expand(weight.shape), args.rank)
    weight, scaling = weight.to(args.device), args.alpha / args.rank
    if args.init_cache is None:
        return pissa_factors(weight, args.rank, scaling, args.init)
    return cached_factors(args.init_cache, args.rank, scaling, args.init, weight)


def room_for_factors(args: Namespace, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a rank knows of them by itself: LoRA's, the same on all ranks by the seed, or zeros in PiSSA's place."""
    if args.init == "lora":
        return first_factors(args, name, weight)
    n, m = weight.shape
    return torch.zeros(m, args.rank, device=args.device), torch.zeros(args.rank, n, device=args.device)


@torch.no_grad()
def share_factors(model: nn.Module, args: Namespace, bar: Callable[[list], Iterable]) -> None:
    """PiSSA's factors of each layer from the rank whose turn it is, into every rank's A, B, A₀ and B₀.

    A weight that the model does not hold yet is read by that rank alone. What pissa_niter_N draws depends on seed and
    layer: another draw than that of one process, but the same on any number of ranks.
    """
    layers = list(enumerate(adapted_layers(model)))
    for index, (name, layer) in bar(layers[distributed.rank() :: distributed.size()]):
        torch.manual_seed(args.seed + index)
        stored = f"{name}.weight"
        W = read(model.checkpoint.stored[stored], stored, args.dtype, args.device) if layer.W.is_meta else layer.W
        A, B = first_factors(args, name, W)
        layer.A.copy_(A)
        layer.B.copy_(B)
    for index, (_, layer) in layers:
        distributed.share((layer.A, layer.B), source=index % distributed.size())
        layer.A0.copy_(layer.A)
        layer.B0.copy_(layer.B)


def fit_hardware(model: nn.Module, args: Namespace, is_resumed: bool) -> None:
    """What --quantize, --compile, --grad-checkpoint and --fsdp ask for, in place, on an adapted model."""
    if args.quantize:
        if is_resumed:  # for the residual is what A₀ and B₀ leave of W
            load_initial_values(args.out, model)
        for _, layer in adapted_layers(model):  # one at a time is whole on the device
            layer.to(args.device).quantize(NF4.quantize)
        model.to(args.device)
    if args.compile:
        compile_blocks(model)
    if args.grad_checkpoint:
        checkpoint_blocks(model)
    if args.fsdp:
        from minibalora.run.sharded import load_sharded  # a second of imports that nothing else needs

        load_sharded(model, args.dtype, args.device)


def truncate_adapter(model: nn.Module, rank: int | None) -> None:
    """For --adapter-rank: bring what was learned to that rank before it is measured and saved."""
    if rank is not None:
        error = truncate(model, rank)
        print(f"adapter of at most rank {rank}: relative error {error:.2e} of the change in the weights")


def trained_digest(model: nn.Module) -> str:
    """SHA-256 of what was trained, in hex: answers of another state of the model are not this one's."""
    return tensors_digest("", *trained_parameters(model).values())


def checkpoint_blocks(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass, which computes the block once more: less memory, slower."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile what takes tokens one by one, each block's norms and MLP: once for rows of any length.

    Compiled whole, a model is compiled anew for other lengths: 8 minutes on a CPU where this takes half a minute. A
    mixture would be, whenever other experts have no token or one (half a minute for 5 tiny ones): it stays as it is.
    """
    for block in blocks_of(model):
        for name, part in parts_of(block):
            if not name.endswith(("attn", "Attention")) and not isinstance(part, Mixture):
                part.compile(dynamic=True)


def parts_of(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what a block calls: of a ModuleDict, which is never called, what stands in it."""
    for name, part in block.named_children():
        yield from parts_of(part) if isinstance(part, nn.ModuleDict) else [(name, part)]


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """Of everything that is trained, without weight decay, as published; `train` sets the rate of each step."""
    parameters = trained_parameters(model).values()
    return torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)


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
    torch.backends.cuda.matmul.allow_tf32 = args.tf32  # after PiSSA's factors were found, which want every bit
    bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not distributed.is_main())
    with open_log(args.out, step) as log, stop_signals() as stop, bar:
        while not distributed.any_rank(stop) and step < steps:
            started = time.perf_counter()
            seed_step(args.seed, step)
            # Where the weights themselves are trained, they are float32, and --dtype is that of the activations.
            with torch.autocast(args.device.type, args.dtype, args.method == "full" and args.dtype != torch.float32):
                losses, terms, micro = gradients(step, stop)
            if distributed.any_rank(stop):
                break
            distributed.sum_gradients(parameters)
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
    parts: Iterable[tuple[float, Tensor, dict[str, Tensor]]], stop: list[int]
) -> tuple[list[float], dict[str, float]]:
    """The backward pass of L over a step's micro-batches, each given by its share of the step, its L and its terms.

    `parts` are those that `distributed.deal` gave this rank, and best a generator, so that only one micro-batch is held
    at a time. Returns each micro-batch's part of L, of all ranks in the order before dealing, and the step's terms.
    Ends early, with gradients of no use, once `stop` is not empty on some rank.
    """
    losses, totals = [], {}
    for share, value, terms in parts:
        loss = share * value
        loss.backward()
        losses.append(loss.detach())
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + share * term.detach()
        if distributed.any_rank(stop):
            return [], {}
    numbers = distributed.gathered(torch.stack([value.double() for value in (*losses, *totals.values())]))
    each, sums = numbers[:, : len(losses)].T.flatten(), numbers[:, len(losses) :].sum(0)
    numbers = torch.cat([each, sums]).tolist()  # waits for a GPU once
    return numbers[: len(each)], dict(zip(totals, numbers[len(each) :], strict=True))


def seed_step(seed: int, step: int) -> None:
    """Make dropout a pure function of the step and the rank, so that a resumed run repeats it exactly.

    SeedSequence mixes the numbers: seed + step would give seed 43 the masks of seed 42, one step later.
    """
    numbers = [seed, step, distributed.rank()] if distributed.rank() > 0 else [seed, step]
    torch.manual_seed(int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0]))


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


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU so far; on a CPU, the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # the standard library can't tell there
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
