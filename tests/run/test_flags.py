"""The command lines of both scripts: defaults and refused combinations."""

import dataclasses
from pathlib import Path

import pytest
import torch

from minibalora.objective import NLG_RECIPES, NLU_RECIPES, Objective
from minibalora.run.flags import nlg_parser, nlu_parser, parse_nlg_flags, parse_nlu_flags
from minibalora.run.plan import nlg_formula, nlu_formula
from minibalora.run.settings import Adaptation, Hardware, Optimisation

CPU = ["--device", "cpu"]
GLUE = ["--model", "m", "--data", "d", "--task", "mrpc"]
CUSTOM = ["--model", "m", "--data", "d", "--task", "custom"]
SCORES = ["--model", "m", "--data", "d", "--task", "stsb"]


def nlu(*flags: str):
    return parse_nlu_flags([*CPU, *flags])


def test_the_published_settings_of_classification_are_the_defaults():
    settings = nlu(*GLUE)
    source, optimisation = settings.source, settings.optimisation
    assert settings.adaptation == Adaptation("ba-lora", 8, 8, "pissa_krylov_8")
    assert optimisation == Optimisation(1e-4, "linear", 0.06, 1, 10, None, 32, 32, 42)
    assert (source.max_length, source.max_rows) == (128, None)
    assert (source.label_noise, source.imbalance, source.teacher) == (0, None, "pretrained")
    assert settings.hardware == Hardware(torch.device("cpu"), torch.float32)
    assert settings.output.folder.name.startswith("nlu-") and settings.output.features is None
    assert not settings.recorded["is_toy"] and settings.recorded["recipe"] == "iclr2026"
    assert settings.objective == NLU_RECIPES["iclr2026"]


def test_the_default_init_goes_with_method_and_model():
    assert nlu().adaptation.init == "pissa" and parse_nlg_flags(CPU).adaptation.init == "pissa"
    assert parse_nlg_flags([*CPU, "--model", "m", "--data", "d"]).adaptation.init == "pissa_krylov_8"
    assert nlu(*GLUE, "--method", "pissa", "--init-cache", "c").adaptation.init_cache == Path("c")
    assert nlu(*GLUE, "--method", "pissa", "--init", "pissa").adaptation.init == "pissa"
    assert nlu(*GLUE, "--method", "lora").adaptation.init == "lora"


def test_micro_batches_are_whole_batches_unless_asked_for():
    assert nlu(*GLUE, "--batch-size", "6").optimisation.micro_batch_size == 6
    assert nlu(*GLUE, "--batch-size", "6", "--micro-batch-size", "4").optimisation.micro_batch_size == 4
    assert nlu(*GLUE, "--batch-size", "6", "--micro-batch-size", "9").optimisation.micro_batch_size == 6


def test_the_built_in_classifier_has_the_flags_of_any_task():
    args = nlu("--label-noise", "0.2", "--imbalance", "10", "--teacher", "tuned", "--features", "f.safetensors")
    assert args.recorded["is_toy"] and args.source.task is None and args.source.data is None
    assert Path(args.source.model).is_absolute()
    assert (args.optimisation.lr, args.optimisation.epochs, args.source.max_length) == (1e-3, 4, 64)
    assert (args.source.label_noise, args.source.imbalance, args.source.teacher) == (0.2, 10, "tuned")
    assert args.output.features == Path("f.safetensors")


@pytest.mark.parametrize("parse", [parse_nlg_flags, parse_nlu_flags])
def test_plain_is_refused_with_method_full(parse, refuses):
    refuses(lambda: parse([*CPU, "--method", "full", "--plain"]), "--plain", "--method full")
    assert parse([*CPU, "--plain"]).adaptation.is_plain and not parse(CPU).adaptation.is_plain


