"""Measure time, tokens/s and memory of a training step, and the time of the initialisation, on this machine:
`python -m minibalora bench`. `workload.py` has the steps that it measures. With --dry, `roofline.py` counts instead.
"""

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.compiler import set_stance
from torch.utils.flop_counter import FlopCounterMode

from minibalora.base import cli, progress
from minibalora.base.errors import InputError
from minibalora.base.files import check_file, write_json
from minibalora.lowrank import factors_of
from minibalora.objective import NLG_RECIPES
from minibalora.run import roofline
from minibalora.run.flags import DEFAULTS
from minibalora.run.methods import METHODS, WITHOUT, settings_of
from minibalora.run.settings import Hardware
from minibalora.run.workload import FULL, SHAPES, Contender, Load, Step, random_model, steps_of
from minibalora.variants import VARIANTS

PAPER = ("lora", "pissa", "ba-lora")  # measured by default
FORMS = ("fused", "plain")
MIXED = "mixed: the fused loss on the plain layer, as train_nlg.py trains the methods that have no lean product"


def main() -> int:
    args = parse_flags()
    if args.dry:
        return count(args)
    hardware = Hardware(args.device, args.dtype, grad_checkpoint=args.grad_checkpoint, compile=args.compile)
    load = Load(SHAPES[args.shape], hardware, args.rank, args.micro_batch_size, args.warmup, args.rounds)
    contenders, facts = contenders_of(args.methods, args.forms), machine(args.device)
    dtype = str(args.dtype).removeprefix("torch.")
    print(f"{args.shape}, rank {args.rank}, {args.micro_batch_size} rows a step, {dtype}")
    print(f"{facts['gpu'] or facts['cpu']}, threads: {facts['threads']}, torch {facts['torch']}", flush=True)
    rates = [matmul_rate(hardware)]
    try:
        with TemporaryDirectory() as folder:
            bar = progress.over(contenders, "memory", "process")
            needs = [in_own_process(needs_of, partial(steps_of, load, [each], folder), load) for each in bar]
            seconds = in_turn(steps_of(load, contenders, folder), load)
    except RuntimeError as error:
        if not isinstance(error, BrokenProcessPool) and "allocate memory" not in str(error):
            raise
        cure = "give a smaller one or --micro-batch-size"
        raise InputError(f"--shape {args.shape} does not fit this machine's memory: {cure}") from None
    rates.append(matmul_rate(hardware))  # the better of two: another program may have run during one of them
    tokens = [load.tokens_of(index) for index in range(load.warmup, load.warmup + load.rounds)]
    lora, rate = seconds.get(Contender("lora")), max(rates)
    results = [asdict(each) | result(seconds[each], tokens, need, lora, rate)
               for each, need in zip(contenders, needs, strict=True)]  # fmt: skip
    init = init_seconds(load)
    settings = {name: value if isinstance(value, int | list) else str(value) for name, value in vars(args).items()}
    settings |= {"config": asdict(load.config), "init": DEFAULTS["init"]}
    write_json(args.json, {"settings": settings, "machine": facts, "matmul_flops_per_s": rates, "init_seconds": init,
                           "results": results})  # fmt: skip
    print(timing_table(contenders, results))
    print(f"peak: {rate / 1e9:,.0f} GFLOP/s in matrix products alone")
    print(f"init {DEFAULTS['init']}: {init:.1f} s for all layers, estimated from one block's")
    print(f"saved to {args.json}")
    return 0


def count(args: argparse.Namespace) -> int:
    """Print what a step of each contender asks of a GPU."""
    hardware = Hardware(args.device, args.dtype, grad_checkpoint=args.grad_checkpoint)
    contenders = [each for each in contenders_of(args.methods, args.forms) if not each.knows_teacher]
    peaks = 1e12 * args.peak_tflops, 1e12 * args.peak_tbps
    dtype = str(args.dtype).removeprefix("torch.")
    print(f"{args.shape}, rank {args.rank}, {args.micro_batch_size} rows of {FULL} tokens a step, {dtype}, counted on "
          f"empty tensors; a GPU of {args.peak_tflops:g} TFLOP/s and {args.peak_tbps:g} TB/s", flush=True)  # fmt: skip
    totals = [roofline.work_of(SHAPES[args.shape], hardware, args.rank, args.micro_batch_size, each, peaks)
              for each in progress.over(contenders, "counted", "method")]  # fmt: skip
    print(roofline.table(contenders, totals))
    return 0


