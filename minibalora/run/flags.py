"""The flags of the training scripts: published defaults, refused combinations, and the settings they make."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path

import torch

from minibalora.base import cli, distributed
from minibalora.base.cli import (
    OneLineParser,
    folder,
    fraction,
    natural,
    path,
    path_text,
    positive_int,
    positive_rate,
    rate,
    ratio,
    share_below_one,
)
from minibalora.base.errors import InputError
from minibalora.checkpoints import BUILT_IN
from minibalora.checkpoints.template import add_template_flags
from minibalora.data.glue import TASKS
from minibalora.lowrank import factors_of
from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective
from minibalora.run.methods import (
    STARTS,
    TERM_FLAGS,
    add_method_flags,
    refuse_contradictions,
    settings_of,
    settle_recipe,
)
from minibalora.run.run_folder import plain_settings
from minibalora.run.settings import Adaptation, ClassSource, Hardware, Optimisation, Output, Settings, TextSource
from minibalora.variants import rslora_alpha

# As published, except micro_batch_size, which was 1.
DEFAULTS = {"rank": 128, "lr": 2e-5, "micro_batch_size": 4, "epochs": 1, "max_rows": 100_000, "max_length": 512}
DEFAULTS["init"] = "pissa_krylov_8"  # published: pissa; `tests/bench_pissa.py` measures time and accuracy
BATCH_SIZE = {"2024": 128, "iclr2026": 32}
# The built-in model is 5000 times smaller than the paper's and trains for a minute: a smaller rank, a larger rate.
TOY = DEFAULTS | {"rank": 16, "lr": 2e-3, "micro_batch_size": 32, "max_rows": 3200, "max_length": 256, "init": "pissa"}
TOY["model"] = BUILT_IN / "llama"
# The published values depend on the task: learning rates 3e-5 to 6e-4, 10 to 50 epochs, batches of 6 to 32.
NLU_DEFAULTS = {"rank": 8, "lr": 1e-4, "epochs": 10, "batch_size": 32, "max_length": 128, "label_noise": 0.0}
NLU_DEFAULTS["init"] = DEFAULTS["init"]
NLU_TOY = NLU_DEFAULTS | {"lr": 1e-3, "epochs": 4, "max_length": 64, "model": BUILT_IN / "bert", "init": "pissa"}
NLU_TOY |= {"max_rows": 6000, "label_noise": 0.2, "imbalance": 4.0}  # the paper's conditions, at known rates
# These have no meaning where labels are scores.
CLASS_FLAGS = ("lambda2", "lambda3", "svd_k", "temperature", "adaptive_lambda1", "non_target_kl")
CLASS_FLAGS += ("label_noise", "imbalance")


def init(text: str) -> str:
    try:
        factors_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not lora, olora, pissa, pissa_krylov_N or pissa_niter_N"
        ) from None
    return text


def nlg_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="train_nlg.py",
        description="Fine-tune a decoder or T5 checkpoint with BA-LoRA (arXiv 2408.04556) or a baseline. Without "
        "--model: the built-in tiny LLaMA on built-in arithmetic problems, about a minute on a CPU.",
    )
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", metavar="DIR", type=folder, help="checkpoint folder: config.json, tokenizer.json, *.safetensors")
    add("--data", metavar="PATH", type=path_text, help="rows to train on: JSON Lines, a JSON array, Parquet, or .gz; a "
        "file, a folder, or a pattern of shards in quotes; the fields are recognised (see README)")  # fmt: skip
    add("--eval", metavar="FILE", type=path_text, help="held-out rows: the loss on their responses and, where they "
        "have a final answer, the exact match, before and after training (default: none)")  # fmt: skip
    add("--eval-task", choices=("gsm8k", "math"), help="ask and judge the rows of --eval as `evaluate --task` does")
    add("--retain", metavar="FILE", type=path_text, nargs="+", help="texts, or prompts and responses, to measure "
        "forgetting: the loss before and after training and, of an adapter, KL(pre-trained ‖ tuned)")  # fmt: skip
    add("--retain-every", type=positive_int, metavar="N", help="measure --retain also every N steps, for log.jsonl")
    add("--prompt-field", metavar="NAME", help="field of the prompt (default: recognised)")
    add("--input-field", metavar="NAME", help="field of the text that the prompt is about (default: input, context, "
        "article, passage, document, story, question; '': none)")  # fmt: skip
    add("--response-field", metavar="NAME", help="field of the response (default: recognised)")
    add_template_flags(group, "chat if the first row of --data is a conversation and the model has a chat template, "
                       "else alpaca")  # fmt: skip
    add("--max-rows", type=positive_int, metavar="N", help="use the first N rows (published: 100000; built-in model: "
        "3200)")  # fmt: skip
    add("--max-length", type=positive_int, metavar="N", help="tokens of a prompt and its response; a longer response "
        "is cut (published: 512; built-in model: 256)")  # fmt: skip

    add = _add_method_flags(parser, NLG_RECIPES, "128; built-in model: 16", "entropy of the predictions", "tokens")
    top_k = _published(NLG_RECIPES, "top_k")
    add("--top-k", type=natural, metavar="K", help="logits in the entropy: the K largest; 0: all; 1 gives "
        f"the constant 0 ({top_k})")  # fmt: skip
    add("--router-aux-loss", type=rate, metavar="WEIGHT", default=0.0, help="weight of the load balance in a mixture "
        "of experts, computed per micro-batch (default: 0); routers stay frozen")  # fmt: skip
    _add_optimisation_flags(
        parser,
        lr="published: 2e-5; built-in model: 2e-3",
        schedule="cosine",
        warmup_ratio=(0.03, "published: 0.03"),
        epochs="published: 1",
        batch_size="2024: 128; iclr2026 and baselines: 32",
        micro_batch_size="default: 4; built-in model: 32",
    )
    add = _add_hardware_flags(parser)
    add("--quantize", choices=("nf4",), help="store the frozen weights of adapted linears in 4 bits; with PiSSA, the "
        "residual (default: --dtype)")  # fmt: skip
    add("--teacher-cache", type=path, metavar="DIR", help="folder that keeps the teacher's states: later epochs, and "
        "later runs on the same rows, need no teacher (default: none)")  # fmt: skip
    add("--fsdp", action="store_true", help="with torchrun: split the frozen weights over the processes, for a model "
        "that does not fit on one GPU")  # fmt: skip
    _add_output_flags(parser, "nlg")
    return parser


def nlu_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="train_nlu.py",
        description="Fine-tune a BERT, RoBERTa, DeBERTa-v3, T5 or decoder checkpoint to classify texts with BA-LoRA "
        "(arXiv 2408.04556) or a baseline. Without --model: the built-in tiny BERT on built-in reviews, about a minute "
        "on a CPU.",
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--model", metavar="DIR", type=folder, help="checkpoint folder: config.json, tokenizer.json, *.safetensors")
    add("--data", metavar="PATH", type=path_text, help="folder of a GLUE task (train.tsv and dev.tsv, or "
        "train-*.parquet and validation-*.parquet); or a TSV, JSON Lines or Parquet file, or a pattern of shards in "
        "quotes")  # fmt: skip
    add("--task", choices=(*TASKS, "custom"), help="GLUE task, which names columns and labels; needed with --model")
    add("--eval", metavar="FILE", type=path_text, nargs="+", help="rows to score before and after training, besides "
        "a GLUE folder's dev set; needed where --data is a file: the first one selects the best epoch")  # fmt: skip
    add("--as-text", action="store_true", help='T5 only: ask in words, "sst2 sentence: ...", and score the words of '
        'the classes, "positive", with the model\'s own head instead of a new one')  # fmt: skip
    add("--text-field", metavar="NAME", nargs="+", help="with --task custom: field of the text; two for a pair")
    add("--label-field", metavar="NAME", help="with --task custom: field of the label")
    add(
        "--max-rows", type=positive_int, metavar="N", help="use the first N rows (default: all; built-in reviews: 6000)"
    )
    add("--max-length", type=positive_int, metavar="N", help="tokens of a text or pair; longer ones are cut (default: "
        "128; built-in model: 64)")  # fmt: skip
    add("--label-noise", type=share_below_one, metavar="P", help="share of the training labels to replace by a random "
        "other class (default: 0; built-in reviews: 0.2)")  # fmt: skip
    add("--imbalance", type=ratio, metavar="R", help="keep only 1/R as many training rows of each class as of the "
        "largest one (default: all; built-in reviews: 4)")  # fmt: skip

    diversity = "covariance of the classes, computed per micro-batch; always 0 for one row"
    add = _add_method_flags(parser, NLU_RECIPES, "8", diversity, "rows")
    add("--teacher", metavar="WHAT", type=path_text, help='teacher of consistency and non-target KL: "pretrained" '
        "(default, published; if its classifier is new, its answers say nothing about the labels) or the folder of a "
        "fine-tuned checkpoint")  # fmt: skip
    _add_optimisation_flags(
        parser,
        lr="default: 1e-4; published: 3e-5 to 6e-4, by task; built-in model: 1e-3",
        schedule="linear",
        warmup_ratio=(0.06, "default: 0.06, as in LoRA's runs on GLUE; not published for BA-LoRA"),
        epochs="default: 10; published: 10 to 50, by task; built-in model: 4",
        batch_size="default: 32; published: 6 to 32, by task",
        micro_batch_size="default: the batch size, since covariance and spectral term depend on it",
    )
    _add_hardware_flags(parser)
    add = _add_output_flags(parser, "nlu")
    add("--features", metavar="FILE", type=path, help="safetensors file for each dev row's label and last hidden "
        "state, before and after training (default: none)")  # fmt: skip
    return parser


def _add_method_flags(
    parser: argparse.ArgumentParser, recipes: dict[str, Objective], rank: str, diversity: str, unit: str
) -> Callable:
    """Add the group. Returns its add_argument, for flags of one script only.

    rank: its published value; diversity: the form of that term; unit: what means are over.
    """
    add = parser.add_argument_group("method").add_argument
    published = {name: f"({_published(recipes, name)})" for name in TERM_FLAGS if name in vars(recipes["2024"])}
    add_method_flags(add, recipes)
    add("--rank", type=positive_int, metavar="R", help=f"rank r of the adapters (published: {rank})")
    add("--alpha", type=positive_rate, help="scale of the adapters, s = alpha / rank (default: the rank, as published)")
    add("--init", type=init, help="start of A and B: lora; olora (QR); pissa (exact SVD, published); pissa_krylov_N "
        "(faster, N + 1 blocks; N = 8 is the default with --model); pissa_niter_N (N subspace iterations, less "
        "exact)")  # fmt: skip
    add("--init-cache", type=path, metavar="DIR", help="folder that keeps the start of pissa and pissa_krylov_N: later "
        "runs on the same weights need no SVD (default: none)")  # fmt: skip
    add("--targets", nargs="+", metavar="NAME", help="linears to adapt (default: all in attention and MLP)")
    add("--plain", action="store_true", help="compute the layer and the loss as the paper writes them: the same run to "
        "rounding, slower and in more memory")  # fmt: skip
    add("--lambda1", type=rate, metavar="WEIGHT", help=f"weight of consistency {published['lambda1']}")
    add("--lambda2", type=rate, metavar="WEIGHT", help=f"weight of diversity {published['lambda2']}: {diversity}")
    add("--lambda3", type=rate, metavar="WEIGHT", help=f"weight of the spectral term {published['lambda3']}: computed "
        f"per micro-batch, averaged by {unit}")  # fmt: skip
    add("--svd-k", type=positive_int, metavar="K", help="largest singular values in that term "
        f"{published['svd_k']}; give fewer than a micro-batch's logits have rows and columns: the nuclear share of "
        "all is always 1")  # fmt: skip
    add("--temperature", type=positive_rate, metavar="T", help=f"T of the consistency term {published['temperature']}")
    add("--adaptive-lambda1", action="store_true", default=None, help="let the teacher's entropy scale lambda1 "
        "(iclr2026's option)")  # fmt: skip
    add("--non-target-kl", type=rate, metavar="WEIGHT", default=0.0, help="weight of the KL to the teacher "
        'with the right answer left out ("Mask the Target", arXiv 2605.29498; default: 0)')  # fmt: skip
    return add


def _published(recipes: dict[str, Objective], name: str) -> str:
    """Return the setting in every recipe: "2024: 1, iclr2026: 2", or "published: 10" where they agree."""
    values = {recipe: f"{getattr(objective, name) or 0:g}" for recipe, objective in recipes.items()}
    values = values if len(set(values.values())) > 1 else {"published": values["2024"]}
    return ", ".join(f"{recipe}: {value}" for recipe, value in values.items())


def _add_optimisation_flags(
    parser: argparse.ArgumentParser,
    lr: str,
    schedule: str,
    warmup_ratio: tuple[float, str],
    epochs: str,
    batch_size: str,
    micro_batch_size: str,
) -> None:
    """Add the group. Each text says where the flag's default comes from."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=positive_rate, help=f"peak learning rate of AdamW ({lr})")
    add("--schedule", choices=("cosine", "linear"), default=schedule, help=f"decay of the rate (default: {schedule})")
    warm, source = warmup_ratio
    add(
        "--warmup-ratio", type=fraction, metavar="P", default=warm, help=f"share of steps with a rising rate ({source})"
    )
    add(
        "--grad-clip", type=positive_rate, metavar="NORM", default=1.0, help="largest norm of the gradient (default: 1)"
    )
    add("--epochs", type=positive_int, metavar="N", help=f"passes over the data ({epochs})")
    add("--max-steps", type=positive_int, metavar="N", help="end after N steps, schedules included, if --epochs has "
        "more (default: all of them)")  # fmt: skip
    add("--batch-size", type=positive_int, metavar="N", help=f"rows per step ({batch_size})")
    add("--micro-batch-size", type=positive_int, metavar="N", help="rows per forward pass; fewer need less memory "
        f"({micro_batch_size})")  # fmt: skip
    add("--seed", type=natural, metavar="N", default=42, help="seed of row order and random starts (default: 42; "
        "published: 42, 1024, 2024)")  # fmt: skip


