"""What to expect on this machine: step time, tokens/s, memory and initialisation: `python -m minibalora bench`.

Random weights of a published shape, no download. What is timed is the whole optimisation step of train_nlg.py.
"""

import argparse
import copy
import gc
import platform
import re
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_file, write_json
from minibalora.data import batches
from minibalora.data.batches import Packed, Row
from minibalora.fused import FrozenHead
from minibalora.lowrank import adapt, pissa_factors
from minibalora.models.decoder import Decoder
from minibalora.models.llama import LlamaConfig, llama
from minibalora.objective import NLG_RECIPES, Objective, lambdas, nlg_loss
from minibalora.run import training
from minibalora.run.flags import DEFAULTS
from minibalora.run.run_folder import plain_settings
from minibalora.run.teacher import TeacherCache, teacher_states

# As their config.json's have them.
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    windows=(None,) * 32, qk_norm=False, qkv_bias=False, o_bias=False, mlp_bias=False, tie_word_embeddings=False,
    activation="silu", norm_offset=0.0, embedding_scale=1.0, max_position_embeddings=4096, initializer_range=0.02,
)  # fmt: skip
MISTRAL_7B = replace(
    LLAMA_2_7B, intermediate_size=14336, num_key_value_heads=8, windows=(4096,) * 32, max_position_embeddings=32768
)
GEMMA_7B = replace(
    LLAMA_2_7B, vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=16, head_dim=256, rms_norm_eps=1e-6, max_position_embeddings=8192,
    tie_word_embeddings=True, activation="gelu_tanh", norm_offset=1.0, embedding_scale=3072**0.5, windows=(None,) * 28,
)  # fmt: skip
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
# Tokens of prompt and response of 32 rows of GSM8K's training set in Alpaca's prompt, by LLaMA's tokenizer: rows 1/64,
# 3/64, ... of all 7473 in order of length, then shuffled. Their mean is 101 + 130 tokens (of all rows: 101 + 131).
ROW_LENGTHS = [
    (150, 135), (145, 124), (106, 104), (82, 118), (75, 84), (91, 73), (128, 219), (127, 247),
    (74, 101), (155, 170), (70, 110), (113, 184), (89, 106), (131, 122), (67, 86), (89, 172),
    (122, 154), (83, 63), (74, 51), (82, 151), (97, 93), (112, 134), (96, 143), (142, 167),
    (71, 156), (81, 104), (86, 135), (94, 111), (153, 277), (106, 109), (75, 63), (80, 90),
]  # fmt: skip
Step = Callable[[int], float]  # which step, from 0 -> its loss, before the update


@dataclass(frozen=True)
class Contender:
    method: str
    recipe: str | None = None  # of ba-lora
    form: str = "fused"  # or "plain": the formulas of regularizers.py on the whole (M, V) logits, exact SVD included
    knows_teacher: bool = False  # --teacher-cache has the states of every row, as from the second epoch on

    @property
    def objective(self) -> Objective:
        return NLG_RECIPES[self.recipe] if self.recipe else Objective()

    def __str__(self) -> str:
        return " ".join(filter(None, [self.method, self.recipe, "teacher cached" if self.knows_teacher else ""]))


def main() -> int:
    args = parse_flags()
    config, contenders = SHAPES[args.shape], contenders_of(args.methods, args.forms)
    facts = machine(args.device)
    print(headline(args, facts))
    rates = [matmul_rate(args.device, args.dtype)]
    with TemporaryDirectory() as folder:
        args.teacher_cache = Path(folder)
        peaks = {} if args.device.type == "cuda" else memory_on_cpu(config, contenders, args)
        base = random_model(config, args.device, args.dtype)
        if args.device.type == "cuda" or args.compile:
            seconds = one_after_another(base, contenders, args, peaks)
        else:
            seconds = interleaved({each: step_of(base, each, args) for each in contenders}, args)
    rates.append(matmul_rate(args.device, args.dtype))  # others may have been at work during one of them
    found = [result(config, each, seconds, peaks.get(each), max(rates), args) for each in contenders]
    init = init_seconds(base, args.rank)
    settings = plain_settings(args) | {"config": asdict(config), "init": DEFAULTS["init"]}
    write_json(args.json, {"settings": settings, "machine": facts, "matmul_flops_per_s": rates,
                           "init_seconds": init, "results": found})  # fmt: skip
    print(table(found))
    print(f"peak: {max(rates) / 1e9:,.0f} GFLOP/s in matrix products alone")
    print(f"init {DEFAULTS['init']}: {init:.1f} s for all layers, estimated from one of each shape")
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
    add("--rank", type=cli.positive_int, help="rank r of the adapters (default: 1/32 of the width, 128 at 4096 as "
        "published)")  # fmt: skip
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
    largest = min(min(shape) for shape in linears(config).values())
    if args.rank > largest:
        raise InputError(f"--rank {args.rank} does not fit {args.shape}: give 1 to {largest}")
    args.json = args.json or Path(f"bench-{args.shape}-{args.device.type}.json")
    check_file(args.json, "--json")
    return args


