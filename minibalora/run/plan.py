"""What a run is going to do and to take, said before its first step; or before its weights are there:
`python -m minibalora plan --model DIR` needs nothing but config.json.
"""

import argparse
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from minibalora.base import cli, distributed
from minibalora.base.errors import InputError
from minibalora.checkpoints.config import Family
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.weights import empty_model, layers_and_experts
from minibalora.lowrank import LowRankLinear, adapt, adapted_layers
from minibalora.nf4 import BLOCK, NF4, SCALE_BLOCK
from minibalora.objective import NLG_RECIPES, Objective
from minibalora.run.flags import BATCH_SIZE, DEFAULTS, METHODS, NLU_DEFAULTS
from minibalora.run.memory import Amount, expected_memory, held, padded_amount
from minibalora.run.run_folder import trained_parameters

DTYPES = (torch.bfloat16, torch.float32)
GPUS = (1, 2, 4, 8)
CARDS = {24: "s", 40: "m", 80: "l"}  # GB of a GPU, and the mark of what fits
DISK_RATE = 1  # GB a second: a local SSD reads that or more
MOST = 10_000  # layers and experts; DeepSeek-MoE has 1,756
CLASSES = 2  # of a classifier, whose size they do not change


def print_plan(
    args: Namespace, model: nn.Module, formula: str, data: list[str], steps: int, memory: int | None = None
) -> None:
    """formula: `nlg_formula` or `nlu_formula`; data: lines on the rows; memory: bytes that the run will take."""
    parameters = base_parameters(model)
    trained = trained_numbers(model)
    layers = adapted_layers(model)
    adapter = f", {len(layers)} layers, init {args.init}, rank {args.rank}, alpha {args.alpha:g}" if layers else ""
    dtype = str(args.dtype).removeprefix("torch.")
    ranks = f" in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    print(f"model   {args.model}, {parameters:,} parameters, {dtype} on {args.device}{ranks}")
    print(f"method  {args.method}{adapter}, {trained:,} trained ({trained / parameters:.2%})")
    print(f"terms   {formula}")
    print("data    " + "\n        ".join(data))
    print(f"steps   {steps:,} of {args.batch_size} rows in micro-batches of {args.micro_batch_size}, "
          f"peak learning rate {args.lr:g}, {args.schedule}")  # fmt: skip
    if memory is not None:
        print(f"memory  about {memory / 1e9:.2f} GB on {args.device}, beside what Python and torch take")
    print(f"out     {args.out}", flush=True)


def nlg_formula(objective: Objective) -> str:
    """The objective in words, weights included."""
    consistency = f"KL at T = {objective.temperature:g}"
    return _formula(objective, "cross-entropy", consistency, f"entropy of {objective.top_k or 'all'}")


def nlu_formula(objective: Objective, classes: int) -> str:
    """As `nlg_formula`; one class is a regression, which has no term of classes (see `objective.nlu_terms`)."""
    if classes == 1:
        regression = replace(objective, lambda2=0.0, lambda3=0.0, non_target_kl=0.0)
        return _formula(regression, "squared error", "squared error to the teacher", "")
    is_kl = objective.consistency == "kl"
    consistency = f"KL at T = {objective.temperature:g}" if is_kl else "squared distance of unit rows"
    return _formula(objective, "cross-entropy", consistency, "covariance of the classes")


def _formula(objective: Objective, task: str, consistency: str, diversity: str) -> str:
    share = "sum over N" if objective.svd_norm is None else f"{objective.svd_norm} share"
    weights = {
        consistency: objective.lambda1,
        diversity: objective.lambda2,
        f"{share} of {objective.svd_k} singular values": objective.lambda3,
        "non-target KL": objective.non_target_kl,
        "load balance of the experts": objective.router_aux,
    }
    moving = ", weights on the iclr2026 schedule" if objective.moving_lambdas else ""
    return task + "".join(f" + {weight:g} x {name}" for name, weight in weights.items() if weight > 0) + moving


def trained_numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained_parameters(model).values())


def base_parameters(model: nn.Module) -> int:
    """How many numbers the model had before it was adapted; a quantised weight counts as the one that it was."""
    own = {id(factor) for _, layer in adapted_layers(model) for factor in (layer.A, layer.B)}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    quantised = [layer.W.shape for _, layer in adapted_layers(model) if not isinstance(layer.W, Tensor)]
    return dense + sum(n * m for n, m in quantised)


