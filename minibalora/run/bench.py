"""What to expect on this machine: step time, tokens/s, memory and initialisation: `python -m minibalora bench`.

It takes random weights of a published shape, and times the whole optimisation step of train_nlg.py.
"""

import argparse
import copy
import platform
import re
import statistics
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from torch.compiler import set_stance
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from minibalora.base import cli, progress
from minibalora.base.errors import InputError
from minibalora.base.files import check_file, write_json
from minibalora.data.batches import Packed, Row, pack
from minibalora.lean_product import use_lean_product
from minibalora.lowrank import adapt, factors_of
from minibalora.models.decoder import Decoder
from minibalora.models.llama import LlamaConfig, llama
from minibalora.objective import NLG_RECIPES, Objective, head_of, lambdas
from minibalora.run.cache import Cache
from minibalora.run.flags import DEFAULTS
from minibalora.run.hardware import fit_hardware
from minibalora.run.loop import optimizer_of
from minibalora.run.settings import Hardware
from minibalora.run.teacher import open_cache, teacher_states

# As their config.json files have them.
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    windows=(None,) * 32, qk_norm=False, qkv_bias=False, o_bias=False, mlp_bias=False, tie_word_embeddings=False,
    activation="silu", norm_offset=0.0, embedding_scale=1.0, max_position_embeddings=4096, initializer_range=0.02,
)  # fmt: skip
GEMMA_7B = replace(
    LLAMA_2_7B, vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=16, head_dim=256, rms_norm_eps=1e-6, max_position_embeddings=8192,
    tie_word_embeddings=True, activation="gelu_tanh", norm_offset=1.0, embedding_scale=3072**0.5, windows=(None,) * 28,
)  # fmt: skip
MISTRAL_7B = replace(
    LLAMA_2_7B, intermediate_size=14336, num_key_value_heads=8, windows=(4096,) * 32, max_position_embeddings=32768
)
# 60 M parameters: LLaMA's proportions and vocabulary, an eighth of its width, a quarter of its depth.
SMALL = replace(
    LLAMA_2_7B, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, head_dim=64, windows=(None,) * 8,
)  # fmt: skip
SHAPES = {"llama-2-7b": LLAMA_2_7B, "mistral-7b": MISTRAL_7B, "gemma-7b": GEMMA_7B, "small": SMALL}
METHODS, FORMS = ("lora", "pissa", "ba-lora"), ("fused", "plain")
STEPS = 100  # of a run; every step measured is the one in the middle, where all terms of iclr2026 have a weight
LEARNING_RATE = 2e-5
SHARED = 29  # tokens with which every row begins: BOS and Alpaca's preamble, by LLaMA's tokenizer
# Tokens of 32 rows of GSM8K's training set in Alpaca's prompt, by LLaMA's tokenizer: rows 1/64, 3/64, ... of all 7473
# by length, then shuffled. Their mean is 101 + 130 tokens (of all rows: 101 + 131).
PROMPTS = (150, 145, 106, 82, 75, 91, 128, 127, 74, 155, 70, 113, 89, 131, 67, 89, 122, 83, 74, 82, 97, 112, 96, 142)
PROMPTS += (71, 81, 86, 94, 153, 106, 75, 80)
RESPONSES = (135, 124, 104, 118, 84, 73, 219, 247, 101, 170, 110, 184, 106, 122, 86, 172, 154, 63, 51, 151, 93, 134)
RESPONSES += (143, 167, 156, 104, 135, 111, 277, 109, 63, 90)
Step = Callable[[int], float]  # takes the step of that index, from 0, and returns its loss before the update


@dataclass(frozen=True)
class Contender:
    method: str
    recipe: str | None = None  # of ba-lora
    form: str = "fused"  # or "plain": the layer and the loss as the paper writes them, exact SVD included
    knows_teacher: bool = False  # --teacher-cache has the states of every row, as from the second epoch on

    @property
    def objective(self) -> Objective:
        return NLG_RECIPES[self.recipe] if self.recipe else Objective()

    def __str__(self) -> str:
        return " ".join(filter(None, [self.method, self.recipe, "teacher cached" if self.knows_teacher else ""]))


@dataclass(frozen=True)
class Load:
    """What every contender is given to do."""

    config: LlamaConfig
    hardware: Hardware
    rank: int
    rows: int  # a step
    warmup: int  # steps that do not count
    rounds: int  # steps that do

    def tokens_of(self, index: int) -> int:
        return sum(len(row.ids) for row in rows_of_step(self.config.vocab_size, index, self.rows))


