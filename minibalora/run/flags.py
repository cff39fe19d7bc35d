"""The flags of the training scripts: their published defaults, what contradicts what, and the settings they give."""

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
    positive_int,
    positive_rate,
    rate,
    ratio,
    share_below_one,
)
from minibalora.base.errors import InputError
from minibalora.checkpoints import BUILT_IN
from minibalora.data.glue import TASKS
from minibalora.lowrank import factors_of
from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective
from minibalora.run.run_folder import plain_settings
from minibalora.run.settings import Adaptation, ClassSource, Hardware, Optimisation, Output, Settings, TextSource

METHODS = ("full", "lora", "pissa", "ba-lora")
ADAPTER_FLAGS = ("rank", "alpha", "init", "init_cache", "targets", "adapter_rank")
BA_LORA_FLAGS = ("recipe", "lambda1", "lambda2", "lambda3", "svd_k", "temperature", "top_k", "adaptive_lambda1")
# As published, but for micro_batch_size, which was 1.
DEFAULTS = {"rank": 128, "lr": 2e-5, "micro_batch_size": 4, "epochs": 1, "max_rows": 100_000, "max_length": 512}
DEFAULTS["init"] = "pissa_krylov_8"  # published: pissa; `tests/bench_pissa.py` measures what is gained and lost
BATCH_SIZE = {"2024": 128, "iclr2026": 32}
# The built-in model is 5000 times smaller than the paper's and has a minute: it takes a smaller rank and larger steps.
TOY = DEFAULTS | {"rank": 16, "lr": 2e-3, "micro_batch_size": 32, "max_rows": 3200, "max_length": 256, "init": "pissa"}
TOY["model"] = BUILT_IN / "llama"
# Published are ranges by task: learning rates 3e-5 to 6e-4, 10 to 50 epochs, batches of 6 to 32.
NLU_DEFAULTS = {"rank": 8, "lr": 1e-4, "epochs": 10, "batch_size": 32, "max_length": 128, "label_noise": 0.0}
NLU_DEFAULTS["init"] = DEFAULTS["init"]
NLU_TOY = NLU_DEFAULTS | {"lr": 1e-3, "epochs": 4, "max_length": 64, "model": BUILT_IN / "bert", "init": "pissa"}
NLU_TOY |= {"max_rows": 6000, "label_noise": 0.2, "imbalance": 4.0}  # the paper's conditions, at known rates
# Without a meaning where labels are scores.
CLASS_FLAGS = ("lambda2", "lambda3", "svd_k", "temperature", "adaptive_lambda1", "non_target_kl")
CLASS_FLAGS += ("label_noise", "imbalance")


def init(text: str) -> str:
    try:
        factors_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not lora, pissa, pissa_krylov_N or pissa_niter_N") from None
    return text