def _add_hardware_flags(parser: argparse.ArgumentParser) -> Callable:
    """Add the group. Returns its add_argument."""
    add = parser.add_argument_group("hardware").add_argument
    cli.add_hardware_flags(add)
    add("--tf32", action="store_true", help="on a GPU, multiply float32 matrices in TF32: several times faster, with "
        "10 bits of mantissa instead of 23")  # fmt: skip
    add("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, slower")
    add("--compile", action="store_true", help="use torch.compile: slower start, faster steps on a GPU")
    return add


def _add_output_flags(parser: argparse.ArgumentParser, name: str) -> Callable:
    """Add the group. Returns its add_argument."""
    add = parser.add_argument_group("output").add_argument
    add("--out", type=path, metavar="DIR", help="folder for adapter, log and checkpoint (default: "
        f"runs/{name}-DATE-TIME)")  # fmt: skip
    add("--adapter-rank", type=positive_int, metavar="R", help="save the best approximation of rank R (default: exact; "
        "from PiSSA that is twice --rank)")  # fmt: skip
    add("--save-every", type=positive_int, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, with the same command")
    return add


def parse_nlg_flags(argv: list[str] | None = None) -> Settings:
    """Return the settings, defaults filled in. Raises InputError for flags that contradict each other."""
    flags = vars(nlg_parser().parse_args(argv))
    _refuse_half_a_source(flags, ("eval", "eval_task", "prompt_field", "input_field", "response_field", "template"))
    settle_recipe(flags)
    refuse_contradictions(flags)
    _refuse_text_contradictions(flags)
    if flags["fsdp"]:
        _refuse_without_shards(flags)
    defaults = TOY if flags["model"] is None else DEFAULTS
    flags = _filled_in(flags, defaults | {"batch_size": BATCH_SIZE[flags["recipe"] or "iclr2026"]}, "nlg")
    objective = _objective(flags, NLG_RECIPES)
    objective = replace(objective, top_k=objective.top_k or None, router_aux=flags["router_aux_loss"])  # 0: all
    return _settings(flags, TextSource, objective)


def parse_nlu_flags(argv: list[str] | None = None) -> Settings:
    """Do the same as parse_nlg_flags for train_nlu.py."""
    flags = vars(nlu_parser().parse_args(argv))
    if distributed.is_torchrun():
        raise InputError("train_nlu.py runs in one process: start it with python, not torchrun")
    _refuse_half_a_source(flags, ("task", "eval", "text_field", "label_field"))
    settle_recipe(flags)
    refuse_contradictions(flags)
    _refuse_task_contradictions(flags)
    if flags["teacher"] is None and (flags["recipe"] or flags["non_target_kl"] > 0):
        flags["teacher"] = "pretrained"
    flags = _filled_in(flags, NLU_TOY if flags["model"] is None else NLU_DEFAULTS, "nlu")
    return _settings(flags, ClassSource, _objective(flags, NLU_RECIPES))


def _filled_in(flags: dict, defaults: dict, script: str) -> dict:
    """Fill in the defaults. `is_toy` says that model and data are the built-in ones."""
    filled = flags | {"is_toy": flags["model"] is None}
    starts = STARTS[flags["method"]]
    if starts and starts[0] != "pissa":
        filled["init"] = flags["init"] or starts[0]
    filled |= {name: value for name, value in defaults.items() if filled[name] is None}
    filled["device"] = cli.device(flags["device"])
    filled["dtype"] = cli.dtype(flags["dtype"], filled["device"])
    distributed.check_device(filled["device"])
    batch_size = filled["batch_size"]
    filled["micro_batch_size"] = min(filled["micro_batch_size"] or batch_size, batch_size)
    filled["alpha"] = flags["alpha"] or filled["rank"]
    if flags["method"] == "rslora":
        filled["alpha"] = rslora_alpha(filled["rank"], filled["alpha"])
    if flags["resume"] and flags["out"] is None:
        raise InputError("--resume needs --out: name the folder of the run to continue")
    filled["out"] = flags["out"] or Path("runs") / datetime.now().strftime(f"{script}-%Y%m%d-%H%M%S")
    return filled


def _objective(flags: dict, recipes: dict[str, Objective]) -> Objective:
    """Return the recipe with the changes that flags make; without one, the task's loss and the non-target KL."""
    recipe = recipes[flags["recipe"]] if flags["recipe"] else Objective()
    changed = {name: flags[name] for name in TERM_FLAGS if flags.get(name) is not None}
    return replace(recipe, non_target_kl=flags["non_target_kl"], **changed)


def _settings(flags: dict, source: type, objective: Objective) -> Settings:
    """Sort the flags into groups, and keep all of them for run.json."""
    recorded = plain_settings(flags) | {"objective": asdict(objective)}
    flags = flags | {"is_plain": flags["plain"], "folder": flags["out"]}
    flags["targets"] = flags["targets"] and tuple(flags["targets"])
    flags["settings"] = settings_of(flags["method"], flags["method_settings"], flags["rank"])
    groups = [
        kind(**{field.name: flags[field.name] for field in fields(kind) if field.name in flags})
        for kind in (source, Adaptation, Optimisation, Hardware, Output)
    ]
    return Settings(groups[0], objective, *groups[1:], recorded)


def _refuse_half_a_source(flags: dict, with_model: tuple[str, ...]) -> None:
    """Refuse --model without --data, --data without --model, and flags that need both."""
    if (flags["model"] is None) != (flags["data"] is None):
        flag, missing = ("--model", "--data") if flags["data"] is None else ("--data", "--model")
        raise InputError(f"{flag} without {missing}: give both, or neither for the built-in model and data")
    for name in with_model:
        if flags["model"] is None and flags[name] is not None:
            raise InputError(f"{cli.flag(name)} goes with --model and --data: give both")


def _refuse_text_contradictions(flags: dict) -> None:
    if flags["eval_task"] and flags["eval"] is None:
        raise InputError("--eval-task goes with --eval: give both")
    if flags["retain_every"] and flags["retain"] is None:
        raise InputError("--retain-every goes with --retain: give both")
    if flags["quantize"] and flags["compile"]:
        raise InputError("--compile does not go with --quantize: leave one out")
    if flags["quantize"] and flags["adapter_rank"]:
        raise InputError("--adapter-rank does not go with --quantize: leave it out, and give it to python -m "
                         "minibalora export after training")  # fmt: skip
    if flags["teacher_cache"] and flags["non_target_kl"] == 0 and (not flags["recipe"] or flags["lambda1"] == 0):
        raise InputError("--teacher-cache has no meaning where no term has a teacher, as with "
                         f"--method {flags['method']} without --recipe or --non-target-kl, or with --lambda1 0: leave "
                         "it out")  # fmt: skip


def _refuse_without_shards(flags: dict) -> None:
    """Refuse --fsdp where it can't work or would gain nothing."""
    if not distributed.is_torchrun():
        raise InputError("--fsdp needs several processes: start torchrun --nproc-per-node N train_nlg.py ...")
    if flags["method"] == "full":
        raise InputError("--fsdp shards frozen weights, and --method full has none: use an adapter method")
    if flags["model"] is None:
        raise InputError("--fsdp is for large models, but the built-in one is tiny: give --model and --data")
    if flags["eval"] is not None:
        raise InputError("--fsdp trains only: leave --eval out, then run python -m minibalora evaluate on the adapter")
    if flags["retain"] is not None:
        raise InputError("--fsdp trains only: leave --retain out")
    for name in ("compile", "quantize", "teacher_cache"):  # a cache would let one rank skip a forward pass
        if flags[name]:
            raise InputError(f"{cli.flag(name)} does not go with --fsdp: leave one out")
    if torch.__version__ < (2, 7):
        raise InputError(f"--fsdp needs torch 2.7, this is {torch.__version__}: update it, or leave --fsdp out")


def _refuse_task_contradictions(flags: dict) -> None:
    if flags["model"] is not None and flags["task"] is None:
        raise InputError(f"--task is missing: give one of {', '.join((*TASKS, 'custom'))}")
    for name in ("text_field", "label_field"):
        if flags["task"] == "custom" and flags[name] is None:
            raise InputError(f"--task custom needs {cli.flag(name)}: name the field")
        if flags["task"] != "custom" and flags[name] is not None:
            raise InputError(f"{cli.flag(name)} goes with --task custom: {flags['task']} has its own fields")
    if flags["as_text"] and flags["model"] is None:
        raise InputError("--as-text needs a T5, but the built-in model is a BERT: give --model and --data")
    if flags["as_text"] and flags["task"] == "stsb":
        raise InputError("--as-text needs classes, but --task stsb has scores: leave --as-text out")
    if flags["as_text"] and flags["teacher"] not in (None, "pretrained"):
        raise InputError("--as-text takes the pre-trained model as its teacher: leave --teacher out")
    if len(flags["text_field"] or ()) > 2:
        raise InputError(f"--text-field names {len(flags['text_field'])} fields: give one, or two for a pair")
    has_scores = flags["task"] in TASKS and TASKS[flags["task"]].labels is None
    for name in CLASS_FLAGS:
        if has_scores and flags[name]:
            raise InputError(f"{cli.flag(name)} needs classes, but --task {flags['task']} has scores: leave one out")
    if flags["teacher"] is not None and not flags["recipe"] and flags["non_target_kl"] == 0:
        raise InputError(f"--teacher has no meaning with --method {flags['method']} without --recipe or "
                         "--non-target-kl: leave it out")  # fmt: skip
    if flags["teacher"] is not None and flags["lambda1"] == 0 and flags["non_target_kl"] == 0:
        raise InputError("--teacher has no meaning with --lambda1 0 and without --non-target-kl: leave one out")
    if flags["recipe"] == "2024" and flags["temperature"] is not None and not flags["adaptive_lambda1"]:
        raise InputError("--temperature has no meaning with --recipe 2024, whose consistency is an MSE: leave one out")