def parse_flags() -> argparse.Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora bench",
        description="Measure training steps on random weights of a published shape: time, tokens/s and memory, and the "
        "time of the initialisation. The rows are as long as 32 rows of GSM8K.",
    )
    add = parser.add_argument_group("measurement").add_argument
    add("--shape", choices=SHAPES, default="small", help="shape of the model (default: small, 60 M parameters)")
    add("--methods", choices=METHODS, nargs="+", default=list(PAPER), help=f"any --method of train_nlg.py; ba-lora in "
        f"both recipes (default: {' '.join(PAPER)})")  # fmt: skip
    add("--forms", choices=FORMS, nargs="+", default=list(FORMS), help="fused: without whole logits, as train_nlg.py "
        f"trains; {', '.join(VARIANTS)} have the plain layer then, and lora is measured with it, too; plain: the "
        "formulas on whole logits, with an exact SVD (default: both)")  # fmt: skip
    add(
        "--rank",
        type=cli.positive_int,
        help="rank of the adapters (default: 1/32 of the width: the published 128 at 4096)",
    )
    add("--micro-batch-size", type=cli.positive_int, default=4, help="rows per step (default: 4)")
    add(
        "--rounds",
        type=cli.positive_int,
        default=8,
        help="measured steps of each (default: 8, which is one epoch with 4 rows)",
    )
    add("--warmup", type=cli.positive_int, default=2, help="steps before these that are not counted (default: 2)")
    add = parser.add_argument_group("hardware").add_argument
    cli.add_hardware_flags(add)
    add("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, slower")
    add("--compile", action="store_true", help="use torch.compile; raise --warmup to leave out the compilation")
    add = parser.add_argument_group("counting").add_argument
    add("--dry", action="store_true", help=f"do not measure, and need no GPU: count the kernels, bytes and products of "
        f"a step with full rows of {FULL} tokens, and the time that a GPU could not beat")  # fmt: skip
    add("--peak-tflops", type=cli.positive_rate, default=790.0, help="its peak in half precision, 1/15 of it in others "
        "(default: 790, an H200's in practice)")  # fmt: skip
    add("--peak-tbps", type=cli.positive_rate, default=4.3, help="its bandwidth in TB/s (default: 4.3, an H200's)")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=cli.path, metavar="FILE", help="file for every measured time and the machine; an existing "
        "file is replaced (default: bench-SHAPE-DEVICE.json)")  # fmt: skip
    args = parser.parse_args()
    config = SHAPES[args.shape]
    args.rank = args.rank or config.hidden_size // 32
    unused = ("warmup", "rounds", "device", "compile", "json") if args.dry else ("peak_tflops", "peak_tbps")
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            place = "with" if args.dry else "without"
            raise InputError(f"{cli.flag(name)} has no effect {place} --dry: leave it out")
    if args.dry:
        args.device = torch.device("cuda")
        args.dtype = cli.dtype(args.dtype, args.device)
    else:
        cli.settle_hardware(args)
    largest = min(config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim)
    if args.rank > largest:
        raise InputError(f"--rank {args.rank} does not fit {args.shape}: give 1 to {largest}")
    for method in args.methods:
        settings_of(method, None, args.rank)
        if args.dry and method in VARIANTS:
            raise InputError(f"--dry can't count {method}: leave it out of --methods")
        if args.compile and "compile" in (why := WITHOUT.get(method, {})):
            raise InputError(f"--compile has no meaning with --methods {method}, {why['compile']}: leave one out")
    if not args.dry:
        args.json = args.json or Path(f"bench-{args.shape}-{args.device.type}.json")
        check_file(args.json, "--json")
    return args


def contenders_of(methods: list[str], forms: list[str]) -> list[Contender]:
    """Return the contenders in the order of the table. The cached teacher is measured in the fused form only. Methods
    without a lean product are mixed instead of fused, and LoRA's mixed form then shows what is their own. All of `full`
    is plain."""
    kinds = [(method, recipe) for method in methods for recipe in (NLG_RECIPES if method == "ba-lora" else [None])]
    contenders = []
    for form, kind in product(forms, kinds):
        if kind[0] == "full":
            form = "plain"
        elif kind[0] in VARIANTS and form == "fused":
            form = "mixed"
            contenders += [Contender("lora", form=form)] if "lora" in methods else []
        contenders.append(Contender(*kind, form))
    if "fused" in forms and "ba-lora" in methods:
        contenders.append(Contender("ba-lora", "iclr2026", knows_teacher=True))
    return list(dict.fromkeys(contenders))