def nlg_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="train_nlg.py",
        description="Fine-tune a decoder or T5 checkpoint with BA-LoRA (arXiv 2408.04556) or a "
        "baseline. Without --model: a built-in tiny LLaMA on built-in arithmetic problems, about a minute on a CPU.",
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--model", metavar="DIR", type=folder, help="checkpoint folder: config.json, tokenizer.json, *.safetensors")
    add("--data", metavar="PATH", help="JSON Lines, a JSON array or Parquet, .gz too: a file, a pattern of shards in "
        "quotes, or a folder; the fields are recognised (see README)")  # fmt: skip
    add("--eval", metavar="FILE", help="held-out rows for the before / after table")
    add("--eval-task", choices=("gsm8k", "math"), help="ask and judge them as the paper's evaluations do")
    add("--prompt-field", metavar="NAME", help="the field that holds the prompt")
    add("--input-field", metavar="NAME", help="the field of the text that the prompt is about (default: input, context; "
        "'': none)")  # fmt: skip
    add("--response-field", metavar="NAME", help="the field that holds the response")
    add(
        "--raw", action="store_true", help="prompts as they are, without Alpaca's template: for instance T5's own tasks"
    )
    add("--max-rows", type=positive_int, help="use the first N rows (published: 100000; built-in model: 3200)")
    add("--max-length", type=positive_int, help="tokens of prompt and response, what is beyond is cut (published: 512)")

    add = _add_method_flags(parser, NLG_RECIPES, "128; built-in model: 16", "entropy of the predictions", "tokens")
    top_k = _published(NLG_RECIPES, "top_k")
    add("--top-k", type=natural, help=f"K largest logits of the entropy, 0 = all ({top_k})")
    add("--router-aux-loss", type=rate, default=0.0, help="weight of the load balance of a mixture's experts (default: "
        "0), taken per micro-batch like the spectral term; its router stays frozen")  # fmt: skip
    _add_optimisation_flags(
        parser,
        lr="published: 2e-5; built-in model: 2e-3",
        schedule="cosine",
        warmup_ratio=(0.03, "published: 0.03"),
        epochs="published: 1",
        batch_size="2024: 128; iclr2026 and baselines: 32",
        micro_batch_size="default: 4; built-in: 32",
    )
    add = _add_hardware_flags(parser)
    add("--quantize", choices=("nf4",), help="keep what is frozen of the adapted linears in 4 bits; of PiSSA, the "
        "residual (QPiSSA)")  # fmt: skip
    add("--teacher-cache", type=path, metavar="DIR", help="keep the teacher's states of response tokens there and take "
        "them from there: free from the second epoch on, and for every further run on the same rows")  # fmt: skip
    add("--fsdp", action="store_true", help="under torchrun: each process keeps its own rows of the frozen weights, "
        "and a block whole only while it computes: for a model that does not fit, slower where it does")  # fmt: skip
    _add_output_flags(parser, "nlg")
    return parser


def nlu_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="train_nlu.py",
        description="Fine-tune a BERT, RoBERTa, DeBERTa-v3, T5 or decoder checkpoint to classify texts with BA-LoRA "
        "(arXiv 2408.04556) or a baseline. Without --model: a built-in tiny BERT on built-in reviews, a minute on "
        "a CPU.",
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--model", metavar="DIR", type=folder, help="checkpoint folder: config.json, tokenizer.json, *.safetensors")
    add("--data", metavar="PATH", help="folder of a GLUE task (train.tsv, dev.tsv; train-*.parquet, "
        "validation-*.parquet), or one TSV, JSON Lines or Parquet file, or a pattern of shards in quotes")  # fmt: skip
    add("--task", choices=(*TASKS, "custom"), help="what the columns and labels are; needed with --model")
    add("--eval", metavar="FILE", nargs="+", help="further rows of the before / after table; where --data is a file, "
        "the first selects the best epoch")  # fmt: skip
    add("--as-text", action="store_true", help='T5 only: ask in words, "sst2 sentence: ...", and take for the classes '
        'the words that it would answer, "positive", by its own head in place of a new one')  # fmt: skip
    add("--text-field", metavar="NAME", nargs="+", help="custom task: the field of the text, or two for a pair")
    add("--label-field", metavar="NAME", help="custom task: the field of the label")
    add("--max-rows", type=positive_int, help="use the first N rows (default: all)")
    add("--max-length", type=positive_int, help="tokens of a text or pair, what is beyond is cut (default: 128)")
    add("--label-noise", type=share_below_one, metavar="P", help="share of the training labels that is "
        "replaced by another class, chosen by --seed (default: 0; built-in reviews: 0.2)")  # fmt: skip
    add("--imbalance", type=ratio, metavar="R", help="keep the largest class and 1/R as many training rows of every "
        "other, chosen by --seed (default: all; built-in reviews: 4)")  # fmt: skip

    diversity = "covariance of the classes, taken per micro-batch like the spectral term"
    add = _add_method_flags(parser, NLU_RECIPES, "8", diversity, "rows")
    add("--teacher", metavar="WHAT", help='what consistency and non-target KL compare with: "pretrained" (default, '
        "published) or a folder with a fine-tuned checkpoint")  # fmt: skip
    _add_optimisation_flags(
        parser,
        lr="default: 1e-4; published: 3e-5 to 6e-4, by task; built-in model: 1e-3",
        schedule="linear",
        warmup_ratio=(0.06, "default: 0.06 as in LoRA's runs on GLUE, not published for BA-LoRA"),
        epochs="default: 10; published: 10 to 50, by task; built-in model: 4",
        batch_size="default: 32; published: 6 to 32, by task",
        micro_batch_size="default: the batch size, for the covariance and the spectral term are taken of each",
    )
    _add_hardware_flags(parser)
    add = _add_output_flags(parser, "nlu")
    add("--features", metavar="FILE", type=path, help="write to this safetensors file the last hidden state that "
        "the head reads, of each dev row before and after training, and its label")  # fmt: skip
    return parser