def test_both_scripts_have_the_common_flags():
    only_nlg = {
        "prompt_field",
        "response_field",
        "input_field",
        "template",
        "top_k",
        "eval_task",
        "retain",
        "retain_every",
        "quantize",
        "teacher_cache",
        "fsdp",
    }
    only_nlg |= {"router_aux_loss"}
    only_nlu = {"task", "as_text", "text_field", "label_field", "label_noise", "imbalance", "teacher", "features"}
    nlg_names, nlu_names = parse_nlg_flags(CPU).recorded.keys(), nlu().recorded.keys()
    assert nlg_names - nlu_names == only_nlg and nlu_names - nlg_names == only_nlu


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--recipe", "2024"], NLU_RECIPES["2024"]),
        (["--lambda1", "0", "--svd-k", "2"], dataclasses.replace(NLU_RECIPES["iclr2026"], lambda1=0.0, svd_k=2)),
        (["--method", "pissa"], Objective()),
        (["--method", "lora", "--non-target-kl", "0.5"], Objective(non_target_kl=0.5)),
    ],
)
def test_flags_change_the_recipe(flags, expected):
    assert nlu(*GLUE, *flags).objective == expected


@pytest.mark.parametrize("top_k, expected", [([], 20), (["--top-k", "0"], None), (["--top-k", "7"], 7)])
def test_top_k_0_is_the_whole_vocabulary(top_k, expected):
    assert parse_nlg_flags([*CPU, *top_k]).objective.top_k == expected