# The command.


def main() -> int:
    args = parser().parse_args()
    family, config = read_family(Path(args.model))
    fill_in(args, family, config)
    check_amount(args, config)
    amount = amount_of(args, family)
    print("\n".join(facts(args, family, config, amount)) + "\n", flush=True)
    print("\n".join(table(args, family, config, amount)))
    marks = ", ".join(f"{mark}: {size} GB" for size, mark in CARDS.items())
    print(f"\nfits a card of {marks}; what CUDA and torch take for themselves, half a GB or more, comes on top")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(
        prog="python -m minibalora plan",
        description="Say what training a model takes, by config.json alone: parameters, files, and GB on each GPU for "
        "every method. Of a decoder as train_nlg.py trains it, of an encoder as train_nlu.py does.",
    )
    add = parser.add_argument
    published = f"default: {DEFAULTS['rank']}; encoders: {NLU_DEFAULTS['rank']}"
    add("--model", metavar="DIR", required=True, help="folder with config.json")
    add("--rank", type=cli.positive_int, help=f"rank r of the adapters ({published})")
    add("--targets", nargs="+", metavar="NAME", help="linears to adapt (default: all of attention and MLP)")
    add("--micro-batch-size", type=cli.positive_int, help=f"rows at a time (default: {DEFAULTS['micro_batch_size']}; "
        f"encoders: {NLU_DEFAULTS['batch_size']})")  # fmt: skip
    add("--max-length", type=cli.positive_int, help="tokens of each of these rows (default: "
        f"{DEFAULTS['max_length']}; encoders: {NLU_DEFAULTS['max_length']})")  # fmt: skip
    add("--response-share", type=cli.fraction, default=0.5, help="share of the tokens that are response (default: 0.5)")
    return parser