def _add_method_flags(
    parser: argparse.ArgumentParser, recipes: dict[str, Objective], rank: str, diversity: str, unit: str
) -> Callable:
    """Adds the group and returns its add_argument, for what only one script has.

    rank: its published value; diversity: what that term is; unit: what the means are over.
    """
    add = parser.add_argument_group("method").add_argument
    published = {name: f"({_published(recipes, name)})" for name in BA_LORA_FLAGS if name in vars(recipes["2024"])}
    add("--method", choices=METHODS, default="ba-lora", help="what to train (default: ba-lora)")
    add("--recipe", choices=sorted(recipes), help="the paper's version (default: iclr2026), which sets what follows")
    add("--rank", type=positive_int, help=f"rank r of the adapters (published: {rank})")
    add("--alpha", type=positive_rate, help="s = alpha / rank scales the product (default: the rank, as published)")
    add("--init", type=init, help="lora, pissa (exact SVD, published), pissa_krylov_N (basis of N + 1 blocks: faster; "
        "8 is the default with --model) or pissa_niter_N (N subspace iterations: less exact)")  # fmt: skip
    add("--init-cache", type=path, metavar="DIR", help="keep the factors of pissa or pissa_krylov_N there and take "
        "them from there (for instance next to --out: a sweep over lambdas or seeds computes them once)")  # fmt: skip
    add("--targets", nargs="+", metavar="NAME", help="linears to adapt (default: all of attention and MLP)")
    add("--plain", action="store_true", help="the layer and the loss as the paper writes them, on whole logits: "
        "slower, more memory, the same run to rounding")  # fmt: skip
    add("--lambda1", type=rate, help=f"weight of consistency {published['lambda1']}")
    add("--lambda2", type=rate, help=f"weight of diversity {published['lambda2']}: {diversity}")
    add("--lambda3", type=rate, help=f"weight of the spectral term {published['lambda3']}, which is taken per "
        f"micro-batch and averaged over the step weighted by {unit}: it depends on --micro-batch-size")  # fmt: skip
    add("--svd-k", type=positive_int, help=f"leading singular values k {published['svd_k']}")
    add("--temperature", type=positive_rate, help=f"T of the consistency term {published['temperature']}")
    add("--adaptive-lambda1", action="store_true", default=None, help="by the teacher's entropy (iclr2026's option)")
    add("--non-target-kl", type=rate, default=0.0, help='weight of "Mask the Target", arXiv 2605.29498 (default: 0)')
    return add


