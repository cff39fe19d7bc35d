"""The command line of the training scripts: flags, their published defaults, and what contradicts what."""

import argparse
import dataclasses
import math
import re
from datetime import datetime
from pathlib import Path

import torch

from minibalora import toy
from minibalora.errors import InputError
from minibalora.objective import NLG_RECIPES, Objective

METHODS = ("full", "lora", "pissa", "ba-lora")
ADAPTER_FLAGS = ("rank", "alpha", "init", "targets")
BA_LORA_FLAGS = ("recipe", "lambda1", "lambda2", "lambda3", "svd_k", "temperature", "top_k", "adaptive_lambda1")
# As published, but for micro_batch_size, which was 1.
DEFAULTS = {"rank": 128, "lr": 2e-5, "micro_batch_size": 4, "epochs": 1, "max_rows": 100_000, "max_length": 512}
BATCH_SIZE = {"2024": 128, "iclr2026": 32}
# The built-in model is 5000 times smaller than the paper's and has a minute: it takes a smaller rank and larger steps.
TOY = DEFAULTS | {"rank": 16, "lr": 2e-3, "micro_batch_size": 32, "max_rows": 3200, "max_length": 256}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}: see --help")


def positive_int(text: str) -> int:
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not a positive integer")
    return value


def natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):  # what fits 64 bits
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 999999999999999999")
    return int(text)


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def positive_rate(text: str) -> float:
    value = rate(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not a positive number")
    return value


def init(text: str) -> str:
    if not re.fullmatch(r"lora|pissa|pissa_niter_[0-9]{1,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not lora, pissa or pissa_niter_N")
    return text


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: name a folder")
    return Path(text)


def nlg_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="train_nlg.py",
        description="Fine-tune a LLaMA, Mistral or Gemma checkpoint with BA-LoRA (arXiv 2408.04556) or a baseline. "
        "Without --model: a built-in tiny LLaMA on built-in arithmetic problems, about a minute on a CPU.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", metavar="DIR", help="checkpoint folder: config.json, tokenizer.json, *.safetensors")
    add("--data", metavar="FILE", help="JSON Lines or a JSON array; the fields are recognised (see README)")
    add("--eval", metavar="FILE", help="held-out rows for the before / after table")
    add("--prompt-field", metavar="NAME", help="the field that holds the prompt")
    add("--response-field", metavar="NAME", help="the field that holds the response")
    add("--max-rows", type=positive_int, help="use the first N rows (published: 100000; built-in model: 3200)")
    add("--max-length", type=positive_int, help="tokens of prompt and response, what is beyond is cut (published: 512)")

    group = parser.add_argument_group("method")
    add = group.add_argument
    add("--method", choices=METHODS, default="ba-lora", help="what to train (default: ba-lora)")
    add("--recipe", choices=sorted(NLG_RECIPES), help="the paper's version (default: iclr2026): lambdas, k, T and K")
    add("--rank", type=positive_int, help="rank r of the adapters (published: 128; built-in model: 16)")
    add("--alpha", type=positive_rate, help="s = alpha / rank scales the product (default: the rank, as published)")
    add("--init", type=init, help="lora, pissa (exact SVD, published) or pissa_niter_N (N subspace iterations: faster)")
    add("--targets", nargs="+", metavar="NAME", help="linears to adapt (default: all of attention and MLP)")
    add("--lambda1", type=rate, help="weight of consistency (2024: 1e-4, iclr2026: 0.025)")
    add("--lambda2", type=rate, help="weight of diversity (2024: 3e-4, iclr2026: 0.005)")
    add("--lambda3", type=rate, help="weight of the spectral term (2024: 1e-4, iclr2026: 0.005), which is taken per "
        "micro-batch and averaged over the step weighted by tokens: it depends on --micro-batch-size")  # fmt: skip
    add("--svd-k", type=positive_int, help="leading singular values k (published: 10)")
    add("--temperature", type=positive_rate, help="T of the consistency term (2024: 1, iclr2026: 2)")
    add("--top-k", type=natural, help="K largest logits of the entropy, 0 = all (2024: 0, iclr2026: 20)")
    add("--adaptive-lambda1", action="store_true", default=None, help="by the teacher's entropy (iclr2026's option)")
    add("--non-target-kl", type=rate, default=0.0, help='weight of "Mask the Target", arXiv 2605.29498 (default: 0)')

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--lr", type=positive_rate, help="peak learning rate of AdamW (published: 2e-5; built-in model: 2e-3)")
    add("--schedule", choices=("cosine", "linear"), default="cosine", help="fall of the rate (default: cosine)")
    add("--warmup-ratio", type=rate, default=0.03, help="share of the steps with a rising rate (published: 0.03)")
    add("--grad-clip", type=positive_rate, default=1.0, help="largest norm of the gradient (default: 1)")
    add("--epochs", type=positive_int, help="passes over the data (published: 1)")
    add("--max-steps", type=positive_int, help="stop after N steps; the schedules end there, too")
    add("--batch-size", type=positive_int, help="rows a step (2024: 128; iclr2026 and baselines: 32)")
    add("--micro-batch-size", type=positive_int, help="rows at a time, bounded by memory (default: 4; built-in: 32)")
    add("--seed", type=natural, default=42, help="order of rows and random inits (published: 42, 1024, 2024)")

    group = parser.add_argument_group("hardware")
    add = group.add_argument
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: bfloat16 on GPUs, "
        "float32 on CPUs); A and B are float32 always")  # fmt: skip
    add("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, slower")
    add("--compile", action="store_true", help="torch.compile: slower start, faster steps on GPUs")

    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--out", type=folder, metavar="DIR", help="folder for adapter, log and checkpoint (default: runs/nlg-DATE-TIME)"
    )
    add("--save-every", type=positive_int, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser


def parse_nlg_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags with every default filled in, `dtype` and `device` as torch's; InputError for what can't be meant."""
    args = nlg_parser().parse_args(argv)
    if (args.model is None) != (args.data is None):
        given, missing = ("--model", "--data") if args.data is None else ("--data", "--model")
        raise InputError(f"{given} is given without {missing}: give both, or neither for the built-in ones")
    for name in ("eval", "prompt_field", "response_field"):
        if args.model is None and getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with --model and --data: give both")
    _refuse_contradictions(args)
    for name, value in (TOY if args.model is None else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.method == "ba-lora":
        args.recipe = args.recipe or "iclr2026"
    args.batch_size = args.batch_size or BATCH_SIZE[args.recipe or "iclr2026"]
    args.micro_batch_size = min(args.micro_batch_size, args.batch_size)
    args.init = args.init or ("lora" if args.method == "lora" else "pissa")
    args.alpha = args.alpha or args.rank
    if args.warmup_ratio > 1:
        raise InputError(f"--warmup-ratio is {args.warmup_ratio}: give a share of the steps, 0 to 1")
    args.device = _device(args.device)
    default_dtype = "bfloat16" if args.device.type == "cuda" else "float32"
    args.dtype = getattr(torch, args.dtype or default_dtype)
    args.is_toy = args.model is None
    args.model = args.model or str(toy.MODEL)
    if args.resume and args.out is None:
        raise InputError("--resume needs --out: name the folder of the run to go on with")
    args.out = args.out or Path("runs") / datetime.now().strftime("nlg-%Y%m%d-%H%M%S")
    return args


def nlg_objective(args: argparse.Namespace) -> Objective:
    """The recipe with what the flags change; for a baseline, cross-entropy and at most the non-target KL."""
    if args.method != "ba-lora":
        return Objective(non_target_kl=args.non_target_kl)
    given = {name: getattr(args, name) for name in BA_LORA_FLAGS[1:] if getattr(args, name) is not None}
    if "top_k" in given:
        given["top_k"] = given["top_k"] or None
    return dataclasses.replace(NLG_RECIPES[args.recipe], non_target_kl=args.non_target_kl, **given)


def _refuse_contradictions(args: argparse.Namespace) -> None:
    unused = {"full": ADAPTER_FLAGS + BA_LORA_FLAGS, "lora": BA_LORA_FLAGS, "pissa": BA_LORA_FLAGS, "ba-lora": ()}
    for name in unused[args.method]:
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} has no meaning with --method {args.method}: leave one out")
    if args.method == "full" and args.non_target_kl > 0:
        raise InputError("--non-target-kl needs a teacher, which --method full overwrites: use an adapter method")
    if args.adaptive_lambda1 and args.lambda1 == 0:
        raise InputError("--adaptive-lambda1 has no meaning with --lambda1 0: leave one out")
    if args.init is not None and args.method in ("lora", "pissa"):
        if not args.init.startswith(args.method):
            raise InputError(f"--init {args.init} contradicts --method {args.method}: leave one out")


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=torch.device(name)).item()  # "meta" has tensors, but nothing in them
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} can't be used here ({reason}): give cpu, cuda or cuda:N") from None
    return torch.device(name)
