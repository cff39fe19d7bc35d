"""Tests of encoders and of decoders as classifiers against transformers' values in tests/golden/; heads, teachers."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers import CLASSIFIERS, GOLDEN, golden_example, headless
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode

import minibalora as mb
from minibalora.lowrank import initial_values
from minibalora.models.encoder import bucket

ENCODERS = ["bert", "bert_relu", "roberta", "xlm_roberta", "deberta", "deberta_tanh"]
BACKBONES = {"bert": "bert", "roberta": "roberta", "deberta": "deberta", "gpt2_classifier": "transformer"}
BACKBONES |= {"t5_classifier": "transformer"}
OTHER_HEADS = {
    "bert": ["cls.predictions.bias", "cls.predictions.transform.dense.weight", "cls.seq_relationship.weight"],
    "roberta": ["lm_head.dense.weight", "lm_head.bias", "roberta.pooler.dense.weight"],
    "deberta": ["lm_predictions.lm_head.dense.weight", "mask_predictions.classifier.weight"],
    "t5_classifier": ["lm_head.weight", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
    "gpt2_classifier": ["lm_head.weight", "transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
}


def classifier(name: str, **settings):
    return mb.load_model(GOLDEN / name, head="classifier", **settings)


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    *inputs, expected = golden_example(name)
    assert (classifier(name)(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()  # 1e-4 is required


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_bfloat16_stays_near_float32(name):
    *inputs, expected = golden_example(name)
    logits = classifier(name, dtype=torch.bfloat16)(*inputs).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_padding_ids_and_other_rows_do_not_change_logits(name):
    ids, mask, *types, _ = golden_example(name)
    model = classifier(name)
    logits = model(ids, mask, *types)
    other = torch.where(mask.bool(), ids, 7)
    assert torch.allclose(model(other, mask, *types), logits, atol=1e-5)
    alone = [part[1:2, :9] for part in (ids, *types)]
    assert torch.allclose(model(alone[0], None, *alone[1:])[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_head_of_features_equals_the_logits(name):
    *inputs, _ = golden_example(name)
    model = classifier(name)
    features = model.features(*inputs)
    assert features.shape == (3, 24) and torch.equal(model.head(features), model(*inputs))


@torch.no_grad()
def test_token_types_change_berts_logits_and_default_to_zeros():
    ids, mask, types, _ = golden_example("bert")
    model = classifier("bert")
    assert types.any() and not torch.allclose(model(ids, mask, types)[0], model(ids, mask)[0], atol=1e-3)
    assert torch.equal(model(ids, mask), model(ids, mask, torch.zeros_like(types)))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_left_padding_is_refused(name):
    ids, mask, *_ = golden_example(name)
    with pytest.raises(ValueError, match="right padding only"):
        classifier(name)(ids, mask.flip(1))


@pytest.mark.parametrize(("change", "words"), [
    (lambda mask: (1 - mask) * -torch.inf, "additive"),
    (lambda mask: (1.0 - mask) * torch.finfo(torch.float32).min, "additive"),
    (lambda mask: 0 * mask, "a row without a 1"),  # additive, without padding
    (lambda mask: 2 * mask, "other values than 1"),
    (lambda mask: mask[:1], "same shape"),
    (lambda mask: mask[:, None, None], "same shape"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["bert", "deberta", "llama_classifier", "t5_classifier"])
def test_other_masks_than_ones_then_zeros_are_refused(name, change, words):
    ids, mask, *_ = golden_example(name)
    with pytest.raises(ValueError, match=words):
        classifier(name)(ids, change(mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["bert", "deberta", "llama_classifier", "t5_classifier"])
@torch.no_grad()
def test_a_mask_may_have_any_dtype(name, dtype):
    ids, mask, *_ = golden_example(name)
    model = classifier(name)
    assert torch.equal(model(ids, mask.to(dtype)), model(ids, mask))


@pytest.mark.parametrize("name", ["bert", "gpt2_classifier", "llama_classifier", "t5_classifier"])
@torch.no_grad()
def test_a_model_with_a_mask_can_be_compiled_exported_and_traced_without_values(name):
    ids, mask, *_ = golden_example(name)
    model = classifier(name)
    expected = model(ids, mask)
    exported = torch.export.export(model, (ids, mask)).module()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert all(torch.allclose(made(ids, mask), expected, atol=1e-5) for made in (exported, compiled))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(ids), mode.from_tensor(mask)).shape == expected.shape
    assert model.to("meta")(ids.to("meta"), mask.to("meta")).shape == expected.shape


@pytest.mark.parametrize(("setting", "value"), [("activation", "silu"), ("activation", "swish"), ("pooler", "relu")])
def test_unknown_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"{setting} '{value}' is not implemented"):
        replace(classifier("bert").config, **{setting: value})


@pytest.mark.parametrize(("name", "limit"), [("bert", 20), ("roberta", 20), ("gpt2_classifier", 20)])
def test_a_text_beyond_the_learned_positions_is_refused(name, limit):
    """RoBERTa's table has two more rows than positions, because positions start after the padding index 1."""
    model = classifier(name)
    assert model.config.max_position_embeddings == limit
    model(torch.full((1, limit), 5))
    with pytest.raises(ValueError, match=f"the model has {limit} positions"):
        model(torch.full((1, limit + 1), 5))