def contenders_of(methods: list[str], forms: list[str]) -> list[Contender]:
    """In the order of the table; a cached teacher is one of the fused form, for that is what trains."""
    kinds = [(method, recipe) for method in methods for recipe in (NLG_RECIPES if method == "ba-lora" else [None])]
    found = [Contender(*kind, form) for form in forms for kind in kinds]
    if "fused" in forms and "ba-lora" in methods:
        found.append(Contender("ba-lora", "iclr2026", knows_teacher=True))
    return list(dict.fromkeys(found))


# Rows, weights and the step.


def numbers_of_step(index: int, count: int) -> list[int]:
    """Which of the 32 rows a step of `count` takes; an epoch later the same again."""
    return [(index * count + offset) % len(ROW_LENGTHS) for offset in range(count)]


def rows_of_step(vocab_size: int, index: int, count: int) -> list[Row]:
    """Random ids, the same for every contender."""
    random = np.random.default_rng(0)
    shared = random.integers(vocab_size, size=SHARED)
    ids = [np.concatenate([shared, random.integers(vocab_size, size=sum(both) - SHARED)]) for both in ROW_LENGTHS]
    rows = [Row(own, both[0], line) for line, (own, both) in enumerate(zip(ids, ROW_LENGTHS, strict=True))]
    return [rows[number] for number in numbers_of_step(index, count)]


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Made where and as what it is used: a 7B model in bfloat16 never takes more than its 13 GB."""
    with torch.device("meta"):
        model = llama(config).to(dtype)
    return fill(model.to_empty(device=device)).requires_grad_(False)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Random weights that depend on a tensor's name, shape, dtype and device only; norms are 1. In place."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
        parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def step_of(base: Decoder, contender: Contender, args: argparse.Namespace) -> Step:
    """The optimisation step of train_nlg.py, here of one micro-batch.

    Models are adapted beside `base`, whose weights they share. Which factors PiSSA starts from doesn't change a step's
    time, so they are the quickest to have.
    """
    torch.manual_seed(0)
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    adapt(model, args.rank, init="lora" if contender.method == "lora" else "pissa_niter_0").train()
    if args.grad_checkpoint:
        training.checkpoint_blocks(model)
    optimizer = training.optimizer_of(model)
    optimizer.param_groups[0]["lr"] = LEARNING_RATE
    if args.compile:
        training.compile_blocks(model)
    head = FrozenHead(model.head_weight) if contender.form == "fused" else model.head
    objective = contender.objective
    weights = lambdas(objective, STEPS // 2, STEPS)
    cache = TeacherCache(args.teacher_cache, "bench") if contender.knows_teacher else None

    def teacher_of(rows: list[Row], batch: Packed) -> torch.Tensor | None:
        return teacher_states(model, [batch], [rows], cache)[0] if objective.needs_teacher else None

    def step(index: int) -> float:
        rows = rows_of_step(base.config.vocab_size, index, args.micro_batch_size)
        batch = batches.pack(rows, args.device)
        teacher = teacher_of(rows, batch)
        student = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)  # (M, d)
        loss, terms = nlg_loss(student, teacher, batch.targets, head, objective, weights)
        (value,), _ = training.add_gradients([(1.0, loss, terms)], [])
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value

    if contender.knows_teacher:
        for index in range(args.warmup + args.rounds):
            rows = rows_of_step(base.config.vocab_size, index, args.micro_batch_size)
            teacher_of(rows, batches.pack(rows, args.device))
    return step


# What a step needs.


def linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(m, n) = (in, out) of the linears of a block."""
    d, f = config.hidden_size, config.intermediate_size
    width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (d, width), "k_proj": (d, kv_width), "v_proj": (d, kv_width), "o_proj": (width, d)}
    return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


