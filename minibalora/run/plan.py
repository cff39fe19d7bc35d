"""The plan of a run: its model, terms, data, steps and memory, printed before the first step.

`python -m minibalora plan --model DIR` computes the memory before the weights are downloaded, from config.json alone.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minibalora.base import cli, distributed, progress
from minibalora.base.errors import InputError
from minibalora.checkpoints.config import Family
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.weights import empty_model, layers_and_experts
from minibalora.data.batches import Row, check_fits, pack
from minibalora.lean_product import use_lean_product
from minibalora.lowrank import LowRankLinear, adapt, adapted_layers, initial_values
from minibalora.nf4 import BLOCK, NF4, SCALE_BLOCK
from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective
from minibalora.run.adapting import empty_factors
from minibalora.run.flags import BATCH_SIZE, DEFAULTS, NLU_DEFAULTS
from minibalora.run.memory import Loss, classification_loss, expected_memory, generation_loss, held
from minibalora.run.methods import METHODS
from minibalora.run.settings import Adaptation, Hardware, Settings

DTYPES = (torch.bfloat16, torch.float32)
GPUS = (1, 2, 4, 8)
CARDS = {24: "s", 40: "m", 80: "l"}  # GB of a GPU, and its mark in the table
DISK_RATE = 1  # GB per second; local SSDs are at least as fast
MOST = 10_000  # layers and experts together; DeepSeek-MoE has 1,756
CLASSES = 2  # of a classifier; more would not change its size noticeably


def print_plan(
    settings: Settings, model: nn.Module, terms: list[str], data: list[str], steps: int, memory: int
) -> None:
    """Print the plan. terms: what `nlg_formula` or `nlu_formula` returns, then lines of `term_warnings`; data: lines
    about the rows; memory: in bytes."""
    adaptation, optimisation, device = settings.adaptation, settings.optimisation, settings.hardware.device
    parameters, trained, layers = base_parameters(model), trained_numbers(model), adapted_layers(model)
    shape = f"init {adaptation.init}, rank {adaptation.rank}, alpha {adaptation.alpha:g}"
    shape += "".join(f", {name} {value}" for name, value in adaptation.settings.items() if value is not None)
    adapter = f", {len(layers)} layers, {shape}" if layers else ""
    dtype = str(settings.hardware.dtype).removeprefix("torch.")
    ranks = f" in each of {distributed.size()} processes" if distributed.size() > 1 else ""
    print(f"model   {settings.source.model}, {parameters:,} parameters, {dtype} on {device}{ranks}")
    rate = getattr(model.config, "attention_dropout", 0)
    dropout = f", dropout of {rate:g} in attention" if rate else ""
    print(f"method  {adaptation.method}{adapter}, {trained:,} trained ({trained / parameters:.2%}){dropout}")
    print("terms   " + "\nwarning ".join(terms))
    print("data    " + "\n        ".join(data))
    print(f"steps   {steps:,} of {optimisation.batch_size} rows in micro-batches of {optimisation.micro_batch_size}, "
          f"peak learning rate {optimisation.lr:g}, {optimisation.schedule}")  # fmt: skip
    more = "CUDA and torch need half a GB or more" if device.type == "cuda" else "the process may need two thirds more"
    print(f"memory  about {memory / 1e9:.2f} GB of tensors, counted in a step on empty ones; {more}")
    print(f"out     {settings.output.folder}", flush=True)


def nlg_formula(objective: Objective, is_whole: bool = False) -> str:
    """Return the objective in words, with its weights. is_whole: L is computed on whole logits."""
    consistency = f"KL at T = {objective.temperature:g}"
    terms = _formula(objective, "cross-entropy", consistency, f"entropy of {objective.top_k or 'all'}")
    return f"{terms}, on whole logits" if is_whole else terms


def nlu_formula(objective: Objective, classes: int) -> str:
    """Return the same for a classifier. One class is a regression, without terms of classes (`objective.nlu_loss`)."""
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
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def base_parameters(model: nn.Module) -> int:
    """Count the parameters that the model had before it was adapted and quantised."""
    own = [layer.named_parameters(recurse=False) for _, layer in adapted_layers(model)]
    added = {id(tensor) for tensors in own for name, tensor in tensors if name not in ("W", "bias")}
    added |= {id(tensor) for tensor in initial_values(model).values()}  # of a head
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in added)
    quantised = [layer.W.shape for _, layer in adapted_layers(model) if not isinstance(layer.W, Tensor)]
    return dense + sum(n * m for n, m in quantised)


# The command.


def main() -> int:
    args = parser().parse_args()
    family, config = read_family(Path(args.model))
    check_amount(args.model, config)
    if family.has_language_model:
        defaults = DEFAULTS | {"batch_size": BATCH_SIZE["iclr2026"]}
    else:
        defaults = NLU_DEFAULTS | {"micro_batch_size": NLU_DEFAULTS["batch_size"]}
    rows, length = args.micro_batch_size or defaults["micro_batch_size"], args.max_length or defaults["max_length"]
    batch_size = max(defaults["batch_size"], rows)
    check_fits([], None, config, length)

    text, response = f"{rows} of {length} tokens at a time", max(1, round(args.response_share * length))
    if family.has_language_model:
        text += f", {response} of them response"
    micro_batches = -(-batch_size // rows)

    def loss_of_method(name: str) -> Callable[[nn.Module], Loss]:
        recipes = NLG_RECIPES if family.has_language_model else NLU_RECIPES
        objective = recipes["iclr2026"] if name == "ba-lora" else Objective()
        ids = np.arange(rows)[:, None] + np.zeros(length, int)  # no two rows share their first token
        if family.has_language_model:
            batch = pack([Row(row, length - response, line) for line, row in enumerate(ids)], "cpu")
            return partial(generation_loss, batch, objective, micro_batches, False)
        return partial(classification_loss, (torch.from_numpy(ids),), torch.zeros(rows, dtype=torch.int64), objective)

    rank = args.rank or defaults["rank"]
    adaptation = Adaptation("lora", rank, rank, "lora", args.targets)
    print("\n".join(facts(args.model, family, config, adaptation)))
    print(f"rows     {text}; {batch_size} a step\n", flush=True)
    print("\n".join(memory_table(family, config, adaptation, loss_of_method, micro_batches > 1)))
    marks = ", ".join(f"{mark}: {size} GB" for size, mark in CARDS.items())
    print(f"\nfits a card of {marks}; CUDA and torch need half a GB or more on top")
    return 0


def parser() -> cli.OneLineParser:
    parser = cli.OneLineParser(
        prog="python -m minibalora plan",
        description="Compute what training a model needs, from config.json alone: parameters, size of the files, and "
        "GB on each GPU for every method, with train_nlg.py (decoders and T5) or train_nlu.py (encoders).",
    )
    add = parser.add_argument
    add(
        "--model",
        type=cli.folder,
        metavar="DIR",
        required=True,
        help="folder with config.json; nothing else is needed",
    )
    add("--rank", type=cli.positive_int, help="rank r of the adapters "
        f"(default: {DEFAULTS['rank']}; encoders: {NLU_DEFAULTS['rank']})")  # fmt: skip
    add("--targets", nargs="+", metavar="NAME", help="linears to adapt (default: all in attention and MLP)")
    add("--micro-batch-size", type=cli.positive_int, help="rows per forward pass (default: "
        f"{DEFAULTS['micro_batch_size']}; encoders: {NLU_DEFAULTS['batch_size']})")  # fmt: skip
    add("--max-length", type=cli.positive_int, help="tokens in each row (default: "
        f"{DEFAULTS['max_length']}; encoders: {NLU_DEFAULTS['max_length']})")  # fmt: skip
    add("--response-share", type=cli.fraction, default=0.5, help="share of response tokens (default: 0.5)")
    return parser


def check_amount(folder: str, config: object) -> None:
    """Raise InputError for more layers or experts than any model has: they would take minutes to build."""
    layers, experts = layers_and_experts(config)
    if layers + experts > MOST:
        parts = f"{layers} layers and {experts} experts in all"
        raise InputError(f"{folder}: config.json has {parts}: download it again")


def facts(folder: str, family: Family, config: object, adaptation: Adaptation) -> list[str]:
    """Return lines with the numbers of parameters, the size of the files, and the numbers of trained parameters."""
    dense = empty_model(family, config, None if family.has_language_model else CLASSES)
    parameters, by_full = base_parameters(dense), trained_numbers(dense)
    model = adapted(family, config, torch.float32, adaptation)
    trained = trained_numbers(model)
    narrow, wide = (parameters * dtype.itemsize / 1e9 for dtype in DTYPES)
    return [
        f"model    {folder}, {parameters:,} parameters",
        f"load     {narrow:.1f} GB in bfloat16, {wide:.1f} GB in float32, read and held once: "
        f"{narrow / DISK_RATE:.0f} and {wide / DISK_RATE:.0f} s from a disk of {DISK_RATE} GB/s",
        f"trained  {trained:,} ({trained / parameters:.2%}) by lora, pissa and ba-lora at rank {adaptation.rank}, in "
        f"{len(adapted_layers(model))} layers; {'all' if by_full == parameters else f'{by_full:,}'} by full",
    ]


def adapted(family: Family, config: object, dtype: torch.dtype, adaptation: Adaptation) -> nn.Module:
    """Return the adapted model, on the meta device. Raises InputError if rank or targets do not fit."""
    model = empty_model(family, config, None if family.has_language_model else CLASSES).to(dtype)
    if adaptation.method == "full":
        return model.float()
    model.own_head = [] if family.has_language_model else [family.names.head]
    rank = adaptation.rank
    try:
        adapt(model, rank, None, adaptation.init, adaptation.targets,
              factors=lambda _, weight: empty_factors(weight, rank, "meta"))  # fmt: skip
        use_lean_product(model)
    except ValueError as error:
        raise InputError(f"--model, --rank or --targets: {error}") from None
    return model


def room_in_four_bits(layer: LowRankLinear) -> NF4:
    """Return an empty NF4 weight of the layer's shape, on the meta device."""
    blocks = -(-layer.in_features * layer.out_features // BLOCK)
    codes, scale_codes = (torch.empty(blocks, *more, dtype=torch.uint8, device="meta") for more in ([BLOCK // 2], []))
    steps, least = torch.empty(-(-blocks // SCALE_BLOCK), device="meta"), torch.empty((), device="meta")
    return NF4(torch.Size((layer.out_features, layer.in_features)), codes, scale_codes, steps, least)


def memory_table(
    family: Family,
    config: object,
    adaptation: Adaptation,
    loss_of_method: Callable[[str], Callable[[nn.Module], Loss]],
    accumulates: bool,
) -> list[str]:
    """Return the table of GB on each GPU: a line per method and option, a column per dtype and number of GPUs."""
    counts = GPUS if family.has_language_model else GPUS[:1]
    forms = [(method, "") for method in ("full", "lora", "pissa")]
    if family.has_language_model:
        forms += [(method, " --quantize nf4") for method in ("lora", "pissa")]
    rows = {}
    for dtype, (method, quantize) in progress.over(list(product(DTYPES, forms)), "plan", "model"):
        model = adapted(family, config, dtype, replace(adaptation, method=method, init=method))
        for _, layer in adapted_layers(model) if quantize else ():
            del layer.W  # a module can't replace a parameter of the same name
            layer.W = room_in_four_bits(layer)
        names = ["pissa", "ba-lora"] if method == "pissa" else [method]
        for name, checkpoint in product(names, ("", " --grad-checkpoint")):
            hardware = Hardware(torch.device("cuda"), dtype, grad_checkpoint=bool(checkpoint))
            one = expected_memory(model, hardware, loss_of_method(name), accumulates)
            shared = counts[1:] if name != "full" and not quantize else ()
            sizes = [one, *(one - held(model) + held(model, ranks) for ranks in shared)]
            cells = [*map(cell, sizes), *["-"] * (len(counts) - len(sizes))]
            rows.setdefault(f"{name}{quantize}{checkpoint}", []).extend(cells)
    in_order = sorted(rows.items(), key=lambda row: METHODS.index(row[0].split()[0]))
    titles = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    columns = [f"{'1 GPU' if count == 1 else f'fsdp {count}':>9} " for count in counts] * len(DTYPES)
    lines = [
        "GB on each GPU".ljust(40) + "".join(f"{title:>9} ".ljust(10 * len(counts)) for title in titles),
        " " * 40 + "".join(columns),
        *(f"{name:40}" + "".join(f"{text:>9} " for text in cells) for name, cells in in_order),
    ]
    return [line.rstrip() for line in lines]


def cell(size: int) -> str:
    """Return GB, with the mark of the smallest card that is large enough."""
    return f"{size / 1e9:.1f} " + next((mark for gigabytes, mark in CARDS.items() if size <= 1e9 * gigabytes), " ")