@given(st.integers(2, 300), st.data())
def test_buckets_are_odd_monotone_and_exact_for_near_distances(buckets, data):
    furthest = data.draw(st.integers(buckets // 2 + 2, 600))
    distances = torch.arange(-700, 701)
    indices = bucket(distances, buckets, furthest)
    assert torch.equal(indices, -indices.flip(0)) and (indices.diff() >= 0).all()
    middle = buckets // 2
    near = distances.abs() <= middle
    assert torch.equal(indices[near], distances[near])
    assert indices[700 + furthest - 1] == (furthest - 1 if furthest - 1 <= middle else 2 * middle - 1)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("is_bare", [False, True])
@torch.no_grad()
def test_the_backbone_loads_from_a_checkpoint_with_another_head_or_none(name, is_bare, tmp_path):
    folder, backbone = headless(name, tmp_path), BACKBONES[name]
    tensors = load_file(folder / "model.safetensors")
    tensors = {re.sub(rf"^{backbone}\.", "" if is_bare else f"{backbone}.", key): t for key, t in tensors.items()}
    if not is_bare:
        tensors |= {key: torch.zeros(2, 24) for key in OTHER_HEADS[name]}
    tensors["embeddings.position_ids" if is_bare else f"{backbone}.embeddings.position_ids"] = torch.arange(20)[None]
    if backbone == "transformer":
        del tensors["embeddings.position_ids" if is_bare else f"{backbone}.embeddings.position_ids"]
    save_file(tensors, folder / "model.safetensors")
    model = mb.load_model(folder, head="classifier", num_labels=2)
    assert model.checkpoint.new_modules == model.own_head and len(model.checkpoint.new_modules) >= 1
    ids, mask, *types, _ = golden_example(name)
    assert torch.equal(model.features(ids, mask, *types), classifier(name).features(ids, mask, *types))


@torch.no_grad()
def test_old_names_of_layer_norm_parameters_are_read(tmp_path):
    folder = headless("bert", tmp_path)
    tensors = load_file(GOLDEN / "bert" / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors")
    *inputs, expected = golden_example("bert")
    logits = mb.load_model(folder, head="classifier")(*inputs)
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_a_missing_head_is_drawn_from_the_seed(name, tmp_path):
    folder, heads = headless(name, tmp_path), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = mb.load_model(folder, head="classifier", num_labels=5)
        heads.append([p for part in model.checkpoint.new_modules for p in model.get_submodule(part).parameters()])
    assert model(torch.tensor([[5, 6, 7]])).shape == (1, 5)
    assert all(torch.equal(a, b) for a, b in zip(heads[0], heads[1], strict=True))
    weights = [(a, b) for a, b in zip(heads[0], heads[2], strict=True) if a.ndim == 2]
    assert not any(torch.equal(a, b) for a, b in weights)
    assert all(0.01 < a.std() < 0.03 for a, _ in weights)
    assert all((a == 0).all() for a in heads[0] if a.ndim == 1)


def test_a_new_head_has_the_standard_deviation_of_the_config(tmp_path):
    folder = headless("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    assert 0.4 < mb.load_model(folder, head="classifier", num_labels=5).bert.pooler["dense"].weight.std() < 0.6


def test_a_checkpoint_with_half_a_head_is_refused(tmp_path, refuses):
    folder = headless("bert", tmp_path)
    tensors = load_file(GOLDEN / "bert" / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors")
    refuses(lambda: mb.load_model(folder, head="classifier"), "lacks classifier.bias")


@pytest.mark.parametrize(
    ("name", "classes"), [("bert", 3), ("roberta", 2), ("deberta", 2), ("gpt2_classifier", 3), ("t5_classifier", 3)]
)
def test_a_stored_head_with_another_number_of_classes_is_replaced(name, classes):
    assert classifier(name).num_labels == classifier(name, num_labels=classes).num_labels == classes
    assert classifier(name, num_labels=classes).checkpoint.new_modules == []
    other = classifier(name, num_labels=classes + 1)
    assert other.checkpoint.new_modules == [other.checkpoint.family.names.head] == other.own_head
    stored = classifier(name).state_dict()
    body = {key: value for key, value in other.state_dict().items() if not key.startswith(other.own_head[0])}
    assert other.num_labels == classes + 1 and all(torch.equal(value, stored[key]) for key, value in body.items())


def test_a_new_head_has_two_classes_by_default(tmp_path):
    assert mb.load_model(headless("roberta", tmp_path), head="classifier").num_labels == 2


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_refused_as_a_language_model(name, refuses):
    refuses(lambda: mb.load_model(GOLDEN / name), "is an encoder", "head='classifier'")


@pytest.mark.parametrize("settings", [{"num_labels": 2}, {"head": "classifier", "num_labels": 0}])
def test_impossible_num_labels_are_refused(settings, refuses):
    refuses(lambda: mb.load_model(GOLDEN / "llama2", **settings), "num_labels")


@pytest.mark.parametrize(("name", "expected"), [
    ("bert", ["bert.pooler", "classifier"]), ("roberta", ["classifier"]), ("deberta", ["pooler", "classifier"]),
    ("gpt2_classifier", ["score"]), ("t5_classifier", ["classification_head"]),
])  # fmt: skip
def test_adapt_trains_the_head_and_trains_a_pooler_only_if_it_is_new(name, expected, tmp_path):
    def trained(model):
        return {name for name, parameter in mb.adapt(model, rank=2).named_parameters() if parameter.requires_grad}

    def are_of_head(names, model):
        modules = [(module, model.get_submodule(module)) for module in model.own_head]
        head = {f"{prefix}.{name}" for prefix, module in modules for name, _ in module.named_parameters()}
        return {name for name in names if not name.endswith((".A", ".B"))} == head - set(initial_values(model))

    base, fine_tuned = mb.load_model(headless(name, tmp_path), "classifier", 2), classifier(name)
    assert base.own_head == expected and fine_tuned.own_head == expected[-1:]
    assert are_of_head(trained(base), base) and are_of_head(trained(fine_tuned), fine_tuned)


@pytest.mark.parametrize(("name", "pooler"), [("bert", "bert.pooler"), ("deberta", "pooler")])
def test_a_stored_pooler_that_was_never_trained_is_trained_with_the_classifier(name, pooler, tmp_path):
    folder = headless(name, tmp_path)
    body = load_file(folder / "model.safetensors")
    stored = {key: value for key, value in load_file(GOLDEN / name / "model.safetensors").items() if "pooler." in key}
    for bias, untrained in ((0.0, [pooler]), (0.5, [])):
        changed = {key: bias * torch.ones_like(value) if "bias" in key else value for key, value in stored.items()}
        save_file(body | changed, folder / "model.safetensors")
        model = mb.load_model(folder, "classifier", 2)
        assert model.checkpoint.untrained_modules == untrained and model.checkpoint.new_modules == ["classifier"]
        assert model.own_head == [*untrained, "classifier"]
        weight = model.get_submodule(pooler)["dense"].weight
        assert torch.equal(weight, changed[f"{pooler}.dense.weight"].float())
        mb.adapt(model, rank=2)
        assert model.get_submodule(pooler)["dense"].weight.requires_grad == (bias == 0)


@pytest.mark.parametrize("init", ["pissa", "lora"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_teacher_is_the_pretrained_model_with_the_initial_head(name, init):
    """The teacher is equal to the last bit after training and has no dropout; afterwards the student is unchanged."""
    *inputs, _ = golden_example(name)
    with torch.no_grad():  # with gradients, DeBERTa's mask has a gradient and attention uses another kernel
        before = classifier(name)(*inputs)
    model = mb.adapt(classifier(name), rank=2, init=init).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(*inputs).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        student = model.eval()(*inputs)
    model.train()
    with mb.pretrained(model):
        assert torch.equal(model(*inputs), before)
    assert model.training
    with torch.no_grad():
        assert torch.equal(model.eval()(*inputs), student) and not torch.allclose(student, before)


def test_the_teacher_may_run_between_forward_and_backward():
    """Swapping the head in and out does not change the student's gradient."""
    *inputs, _ = golden_example("bert")
    gradients = []
    for runs_teacher in (False, True):
        model = mb.adapt(classifier("bert"), rank=2)
        with torch.no_grad():
            model.classifier.weight += 1
        loss = model(*inputs).square().sum()
        if runs_teacher:
            with mb.pretrained(model):
                model(*inputs)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_trained_head_is_float32_on_a_bfloat16_model():
    *inputs, _ = golden_example("roberta")
    model = mb.adapt(classifier("roberta", dtype=torch.bfloat16), rank=2)
    assert model.classifier.out_proj.weight.dtype == torch.float32
    assert model.roberta.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert model(*inputs).dtype == torch.float32


@torch.no_grad()
def test_merging_keeps_the_logits_and_drops_the_initial_head():
    *inputs, _ = golden_example("deberta")
    model = mb.adapt(classifier("deberta"), rank=2)
    model.classifier.weight += 1
    logits = model(*inputs)
    assert torch.allclose(mb.merge(model)(*inputs), logits, atol=1e-4)
    assert not list(model.buffers())
    with pytest.raises(ValueError, match="no adapted layer"), mb.pretrained(model):
        pass


@torch.no_grad()
def test_dropout_is_random_in_training_and_depends_on_the_seed():
    """The rates come from config.json."""
    for name in ("bert", "roberta", "deberta", "gpt2_classifier", "t5_classifier"):
        *inputs, expected = golden_example(name)
        model = classifier(name).train()
        torch.manual_seed(0)
        first = model(*inputs)
        assert not torch.allclose(first, expected, atol=1e-2) and not torch.equal(first, model(*inputs))
        torch.manual_seed(0)
        assert torch.equal(model(*inputs), first)