def main() -> int:
    args = parse_flags()
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
    rates.append(matmul_rate(hardware))  # others may have been at work during one of them
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


def parse_flags() -> argparse.Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora bench",
        description="Measure training steps on random weights of a published shape: time, tokens/s, memory, and the "
        "time of the initialisation. Rows are as long as 32 of GSM8K's.",
    )
    add = parser.add_argument_group("what is measured").add_argument
    add("--shape", choices=SHAPES, default="small", help="whose shape (default: small, 60 M parameters)")
    add("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="default: all; ba-lora in both recipes")
    add("--forms", choices=FORMS, nargs="+", default=list(FORMS), help="fused: without ever holding the logits, as "
        "train_nlg.py does it; plain: the formulas on them, with an exact SVD (default: both)")  # fmt: skip
    add("--rank", type=cli.positive_int, help="of the adapters (default: 1/32 of the width, the published 128 at 4096)")
    add("--micro-batch-size", type=cli.positive_int, default=4, help="rows of a step (default: 4)")
    add("--rounds", type=cli.positive_int, default=8, help="steps of each (default: 8, which at 4 rows sees all once)")
    add("--warmup", type=cli.positive_int, default=2, help="steps before that do not count (default: 2)")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: bfloat16 on GPUs, "
        "float32 on CPUs)")  # fmt: skip
    add("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, slower")
    add("--compile", action="store_true", help="torch.compile: raise --warmup to leave its start out")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=cli.path, metavar="FILE", help="every time measured, and on which machine; is replaced "
        "(default: bench-SHAPE-DEVICE.json)")  # fmt: skip
    args = parser.parse_args()
    config = SHAPES[args.shape]
    args.rank = args.rank or config.hidden_size // 32
    args.device = cli.device(args.device)
    args.dtype = cli.dtype(args.dtype, args.device)
    largest = min(config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim)
    if args.rank > largest:
        raise InputError(f"--rank {args.rank} does not fit {args.shape}: give 1 to {largest}")
    args.json = args.json or Path(f"bench-{args.shape}-{args.device.type}.json")
    check_file(args.json, "--json")
    return args


def contenders_of(methods: list[str], forms: list[str]) -> list[Contender]:
    """In the order of the table. The one with a cached teacher is fused, because that form trains."""
    kinds = [(method, recipe) for method in methods for recipe in (NLG_RECIPES if method == "ba-lora" else [None])]
    found = [Contender(*kind, form) for form in forms for kind in kinds]
    if "fused" in forms and "ba-lora" in methods:
        found.append(Contender("ba-lora", "iclr2026", knows_teacher=True))
    return list(dict.fromkeys(found))


# Rows, weights and the step.


def rows_of_step(vocab_size: int, index: int, count: int) -> list[Row]:
    """`count` of the 32 rows, in turn, with random ids: the same for every contender, and again an epoch later."""
    random = np.random.default_rng(0)
    shared = random.integers(vocab_size, size=SHARED)
    own = [random.integers(vocab_size, size=sum(lengths) - SHARED) for lengths in zip(PROMPTS, RESPONSES, strict=True)]
    chosen = [(index * count + offset) % len(own) for offset in range(count)]
    return [Row(np.concatenate([shared, own[number]]), PROMPTS[number], number) for number in chosen]


def random_model(config: LlamaConfig, hardware: Hardware) -> Decoder:
    """Made on its device and in its dtype: a 7B model in bfloat16 never takes more than its 13 GB."""
    with torch.device("meta"):
        model = llama(config).to(hardware.dtype)
    return fill(model.to_empty(device=hardware.device)).requires_grad_(False)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Random weights that depend on a tensor's name, shape, dtype and device only; norms are 1. In place."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def steps_of(load: Load, contenders: list[Contender], folder: str | None = None) -> dict[Contender, Step]:
    """Each contender's step. All models share the frozen weights, and contenders whose layers compute alike share a
    model: what they make of it does not change their time. Nor does it matter which factors PiSSA starts from, so they
    are the quickest to have. folder: of the teacher cache, where a contender has one."""
    base, models, steps = random_model(load.config, load.hardware), {}, {}
    for each in contenders:
        kind = "lora" if each.method == "lora" else "pissa_niter_0", each.form
        if kind not in models:
            torch.manual_seed(0)
            model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
            adapt(model, load.rank, init=kind[0]).train()
            if each.form == "fused":
                use_lean_product(model)
            fit_hardware(model, load.hardware)
            models[kind] = model, optimizer_of(model)
        cache = open_cache(Path(folder), "bench", [], 0) if each.knows_teacher else None
        steps[each] = step_of(*models[kind], load, each, cache)
    return steps