def _published(recipes: dict[str, Objective], name: str) -> str:
    """The setting in every recipe, as in "2024: 1, iclr2026: 2"; "published: 10" where they agree."""
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
    """Each text says where the flag's default comes from."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=positive_rate, help=f"peak learning rate of AdamW ({lr})")
    add("--schedule", choices=("cosine", "linear"), default=schedule, help=f"fall of the rate (default: {schedule})")
    warm, source = warmup_ratio
    add("--warmup-ratio", type=fraction, default=warm, help=f"share of the steps with a rising rate ({source})")
    add("--grad-clip", type=positive_rate, default=1.0, help="largest norm of the gradient (default: 1)")
    add("--epochs", type=positive_int, help=f"passes over the data ({epochs})")
    add("--max-steps", type=positive_int, help="stop after N steps; the schedules end there, too")
    add("--batch-size", type=positive_int, help=f"rows a step ({batch_size})")
    add("--micro-batch-size", type=positive_int, help=f"rows at a time, bounded by memory ({micro_batch_size})")
    add("--seed", type=natural, default=42, help="order of rows and random inits (published: 42, 1024, 2024)")


def _add_hardware_flags(parser: argparse.ArgumentParser) -> Callable:
    """As _add_method_flags."""
    add = parser.add_argument_group("hardware").add_argument
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: bfloat16 on GPUs, "
        "float32 on CPUs); A and B are float32 always")  # fmt: skip
    add("--tf32", action="store_true", help="float32 products in TF32 while training on a GPU: several times faster, "
        "with 10 bits of mantissa (default: all 23)")  # fmt: skip
    add("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, slower")
    add("--compile", action="store_true", help="torch.compile: slower start, faster steps on GPUs")
    return add


def _add_output_flags(parser: argparse.ArgumentParser, name: str) -> Callable:
    """As _add_method_flags."""
    add = parser.add_argument_group("output").add_argument
    where = f"default: runs/{name}-DATE-TIME"
    add("--out", type=path, metavar="DIR", help=f"folder for adapter, log and checkpoint ({where})")
    add("--adapter-rank", type=positive_int, metavar="R", help="save the best approximation of this rank (default: "
        "what was trained, exactly, which from PiSSA takes twice --rank)")  # fmt: skip
    add("--save-every", type=positive_int, default=100, metavar="N", help="steps between checkpoints (default: 100)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    return add


def parse_nlg_flags(argv: list[str] | None = None) -> Settings:
    """Every default filled in; InputError for what can't be meant."""
    given = vars(nlg_parser().parse_args(argv))
    _refuse_half_a_source(given, ("eval", "eval_task", "prompt_field", "input_field", "response_field"))
    _refuse_contradictions(given)
    _refuse_text_contradictions(given)
    if given["fsdp"]:
        _refuse_without_shards(given)
    defaults = TOY if given["model"] is None else DEFAULTS
    given = _filled_in(given, defaults | {"batch_size": BATCH_SIZE[given["recipe"] or "iclr2026"]}, "nlg")
    objective = _objective(given, NLG_RECIPES)
    objective = replace(objective, top_k=objective.top_k or None, router_aux=given["router_aux_loss"])  # 0: all
    return _settings(given, TextSource, objective)


def parse_nlu_flags(argv: list[str] | None = None) -> Settings:
    """As parse_nlg_flags."""
    given = vars(nlu_parser().parse_args(argv))
    if distributed.is_torchrun():
        raise InputError("train_nlu.py runs in one process: start it with python, not torchrun")
    _refuse_half_a_source(given, ("task", "eval", "text_field", "label_field"))
    _refuse_contradictions(given)
    _refuse_task_contradictions(given)
    if given["teacher"] is None and (given["method"] == "ba-lora" or given["non_target_kl"] > 0):
        given["teacher"] = "pretrained"
    given = _filled_in(given, NLU_TOY if given["model"] is None else NLU_DEFAULTS, "nlu")
    return _settings(given, ClassSource, _objective(given, NLU_RECIPES))