def in_turn(steps: dict[object, Step], load: Load) -> dict[object, list[float]]:
    """Return the seconds of every contender's steps. In each round all take a step on the same rows, beginning with
    another contender, so that a slow phase of the machine slows all of them."""
    names, seconds = list(steps), {name: [] for name in steps}
    for index in progress.over(range(load.warmup + load.rounds), "steps", "round"):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(partial(steps[name], index), load.hardware.device))
    return {name: times[load.warmup :] for name, times in seconds.items()}


def in_own_process(function: Callable, *arguments: object) -> object:
    """Return function(*arguments) from a new process, without the memory and caches of other contenders."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def needs_of(make_steps: Callable[[], dict[object, Step]], load: Load) -> dict:
    """Return the operations per token of one contender, and the peak bytes of its model and two steps on the longest
    rows: of tensors on a GPU, of the process on a CPU. The latter needs Linux's /proc, because ru_maxrss includes the
    peak of the parent process."""
    device, status = load.hardware.device, Path("/proc/self/status")

    def process_bytes(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s*(\d+)", status.read_text())[1]) if status.exists() else 0

    before, (step,) = process_bytes("VmRSS"), make_steps().values()
    longest = max(range(load.warmup + load.rounds), key=load.tokens_of)
    for _ in range(2):
        step(longest)
    on_cpu = process_bytes("VmHWM") - before if status.exists() else None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else on_cpu
    return {"flops_per_token": flops(step) / load.tokens_of(0), "peak_bytes": peak}


def flops(step: Step) -> int:
    """Return torch's count of floating-point operations in the matrix products of step 0, which has run before.

    torch never counts an SVD, nor, on a CPU, attention, which is one in a hundred operations on these rows.
    """
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # from shapes
    with set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step(0)
    return counter.get_total_flops()


def matmul_rate(hardware: Hardware) -> float:
    """Return floating-point operations per second: the best of five products of two square matrices."""
    size = 8192 if hardware.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=hardware.device, dtype=hardware.dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(partial(torch.mm, a, b), hardware.device) for _ in range(5))


def init_seconds(load: Load) -> float:
    """Estimate the time of train_nlg.py's default init for a whole model from the better of two runs on one block."""
    one = replace(load.config, vocab_size=1, num_hidden_layers=1, windows=load.config.windows[:1])
    linears = [part for part in random_model(one, load.hardware).model.layers.modules() if isinstance(part, nn.Linear)]
    works = [partial(factors_of(DEFAULTS["init"]), linear.weight, load.rank, 1.0) for linear in linears]
    best = [min(seconds_of(work, load.hardware.device) for _ in range(2)) for work in works]
    return load.config.num_hidden_layers * sum(best)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the step itself waits for its loss only
    return time.perf_counter() - started


def machine(device: torch.device) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def result(seconds: list[float], tokens: list[int], needs: dict, lora: list[float] | None, rate: float) -> dict:
    """Return the medians over steps. Steps differ in length, so speeds and ratios are computed for each step.

    lora: the seconds of `lora`'s steps on the same rows; rate: the result of `matmul_rate`.
    """
    speed = statistics.median(map(truediv, tokens, seconds))
    return {"seconds": seconds, "tokens": tokens} | needs | {
        "median_ms": 1000 * statistics.median(seconds),
        "fastest_ms": 1000 * min(seconds),
        "tokens_per_s": speed,
        "share_of_peak": speed * needs["flops_per_token"] / rate,
        "times_lora": lora and statistics.median(map(truediv, seconds, lora)),
    }  # fmt: skip


def timing_table(contenders: list[Contender], results: list[dict]) -> str:
    """Return a line for each contender. "tokens/s" counts prompts too; "of peak" divides `flops` by `matmul_rate`."""
    columns = f"{'form':7}{'ms a step':>10}{'fastest':>9}{'tokens/s':>10}{'of peak':>9}{'peak MB':>9}{'x lora':>8}"
    lines = [f"{'':33}{columns}"]
    for each, row in zip(contenders, results, strict=True):
        times = f"{row['median_ms']:10.0f}{row['fastest_ms']:9.0f}{row['tokens_per_s']:10.0f}"
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        ratio = "-" if row["times_lora"] is None else f"{row['times_lora']:.2f}"
        lines.append(f"{each!s:33}{each.form:7}{times}{row['share_of_peak']:9.1%}{memory:>9}{ratio:>8}")
    lines += [MIXED] if any(each.form == "mixed" for each in contenders) else []
    return "\n".join(lines)