def flops(config: LlamaConfig, batch: Packed, rank: int, contender: Contender, dtype: torch.dtype) -> int:
    """Floating-point operations of the matrix products that a step needs, 2 m n a row of an (m, n) matrix.

    A frozen W takes part in the student's pass, in the gradient of its input (not where that is an embedding, which is
    frozen) and in the teacher's pass; never in a gradient of its own. A and B: 4 r (m + n) a row for their gradients,
    and twice the change, of rank R = r from `lora` and 2r from PiSSA: 2 R (m + n) a row, or 2 R m n at once where
    float32 lets LowRankLinear fold it into W. Attention: 4 · width · pairs of tokens a pass, the backward pass two,
    pairs beyond the diagonal included. In the last block only response tokens are queries and go through the MLP; only
    they reach the head, whose (V, d) takes part in their logits, the teacher's and the gradient. The spectral term: as
    fused.py takes it from (M, d) states, but for the eigenvectors.

    So the plain form counts what the fused one needs, and --grad-checkpoint what a step without it needs: their share
    of the peak falls with what they do beyond that. Not counted is what is no product of matrices.
    """
    tokens, predicted = len(batch.input_ids), sum(batch.wanted)
    rows_seen = [batch.shared + length for length in batch.lengths]
    width = config.num_attention_heads * config.head_dim
    objective = contender.objective
    has_teacher_pass = objective.needs_teacher and not contender.knows_teacher
    R = rank if contender.method == "lora" else 2 * rank
    total = 0
    for layer in range(config.num_hidden_layers):
        is_last = layer == config.num_hidden_layers - 1
        for name, (m, n) in linears(config).items():
            rows = predicted if is_last and name not in ("k_proj", "v_proj") else tokens
            needs_slope = layer > 0 or name not in ("q_proj", "k_proj", "v_proj")
            is_folded = dtype == torch.float32 and rows * (m + n) > m * n
            change = 2 * R * (m * n if is_folded else rows * (m + n))
            total += 2 * rows * m * n * (1 + needs_slope + has_teacher_pass)
            total += change * (1 + needs_slope) + 4 * rank * rows * (m + n)
        queries = batch.wanted if is_last else rows_seen
        pairs = sum(count * length for count, length in zip(queries, rows_seen, strict=True))
        total += 4 * width * pairs * (3 + has_teacher_pass)
    total += 2 * predicted * config.vocab_size * config.hidden_size * (2 + objective.needs_teacher)
    if objective.lambda3 > 0:
        d, smaller = config.hidden_size, min(predicted, config.hidden_size)
        total += 4 * predicted * d * d + 4 * predicted * d * smaller + 2 * smaller**3
    return total


# Measuring.


def interleaved(steps: dict[object, Step], args: argparse.Namespace) -> dict[object, list[float]]:
    """Seconds of every contender's steps, one after the other on the same rows, each round begun by another.

    What slows the machine for a while slows all of them.
    """
    names, seconds = list(steps), {name: [] for name in steps}
    for index in tqdm(range(args.warmup + args.rounds), "steps", unit="round", dynamic_ncols=True, leave=False):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds_of(partial(steps[name], index), args.device)
            if index >= args.warmup:
                seconds[name].append(taken)
    return seconds


def one_after_another(
    base: Decoder, contenders: list[Contender], args: argparse.Namespace, peaks: dict[Contender, int]
) -> dict[Contender, list[float]]:
    """As `interleaved`, for adapters of all contenders would take 50 GB beside a 7B, and their compiled steps more than
    torch.compile keeps. On a GPU `peaks` gets the bytes of all tensors at the peak."""
    seconds = {}
    for contender in contenders:
        gc.collect()  # checkpointed blocks refer to themselves
        torch.compiler.reset()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        seconds |= interleaved({contender: step_of(base, contender, args)}, args)
        if args.device.type == "cuda":
            peaks[contender] = torch.cuda.max_memory_allocated(args.device)
    return seconds


def memory_on_cpu(config: LlamaConfig, contenders: list[Contender], args: argparse.Namespace) -> dict[Contender, int]:
    """Of each contender in a process of its own, see `own_peak`; none where the system does not tell: outside Linux."""
    if not Path("/proc/self/status").exists():
        return {}
    bar = tqdm(contenders, "memory", unit="process", dynamic_ncols=True, leave=False)
    try:
        return {contender: in_own_process(step_memory, config, contender, args) for contender in bar}
    except RuntimeError as error:
        if not isinstance(error, BrokenProcessPool) and "allocate memory" not in str(error):
            raise
        raise InputError(
            f"--shape {args.shape} does not fit this machine's memory: give a smaller one or --micro-batch-size"
        ) from None