def _filled_in(given: dict, defaults: dict, script: str) -> dict:
    """What was given, and the defaults of what was not; `is_toy` says that model and data are the built-in ones."""
    filled = given | {"is_toy": given["model"] is None}
    if given["method"] == "lora":
        filled["init"] = "lora"
    if given["method"] == "ba-lora":
        filled["recipe"] = given["recipe"] or "iclr2026"
    filled |= {name: value for name, value in defaults.items() if filled[name] is None}
    filled["device"] = cli.device(given["device"])
    filled["dtype"] = cli.dtype(given["dtype"], filled["device"])
    distributed.check_device(filled["device"])
    batch_size = filled["batch_size"]
    filled["micro_batch_size"] = min(filled["micro_batch_size"] or batch_size, batch_size)
    filled["alpha"] = given["alpha"] or filled["rank"]
    if given["resume"] and given["out"] is None:
        raise InputError("--resume needs --out: name the folder of the run to go on with")
    filled["out"] = given["out"] or Path("runs") / datetime.now().strftime(f"{script}-%Y%m%d-%H%M%S")
    return filled


def _objective(given: dict, recipes: dict[str, Objective]) -> Objective:
    """The recipe with what the flags change; for a baseline, the task's loss and at most the non-target KL."""
    if given["method"] != "ba-lora":
        return Objective(non_target_kl=given["non_target_kl"])
    changed = {name: given[name] for name in BA_LORA_FLAGS[1:] if given.get(name) is not None}
    return replace(recipes[given["recipe"]], non_target_kl=given["non_target_kl"], **changed)


def _settings(given: dict, source: type, objective: Objective) -> Settings:
    """The groups of the flags, and all of them as run.json keeps them."""
    recorded = plain_settings(given) | {"objective": asdict(objective)}
    given = given | {"is_plain": given["plain"], "folder": given["out"]}
    given["targets"] = given["targets"] and tuple(given["targets"])
    groups = [
        kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})
        for kind in (source, Adaptation, Optimisation, Hardware, Output)
    ]
    return Settings(groups[0], objective, *groups[1:], recorded)


def _refuse_half_a_source(given: dict, with_model: tuple[str, ...]) -> None:
    """InputError unless --model and --data are both given, or neither and none of the flags that go with them."""
    if (given["model"] is None) != (given["data"] is None):
        there, missing = ("--model", "--data") if given["data"] is None else ("--data", "--model")
        raise InputError(f"{there} without {missing}: give both, or neither for the built-in model and data")
    for name in with_model:
        if given["model"] is None and given[name] is not None:
            raise InputError(f"{cli.flag(name)} goes with --model and --data: give both")


def _refuse_contradictions(given: dict) -> None:
    unused = {
        "full": ADAPTER_FLAGS + BA_LORA_FLAGS,
        "lora": ("init_cache", *BA_LORA_FLAGS),
        "pissa": BA_LORA_FLAGS,
        "ba-lora": (),
    }
    for name in unused[given["method"]]:
        if given.get(name) is not None:  # --top-k is train_nlg.py's only
            raise InputError(f"{cli.flag(name)} has no meaning with --method {given['method']}: leave one out")
    if given["method"] == "full" and given["non_target_kl"] > 0:
        raise InputError("--non-target-kl needs a teacher, which --method full overwrites: use an adapter method")
    if given["method"] == "full" and given["plain"]:
        raise InputError("--plain has no meaning with --method full, whose layers and loss are plain: leave one out")
    if given["adaptive_lambda1"] and given["lambda1"] == 0:
        raise InputError("--adaptive-lambda1 has no meaning with --lambda1 0: leave one out")
    if given["init"] is not None and given["method"] in ("lora", "pissa"):
        if not given["init"].startswith(given["method"]):
            raise InputError(f"--init {given['init']} contradicts --method {given['method']}: leave one out")
    if (
        given["init_cache"] is not None
        and given["init"] is not None
        and given["init"].startswith(("lora", "pissa_niter"))
    ):
        raise InputError(
            f"--init-cache keeps what depends on the weights alone, not --init {given['init']}: leave one out"
        )