def step_of(model: Decoder, optimizer: AdamW, load: Load, contender: Contender, cache: Cache | None) -> Step:
    """The optimisation step of train_nlg.py, here of one micro-batch. A cache gets the teacher's states of all rows."""
    optimizer.param_groups[0]["lr"] = LEARNING_RATE
    head, objective = head_of(model, is_plain=contender.form == "plain"), contender.objective
    weights = lambdas(objective, STEPS // 2, STEPS)

    def inputs(index: int) -> tuple[Packed, torch.Tensor | None]:
        rows = rows_of_step(load.config.vocab_size, index, load.rows)
        batch = pack(rows, load.hardware.device)
        return batch, teacher_states(model, [batch], [rows], cache)[0] if objective.needs_teacher else None

    def step(index: int) -> float:
        batch, teacher = inputs(index)
        student = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)  # (M, d)
        loss, _ = head.loss(student, teacher, batch.targets, objective, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        value = loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return value

    for index in range(load.warmup + load.rounds) if cache else ():
        inputs(index)
    return step


# Measuring.


def in_turn(steps: dict[object, Step], load: Load) -> dict[object, list[float]]:
    """Seconds of every contender's steps, one after the other on the same rows. Each round begins with another one.

    Whatever slows the machine for a while slows all of them.
    """
    names, seconds = list(steps), {name: [] for name in steps}
    for index in progress.over(range(load.warmup + load.rounds), "steps", "round"):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(partial(steps[name], index), load.hardware.device))
    return {name: times[load.warmup :] for name, times in seconds.items()}


def in_own_process(function: Callable, *arguments: object) -> object:
    """function(*arguments) where nothing is left of others' memory, caches and compiled code."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def needs_of(make_steps: Callable[[], dict[object, Step]], load: Load) -> dict:
    """What one contender takes: operations a token, and the bytes that its model and two steps on the longest rows take
    at most: of tensors on a GPU, else what this process took besides. Only Linux tells that: ru_maxrss begins with the
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
    """Floating-point operations of the matrix products of step 0, as torch counts them, after it has run before.

    On a CPU torch does not count those of attention, on these rows one in a hundred; nor anywhere those of an SVD.
    """
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # of shapes
    with set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step(0)
    return counter.get_total_flops()


def matmul_rate(hardware: Hardware) -> float:
    """Floating-point operations a second of the best of five products of two square matrices."""
    size = 8192 if hardware.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=hardware.device, dtype=hardware.dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(partial(torch.mm, a, b), hardware.device) for _ in range(5))


def init_seconds(load: Load) -> float:
    """Of train_nlg.py's default start for a whole model: the better of two runs on each linear of one block."""
    one = replace(load.config, vocab_size=1, num_hidden_layers=1, windows=load.config.windows[:1])
    linears = [part for part in random_model(one, load.hardware).model.layers.modules() if isinstance(part, nn.Linear)]
    works = [partial(factors_of(DEFAULTS["init"]), linear.weight, load.rank, 1.0) for linear in linears]
    best = [min(seconds_of(work, load.hardware.device) for _ in range(2)) for work in works]
    return load.config.num_hidden_layers * sum(best)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a step waits for its loss, not for its update
    return time.perf_counter() - started


# What is said of it.


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
    """Medians: steps differ in length, so speeds and ratios are taken of each.

    lora: the seconds of `lora`'s steps, on the same rows; rate: that of `matmul_rate`.
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
    """A line each; "tokens/s" counts prompts, too, "of peak" is the rate of `flops` beside `matmul_rate`."""
    columns = f"{'form':7}{'ms a step':>10}{'fastest':>9}{'tokens/s':>10}{'of peak':>9}{'peak MB':>9}{'x lora':>8}"
    lines = [f"{'':33}{columns}"]
    for each, found in zip(contenders, results, strict=True):
        times = f"{found['median_ms']:10.0f}{found['fastest_ms']:9.0f}{found['tokens_per_s']:10.0f}"
        memory = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e6:.0f}"
        ratio = "-" if found["times_lora"] is None else f"{found['times_lora']:.2f}"
        lines.append(f"{each!s:33}{each.form:7}{times}{found['share_of_peak']:9.1%}{memory:>9}{ratio:>8}")
    return "\n".join(lines)