@pytest.mark.parametrize("method", ["full", "lora", "pissa"])
def test_the_teacher_is_set_only_for_terms_that_need_one(method):
    assert nlu(*GLUE, "--method", method).source.teacher is None
    if method != "full":
        flags = [*GLUE, "--method", method, "--non-target-kl", "1"]
        assert (
            nlu(*flags).source.teacher == "pretrained" and nlu(*flags, "--teacher", "tuned").source.teacher == "tuned"
        )


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--model", "m"], ["--model without --data"]),
        (["--data", "d"], ["--data without --model"]),
        (["--model", "m", "--data", "d"], ["--task is missing", "mrpc", "custom"]),
        (["--task", "mrpc"], ["--task goes with --model"]),
        (["--eval", "e"], ["--eval goes with --model"]),
        (["--text-field", "t"], ["--text-field goes with --model"]),
        (["--label-field", "l"], ["--label-field goes with --model"]),
        (["--model", "m", "--data", "d", "--task", "ax"], ["--task", "'ax'", "custom"]),
        ([*GLUE, "--text-field", "t"], ["--text-field goes with --task custom", "mrpc"]),
        ([*GLUE, "--label-field", "l"], ["--label-field goes with --task custom", "mrpc"]),
        ([*CUSTOM, "--label-field", "l"], ["--task custom needs --text-field"]),
        ([*CUSTOM, "--text-field", "t"], ["--task custom needs --label-field"]),
        ([*CUSTOM, "--label-field", "l", "--text-field", "a", "b", "c"], ["--text-field names 3"]),
        *[([*SCORES, flag, "0.5"], [flag, "stsb has scores"]) for flag in ("--lambda2", "--lambda3", "--label-noise")],
        *[([*SCORES, flag, "2"], [flag, "stsb has scores"]) for flag in ("--svd-k", "--non-target-kl", "--imbalance")],
        ([*SCORES, "--adaptive-lambda1"], ["--adaptive-lambda1", "stsb has scores"]),
        *[([*GLUE, "--label-noise", value], ["--label-noise", value]) for value in ("1", "-0.1", "nan", "x")],
        *[([*GLUE, "--imbalance", value], ["--imbalance", value]) for value in ("0.9", "0", "inf", "x")],
        *[([*GLUE, "--warmup-ratio", value], ["--warmup-ratio", value]) for value in ("1.1", "-1", "nan")],
        ([*GLUE, "--top-k", "3"], ["--top-k"]),
        ([*GLUE, "--features", ""], ["--features", "empty"]),
        ([*GLUE, "--teacher", "t", "--method", "lora"], ["--teacher", "--method lora"]),
        ([*GLUE, "--teacher", "t", "--lambda1", "0"], ["--teacher", "--lambda1 0"]),
        ([*GLUE, "--teacher", "pretrained", "--method", "full"], ["--teacher", "--method full"]),
        ([*GLUE, "--method", "full", "--non-target-kl", "1"], ["--non-target-kl", "--method full"]),
        ([*GLUE, "--method", "full", "--rank", "8"], ["--rank", "--method full"]),
        ([*GLUE, "--method", "full", "--adapter-rank", "8"], ["--adapter-rank", "--method full"]),
        ([*GLUE, "--method", "pissa", "--svd-k", "2"], ["--svd-k", "--method pissa", "--recipe"]),
        ([*GLUE, "--method", "lora", "--init", "pissa"], ["--init pissa", "--method lora"]),
        ([*GLUE, "--method", "full", "--init-cache", "c"], ["--init-cache", "--method full"]),
        ([*GLUE, "--method", "lora", "--init-cache", "c"], ["--init-cache", "--method lora"]),
        ([*GLUE, "--init", "lora", "--init-cache", "c"], ["--init-cache", "--init lora"]),
        ([*GLUE, "--init", "pissa_niter_4", "--init-cache", "c"], ["--init-cache", "--init pissa_niter_4"]),
        *[([*GLUE, "--init", init], ["--init", init]) for init in ("pissa_krylov_", "pissa_krylov_x", "krylov_4")],
        ([*GLUE, "--recipe", "2024", "--temperature", "2"], ["--temperature", "--recipe 2024"]),
        ([*GLUE, "--adaptive-lambda1", "--lambda1", "0"], ["--adaptive-lambda1", "--lambda1 0"]),
        ([*GLUE, "--resume"], ["--resume needs --out"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_contradicting_flags_are_refused_in_one_line(flags, parts, refuses):
    refuses(lambda: nlu(*flags), *parts)


def test_retain_every_needs_retain(refuses):
    refuses(lambda: parse_nlg_flags([*CPU, "--retain-every", "5"]), "--retain-every goes with --retain")
    assert parse_nlg_flags([*CPU, "--retain-every", "5", "--retain", "a", "b"]).source.retain == ["a", "b"]


@pytest.mark.parametrize("parser, recipes", [(nlg_parser, NLG_RECIPES), (nlu_parser, NLU_RECIPES)])
def test_help_states_the_published_weights(parser, recipes):
    text = " ".join(parser().format_help().split())
    for name in ("lambda1", "lambda2", "lambda3"):
        numbers = (f"{recipe}: {getattr(objective, name):g}" for recipe, objective in recipes.items())
        assert f"({', '.join(numbers)})" in text


@pytest.mark.parametrize(
    "formula, expected",
    [
        (nlg_formula(NLG_RECIPES["2024"]), "KL at T = 1 | entropy of all | nuclear share of 10 singular values"),
        (nlg_formula(NLG_RECIPES["iclr2026"]), "KL at T = 2 | entropy of 20 | frobenius share of 10 singular values"),
        (
            nlu_formula(NLU_RECIPES["2024"], 2),
            "squared distance of unit rows | covariance of the classes | sum over N of 5 singular values",
        ),
        (
            nlu_formula(NLU_RECIPES["iclr2026"], 3),
            "KL at T = 1 | covariance of the classes | nuclear share of 5 singular values",
        ),
        (nlu_formula(NLU_RECIPES["iclr2026"], 1), "squared error to the teacher"),
        (nlu_formula(Objective(non_target_kl=0.5), 2), "non-target KL"),
    ],
)
def test_the_plan_names_every_term(formula, expected):
    task, *terms = formula.partition(", weights")[0].split(" + ")
    assert task == ("squared error" if "teacher" in formula else "cross-entropy")
    assert " | ".join(term.partition(" x ")[2] for term in terms) == expected