def fill_in(args: Namespace, family: Family, config: object) -> None:
    """The training scripts' defaults; InputError for rows that they would refuse, longer than the model's context."""
    if family.has_language_model:
        defaults = DEFAULTS | {"batch_size": BATCH_SIZE["iclr2026"]}
    else:
        defaults = NLU_DEFAULTS | {"micro_batch_size": NLU_DEFAULTS["batch_size"]}
    for name in ("rank", "micro_batch_size", "max_length"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    args.batch_size = max(defaults["batch_size"], args.micro_batch_size)
    args.device = torch.device("cuda")
    limit = config.max_position_embeddings
    if limit is not None and args.max_length > limit:
        raise InputError(f"--max-length {args.max_length}: the model has {limit} positions: give at most that many")


def check_amount(args: Namespace, config: object) -> None:
    """InputError for a number of layers or experts that takes minutes to build, and no model has."""
    layers, experts = layers_and_experts(config)
    if layers + experts > MOST:
        parts = f"{layers} layers and {experts} experts in all"
        raise InputError(f"{args.model}: config.json has {parts}: download it again")


def amount_of(args: Namespace, family: Family) -> Amount:
    amount = padded_amount(args.micro_batch_size, args.max_length)
    if not family.has_language_model:
        return amount
    response = max(1, round(args.response_share * args.max_length))
    return replace(amount, wanted=args.micro_batch_size * response, is_packed=True)


def cases(args: Namespace, family: Family, config: object, dtype: torch.dtype) -> Iterator[tuple[Namespace, nn.Module]]:
    """What there is to choose, as flags, and the model as it then is, without a number in it."""
    for init, methods in {"full": ("full",), "lora": ("lora",), "pissa": ("pissa", "ba-lora")}.items():
        model = adapted(args, empty_model(family, config, classes_of(family)).to(dtype), init)
        for quantize in (None, "nf4") if init != "full" and family.has_language_model else (None,):
            for _, layer in adapted_layers(model) if quantize else ():
                del layer.W
                layer.W = room_in_four_bits(layer)
            for method, checkpoint in product(methods, (False, True)):
                flags = {"method": method, "quantize": quantize, "grad_checkpoint": checkpoint, "dtype": dtype}
                yield Namespace(**vars(args) | flags), model


def classes_of(family: Family) -> int | None:
    return None if family.has_language_model else CLASSES


def adapted(args: Namespace, model: nn.Module, init: str) -> nn.Module:
    """InputError if rank or targets do not fit."""
    if init == "full":
        return model.float()
    model.own_head = [] if model.family.has_language_model else [model.family.names.head]
    try:
        return adapt(model, args.rank, None, init, args.targets, factors=partial(room_for_factors, args.rank))
    except ValueError as error:
        raise InputError(f"--rank or --targets: {error}") from None


def room_for_factors(rank: int, _, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a weight (n, m)."""
    n, m = weight.shape
    return torch.empty(m, rank, device="meta"), torch.empty(rank, n, device="meta")


def room_in_four_bits(layer: LowRankLinear) -> NF4:
    blocks = -(-layer.in_features * layer.out_features // BLOCK)
    codes, scale_codes = (torch.empty(blocks, *more, dtype=torch.uint8, device="meta") for more in ([BLOCK // 2], []))
    steps, least = torch.empty(-(-blocks // SCALE_BLOCK), device="meta"), torch.empty((), device="meta")
    return NF4(torch.Size((layer.out_features, layer.in_features)), codes, scale_codes, steps, least)


def facts(args: Namespace, family: Family, config: object, amount: Amount) -> list[str]:
    model = empty_model(family, config, classes_of(family))
    parameters, by_full = base_parameters(model), trained_numbers(model)
    trained = trained_numbers(adapted(args, model, "lora"))
    narrow, wide = (parameters * dtype.itemsize / 1e9 for dtype in DTYPES)
    response = f", {amount.wanted // args.micro_batch_size} of them response" if family.has_language_model else ""
    return [
        f"model    {args.model}, {parameters:,} parameters",
        f"load     {narrow:.1f} GB in bfloat16, {wide:.1f} GB in float32, read and held once: "
        f"{narrow / DISK_RATE:.0f} and {wide / DISK_RATE:.0f} s from a disk of {DISK_RATE} GB/s",
        f"trained  {trained:,} ({trained / parameters:.2%}) by lora, pissa and ba-lora at rank {args.rank}, in "
        f"{len(adapted_layers(model))} layers; {'all' if by_full == parameters else f'{by_full:,}'} by full",
        f"rows     {args.micro_batch_size} of {args.max_length} tokens at a time{response}; {args.batch_size} a step",
    ]


def table(args: Namespace, family: Family, config: object, amount: Amount) -> list[str]:
    """GB on each GPU: a line for each method and what saves memory, a column for each dtype and number of GPUs."""
    counts = GPUS if family.has_language_model else GPUS[:1]
    rows = {}
    for dtype in DTYPES:
        for run, model in cases(args, family, config, dtype):
            quantize, checkpoint = " --quantize nf4" * bool(run.quantize), " --grad-checkpoint" * run.grad_checkpoint
            sizes = gigabytes(run, model, amount, counts)
            cells = [cell(size) for size in sizes] + ["-"] * (len(counts) - len(sizes))
            rows.setdefault(f"{run.method}{quantize}{checkpoint}", []).extend(cells)
    in_order = sorted(rows, key=lambda name: METHODS.index(name.split()[0]))
    titles = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    columns = [f"{'1 GPU' if count == 1 else f'fsdp {count}':>9} " for count in counts] * len(DTYPES)
    lines = [
        "GB on each GPU".ljust(40) + "".join(f"{title:>9} ".ljust(10 * len(counts)) for title in titles),
        " " * 40 + "".join(columns),
        *(f"{name:40}" + "".join(f"{each:>9} " for each in rows[name]) for name in in_order),
    ]
    return [line.rstrip() for line in lines]


def gigabytes(args: Namespace, model: nn.Module, amount: Amount, counts: tuple[int, ...]) -> list[float]:
    """GB on each of so many GPUs; of a run that can't be sharded on one alone."""
    recipe = NLG_RECIPES["iclr2026"] if args.method == "ba-lora" else Objective()
    one = expected_memory(args, model, amount, recipe if model.family.has_language_model else None)
    if args.method == "full" or args.quantize or len(counts) == 1:
        return [one / 1e9]
    others = one - held(model)
    return [one / 1e9] + [(others + held(model, ranks)) / 1e9 for ranks in counts[1:]]


def cell(size: float) -> str:
    """GB, and the mark of the smallest card that has them."""
    return f"{size:.1f} " + next((mark for gigabytes, mark in CARDS.items() if size <= gigabytes), " ")
