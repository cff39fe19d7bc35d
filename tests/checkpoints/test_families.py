"""Tests that every family must pass, on its golden checkpoints; helpers.py has the names of these checkpoints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CLASSIFIERS,
    GOLDEN,
    LANGUAGE_MODELS,
    SEQ2SEQ,
    golden_example,
    gradients_of_a_step,
    real_tokens,
    stretch,
)

sys.path.insert(0, str(Path(__file__).parents[2]))

import minibalora as mb  # noqa: E402
from minibalora.checkpoints.families import FAMILIES, read_config
from minibalora.data.batches import Row  # noqa: E402
from minibalora.lowrank import adapted_layers
from minibalora.models import blocks_of
from minibalora.objective import NLG_RECIPES


def load(name: str, folder: Path | None = None):
    """Load a golden checkpoint, or its variant in `folder`. Returns model, inputs and the index of real tokens."""
    *inputs, _ = golden_example(name)
    model = mb.load_model(folder or GOLDEN / name, "classifier" if name in CLASSIFIERS else "lm")
    return model, inputs, real_tokens(name)


ALL = [*LANGUAGE_MODELS, *SEQ2SEQ, *CLASSIFIERS]


def type_of(name: str) -> str:
    return json.loads((GOLDEN / name / "config.json").read_text())["model_type"]


# A golden checkpoint, changes of its config.json, and words of the error message; test_weights.py has more cases.
REFUSED = [
    ("llama3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
    ("mistral", {"hidden_act": "relu"}, ["relu", "silu"]),
    ("gemma", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("gemma2", {"layer_types": ["chunked_attention", "full_attention"]}, ["layer_types", "chunked_attention"]),
    ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar"]),
    ("qwen2_window", {"layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
    ("qwen2_window", {"layer_types": None, "max_window_layers": -1}, ["max_window_layers", "0 to"]),
    ("qwen2", {"layer_types": ["nonsense"]}, ["layer_types", "nonsense"]),
    ("qwen3", {"attention_dropout": "much"}, ["attention_dropout"]),
    ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise"]),
    ("deepseek", {"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid"]),
    ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
    ("t5", {"feed_forward_proj": "gated-silu"}, ["gated-silu"]),
    ("bert", {"position_embedding_type": "relative_key"}, ["position_embedding_type"]),
    ("roberta", {"is_decoder": True}, ["is_decoder"]),
    ("xlm_roberta", {"position_embedding_type": "relative_key"}, ["position_embedding_type"]),
    ("deberta", {"conv_kernel_size": 3}, ["conv_kernel_size"]),
]


def test_every_family_has_a_golden_checkpoint_and_a_refused_setting():
    assert {type_of(name) for name in ALL} == {type_of(name) for name, *_ in REFUSED} == set(FAMILIES)


@pytest.mark.parametrize(("name", "changes", "parts"), REFUSED)
def test_settings_that_are_not_implemented_are_refused_by_name(name, changes, parts, tmp_path, refuses):
    config = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuses(lambda: read_config(tmp_path), tmp_path / "config.json", *parts)


@pytest.mark.parametrize("name", ALL)
def test_only_linears_in_blocks_are_adapted(name):
    model, *_ = load(name)
    mb.adapt(model, rank=2, init="lora")
    in_blocks = sum(len(adapted_layers(block)) for block in blocks_of(model))
    assert len(adapted_layers(model)) == in_blocks > 0


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_teacher_saved_adapter_and_merged_checkpoint_give_the_right_logits(name, tmp_path):
    """From PiSSA's start, the teacher equals the checkpoint; adapter and merged checkpoint equal the tuned model."""
    model, inputs, real = load(name)
    before = model(*inputs)[real]
    stretch(mb.adapt(model, rank=3))
    tuned = model(*inputs)[real]
    scale = before.abs().max()
    with mb.pretrained(model):
        assert (model(*inputs)[real] - before).abs().max() < 1e-5 * scale
    assert (tuned - before).abs().max() > 1e-3 * scale

    mb.save_adapter(model, tmp_path / "adapter")
    loaded = mb.load_adapter(load(name)[0], tmp_path / "adapter")
    assert (loaded(*inputs)[real] - tuned).abs().max() < 1e-5 * scale
    mb.save_model(model, tmp_path / "merged")
    merged, *_ = load(name, tmp_path / "merged")
    error = (merged(*inputs)[real] - tuned).norm()  # golden weights are bfloat16, and so is the merged checkpoint
    assert error < 0.25 * (tuned - before).norm()


@pytest.mark.parametrize("recipe", NLG_RECIPES)
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *SEQ2SEQ])
def test_a_training_step_gives_gradients_to_the_factors(name, recipe):
    torch.manual_seed(0)
    model = mb.adapt(mb.load_model(GOLDEN / name), rank=2)
    stretch(model)
    lengths = ((8, 19), (9, 14), (3, 11), (6, 7))  # of the prompt, and of prompt and response
    rows = [Row(torch.randint(2, 61, (total,)).numpy(), prompt, line) for line, (prompt, total) in enumerate(lengths)]
    objective = NLG_RECIPES[recipe]
    _, _, terms = gradients_of_a_step(model, rows, 2, objective, 50, 100)
    assert set(terms) == {"task", "consistency", "diversity", "svd"} and terms["consistency"] > 0
    gradients = [factor.grad for _, layer in adapted_layers(model) for factor in (layer.A, layer.B)]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(gradient.norm() > 0 for gradient in gradients) > 0.9 * len(gradients)  # an expert may get no token


@pytest.mark.parametrize("changes", [{"model_type": None}, {"model_type": None, "architectures": None}])
def test_a_bert_without_model_type_is_known_by_its_architectures_or_its_keys(changes, tmp_path):
    """Files written before 2020 lack these keys."""
    (tmp_path / "bert").mkdir()
    for path in (GOLDEN / "bert").iterdir():
        (tmp_path / "bert" / path.name).write_bytes(path.read_bytes())
    config = json.loads((GOLDEN / "bert" / "config.json").read_text()) | changes
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    *inputs, logits = golden_example("bert")
    model = mb.load_model(tmp_path / "bert", head="classifier")
    with torch.no_grad():
        ours = model(*inputs)
    assert torch.allclose(ours, logits, atol=1e-5 * logits.abs().max())
    mb.save_model(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "bert"