def _refuse_text_contradictions(given: dict) -> None:
    if given["eval_task"] and given["eval"] is None:
        raise InputError("--eval-task goes with --eval: give both")
    if given["raw"] and (given["model"] is None or given["eval_task"]):
        raise InputError("--raw has no meaning with the built-in data or --eval-task, which have prompts of their own: "
                         "leave it out")  # fmt: skip
    if given["quantize"] and given["method"] == "full":
        raise InputError("--quantize has no meaning with --method full, which trains the weights: leave one out")
    if given["quantize"] and given["compile"]:
        raise InputError("--compile does not go with --quantize: leave one out")
    if given["quantize"] and given["adapter_rank"]:
        raise InputError("--adapter-rank has to wait with --quantize: leave it out, and give it to python -m "
                         "minibalora export afterwards")  # fmt: skip
    if given["teacher_cache"] and given["method"] != "ba-lora" and given["non_target_kl"] == 0:
        raise InputError(f"--teacher-cache has no meaning with --method {given['method']} without --non-target-kl, "
                         "which has no teacher: leave it out")  # fmt: skip


def _refuse_without_shards(given: dict) -> None:
    """InputError where --fsdp can't be, or would gain nothing."""
    if not distributed.is_torchrun():
        raise InputError("--fsdp needs processes to share the model: torchrun --nproc-per-node N train_nlg.py ...")
    if given["method"] == "full":
        raise InputError("--fsdp shards frozen weights, and --method full has none: use an adapter method")
    if given["model"] is None:
        raise InputError("--fsdp is for large models, the built-in one is tiny: give --model and --data")
    if given["eval"] is not None:
        raise InputError("--fsdp trains only: leave --eval out, then run python -m minibalora evaluate on the adapter")
    for name in ("compile", "quantize", "teacher_cache"):  # with a cache, ranks would not go forward equally often
        if given[name]:
            raise InputError(f"{cli.flag(name)} does not go with --fsdp: leave one out")
    if torch.__version__ < (2, 7):
        raise InputError(f"--fsdp needs torch 2.7, this is {torch.__version__}: update it, or leave --fsdp out")


def _refuse_task_contradictions(given: dict) -> None:
    if given["model"] is not None and given["task"] is None:
        raise InputError(f"--task is missing: give one of {', '.join((*TASKS, 'custom'))}")
    for name in ("text_field", "label_field"):
        if given["task"] == "custom" and given[name] is None:
            raise InputError(f"--task custom needs {cli.flag(name)}: name the field")
        if given["task"] != "custom" and given[name] is not None:
            raise InputError(f"{cli.flag(name)} goes with --task custom: {given['task']} has its own fields")
    if given["as_text"] and given["model"] is None:
        raise InputError("--as-text is for a T5, and the built-in model is none: give --model and --data")
    if given["as_text"] and given["task"] == "stsb":
        raise InputError("--as-text needs classes, but --task stsb has scores: leave --as-text out")
    if given["as_text"] and given["teacher"] not in (None, "pretrained"):
        raise InputError("--as-text has its own pre-trained self for a teacher: leave --teacher out")
    if len(given["text_field"] or ()) > 2:
        raise InputError(f"--text-field names {len(given['text_field'])} fields: give one, or two for a pair")
    has_scores = given["task"] in TASKS and TASKS[given["task"]].labels is None
    for name in CLASS_FLAGS:
        if has_scores and given[name]:
            raise InputError(f"{cli.flag(name)} needs classes, but --task {given['task']} has scores: leave one out")
    if given["teacher"] is not None and given["method"] != "ba-lora" and given["non_target_kl"] == 0:
        raise InputError(
            f"--teacher has no meaning with --method {given['method']} without --non-target-kl: leave it out"
        )
    if given["teacher"] is not None and given["lambda1"] == 0 and given["non_target_kl"] == 0:
        raise InputError("--teacher has no meaning with --lambda1 0 and without --non-target-kl: leave one out")
    if given["recipe"] == "2024" and given["temperature"] is not None and not given["adaptive_lambda1"]:
        raise InputError("--temperature has no meaning with --recipe 2024, whose consistency is an MSE: leave one out")