def in_own_process(function: Callable, *arguments: object) -> object:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def step_memory(config: LlamaConfig, contender: Contender, args: argparse.Namespace) -> int:
    return own_peak(lambda: step_of(random_model(config, args.device, args.dtype), contender, args), args)


def own_peak(make_step: Callable[[], Step], args: argparse.Namespace) -> int:
    """Bytes that a model and two steps on the longest rows take at most, beyond what this process took before.

    Linux's VmHWM, because ru_maxrss begins with the peak of the process that started this one.
    """
    before, step = process_bytes("VmRSS"), make_step()

    def tokens(index: int) -> int:
        return sum(sum(ROW_LENGTHS[number]) for number in numbers_of_step(index, args.micro_batch_size))

    longest = max(range(args.warmup + args.rounds), key=tokens)
    for _ in range(2):
        step(longest)
    return process_bytes("VmHWM") - before


def process_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of five products of two square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(partial(torch.mm, a, b), device) for _ in range(5))


def init_seconds(base: Decoder, rank: int) -> float:
    """Of train_nlg.py's default start for a whole model: the better of two runs on one layer of each shape."""
    weights = [linear.weight for linear in base.model.layers[0].modules() if isinstance(linear, nn.Linear)]
    examples = {weight.shape: weight for weight in weights}
    total = 0.0
    for shape, count in Counter(weight.shape for weight in weights).items():
        factors = partial(pissa_factors, examples[shape], rank, 1.0, DEFAULTS["init"])
        total += count * min(seconds_of(factors, base.head_weight.device) for _ in range(2))
    return total * base.config.num_hidden_layers


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a step waits for its loss, not for its update
    return time.perf_counter() - started


# What is said of it.


def machine(device: torch.device) -> dict:
    found = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "platform": platform.platform()}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return found | {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}


def cpu_name() -> str:
    known = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", known.read_text()) if known.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def result(
    config: LlamaConfig,
    contender: Contender,
    seconds: dict[Contender, list[float]],
    peak_bytes: int | None,
    matmul_rate: float,
    args: argparse.Namespace,
) -> dict:
    """Medians over the steps: steps differ in length, so speeds and ratios are taken of each."""
    own, lora = seconds[contender], seconds.get(Contender("lora"))
    steps = [rows_of_step(config.vocab_size, args.warmup + index, args.micro_batch_size) for index in range(len(own))]
    tokens = [sum(len(row.ids) for row in rows) for rows in steps]
    work = [flops(config, batches.pack(rows, "cpu"), args.rank, contender, args.dtype) for rows in steps]
    ratios = lora and [mine / other for mine, other in zip(own, lora, strict=True)]
    return asdict(contender) | {
        "seconds": own,
        "tokens": tokens,
        "flops": work,
        "median_ms": 1000 * statistics.median(own),
        "fastest_ms": 1000 * min(own),
        "tokens_per_s": statistics.median(count / time for count, time in zip(tokens, own, strict=True)),
        "share_of_peak": statistics.median(count / time for count, time in zip(work, own, strict=True)) / matmul_rate,
        "peak_bytes": peak_bytes,
        "times_lora": ratios and statistics.median(ratios),
    }


def headline(args: argparse.Namespace, facts: dict) -> str:
    dtype = str(args.dtype).removeprefix("torch.")
    where = facts["gpu"] or f"{facts['cpu']}, threads: {facts['threads']}"
    rows = f"{args.micro_batch_size} rows a step"
    return f"{args.shape}, rank {args.rank}, {rows}, {dtype}\n{where}, torch {facts['torch']}"


def table(results: list[dict]) -> str:
    """A line each; "tokens/s" counts prompts, too, "of peak" is `flops` beside matrix products alone."""
    columns = f"{'form':7}{'ms a step':>10}{'fastest':>9}{'tokens/s':>10}{'of peak':>9}{'peak MB':>9}{'x lora':>8}"
    lines = [f"{'':33}{columns}"]
    for found in results:
        name = str(Contender(**{field: found[field] for field in ("method", "recipe", "form", "knows_teacher")}))
        times = f"{found['median_ms']:10.0f}{found['fastest_ms']:9.0f}{found['tokens_per_s']:10.0f}"
        memory = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e6:.0f}"
        ratio = "-" if found["times_lora"] is None else f"{found['times_lora']:.2f}"
        lines.append(f"{name:33}{found['form']:7}{times}{found['share_of_peak']:9.1%}{memory:>9}{ratio:>8}")
    return "\n".join(lines)
