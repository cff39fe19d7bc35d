"""Adapters in PEFT's format: saved for PEFT and loaded from it (committed golden values), and what is refused."""

import json
import shutil

import pytest
import torch
from helpers import GOLDEN, distance, golden_example, headless, real_tokens, stretch
from safetensors.torch import load_file, save_file

import minibalora as mb
from minibalora.lowrank import adapted_layers

EXPECTED = load_file(GOLDEN / "llama3" / "expected.safetensors")
IDS, REAL = EXPECTED["input_ids"], EXPECTED["attention_mask"].bool()


def adapted(init: str):
    return mb.adapt(mb.load_model(GOLDEN / "llama3"), rank=3, alpha=5, init=init)


def adapter_weights(folder) -> dict[str, torch.Tensor]:
    """ΔW of each layer as PEFT defines it: (lora_alpha / r) · lora_B @ lora_A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    scaling = config["lora_alpha"] / config["r"]
    prefix = "base_model.model."
    return {
        name: scaling * tensors[f"{prefix}{name}.lora_B.weight"] @ tensors[f"{prefix}{name}.lora_A.weight"]
        for name in names
    }


SAVED = {"adapter_pissa": "llama3", "adapter_lora": "llama3", "adapter_qwen2": "qwen2", "adapter_qwen3": "qwen3"}
SAVED |= {"adapter_gemma2": "gemma2", "adapter_mixtral": "mixtral", "adapter_t5": "t5", "adapter_t5_gated": "t5_gated"}


SAVED |= {"adapter_dora": "llama3", "adapter_dylora": "llama3", "adapter_deltalora": "llama3"}
SAVED |= {"adapter_adalora": "llama2", "adapter_adalora_lora": "llama2"}
SAVED |= {"adapter_dora_gpt2": "gpt2", "adapter_adalora_gpt2": "gpt2"}
SAVED |= {"adapter_loha": "mistral_window", "adapter_loha_lora": "mistral_window"}  # by make_peft_adapters.py


@pytest.mark.parametrize("name", SAVED)
@torch.no_grad()
def test_peft_loads_a_saved_adapter_on_the_original_base(name):
    """expected.safetensors holds PEFT's logits with exactly these files on transformers' model of the base."""
    *inputs, _ = golden_example(SAVED[name])
    real, golden = real_tokens(SAVED[name]), GOLDEN / name
    expected = load_file(golden / "expected.safetensors")["logits"][real]
    model = mb.load_adapter(mb.load_model(GOLDEN / SAVED[name]), golden)
    assert (model(*inputs)[real] - expected).abs().max() < 1e-5 * expected.abs().max()  # the bar is 1e-4


@torch.no_grad()
def test_saving_gives_the_golden_adapter_again(tmp_path):
    model = adapted("pissa")
    stretch(model)
    mb.save_adapter(model, tmp_path)
    again, golden = adapter_weights(tmp_path), adapter_weights(GOLDEN / "adapter_pissa")
    assert again.keys() == golden.keys()
    assert all(distance(again[name], golden[name]) < 1e-4 for name in golden)  # the SVD differs between machines
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, GOLDEN / "adapter_pissa")
    ]
    assert configs[0] | {"base_model_name_or_path": None} == configs[1]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "lora"])
def test_the_change_from_the_original_base_is_saved(init, tmp_path):
    model = adapted(init)
    mb.save_adapter(model, tmp_path)
    assert all((change == 0).all() for change in adapter_weights(tmp_path).values())  # nothing learned yet
    base = mb.load_model(GOLDEN / "llama3")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn_like(parameter)
    mb.save_adapter(model, tmp_path)
    for name, change in adapter_weights(tmp_path).items():
        assert distance(base.get_submodule(name).weight + change, model.get_submodule(name).weight) < 1e-6
    assert not list(tmp_path.glob(".*"))


def test_target_modules_name_the_adapted_layers_and_no_other(tmp_path):
    for targets, expected in [
        (["q_proj"], ["q_proj"]),
        (["0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
    ]:
        mb.save_adapter(mb.adapt(mb.load_model(GOLDEN / "llama3"), rank=2, targets=targets), tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == expected


def test_there_is_nothing_to_save_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        mb.save_adapter(mb.load_model(GOLDEN / "llama3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


ADAPTERS_OF_CLASSIFIERS = {  # as in make_golden.py: base, init, whether the base is without a head
    "adapter_gpt2": ("gpt2_classifier", "pissa", False),
    "adapter_bert": ("bert", "lora", False),
    "adapter_roberta": ("roberta", "lora", True),
    "adapter_deberta": ("deberta", "pissa", True),
    "adapter_t5_classifier": ("t5_classifier", "pissa", True),
}


@pytest.mark.parametrize("name", ADAPTERS_OF_CLASSIFIERS)
@torch.no_grad()
def test_peft_loads_a_saved_classifier_on_the_original_base(name, tmp_path):
    """PEFT's logits come from these files alone, so it is enough that they give the same logits here."""
    base, _, is_headless = ADAPTERS_OF_CLASSIFIERS[name]
    *inputs, logits = golden_example(base)
    path = headless(base, tmp_path) if is_headless else GOLDEN / base
    model = mb.load_model(path, head="classifier", num_labels=logits.shape[1])
    config = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == model.own_head
    mb.load_adapter(model, GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    assert (model(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "gpt2_classifier", "llama_classifier", "t5_classifier"])
@torch.no_grad()
def test_a_classifiers_adapter_holds_its_changes_and_its_whole_head(name, tmp_path):
    """fan_in_fan_out is true for GPT-2 only: it tells PEFT that the base stores its linears as (in, out)."""
    model = mb.adapt(mb.load_model(GOLDEN / name, head="classifier"), rank=2)
    stretch(model)
    for module in model.own_head:
        for parameter in model.get_submodule(module).parameters():
            parameter += 1
    mb.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2_classifier")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head = {key.removeprefix("base_model.model."): t for key, t in tensors.items() if ".lora_" not in key}
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad and not key.endswith((".A", ".B"))}
    assert head.keys() == trained.keys() and all(torch.equal(head[key], trained[key]) for key in head)
    assert len(tensors) == len(head) + 2 * len(adapted_layers(model))


# Adapters that PEFT saved (tests/make_peft_adapters.py).

PEFTS = {
    "peft_lora": "llama3",
    "peft_rslora_regex": "mistral_window",
    "peft_all_linear": "gemma",
    "peft_last_block": "llama2",
    "peft_whole_head": "llama2",
    "peft_adapted_head": "llama3",
    "peft_gpt2": "gpt2",
    "peft_qwen2": "qwen2",
    "peft_bert": "bert",
    "peft_roberta": "roberta",
    "peft_t5": "t5_gated",
    "peft_t5_classifier": "t5_classifier",
    "peft_pissa_converted": "llama3",
    "peft_pissa": "llama3",
    "peft_pissa_rslora": "llama2",
    "peft_pissa_gpt2": "gpt2",
    "peft_olora": "qwen2",
    "peft_dora": "llama3",
    "peft_dora_pissa": "qwen2",
    "peft_dora_gpt2": "gpt2",
    "peft_adalora": "llama2",
    "peft_loha": "mistral_window",
}
SUBTRACTED = ("peft_pissa", "peft_pissa_rslora", "peft_pissa_gpt2", "peft_olora", "peft_dora_pissa")


def base_of(name: str, dtype: torch.dtype = torch.float32):
    classifiers = ("peft_bert", "peft_roberta", "peft_t5_classifier")
    return mb.load_model(GOLDEN / PEFTS[name], "classifier" if name in classifiers else "lm", dtype=dtype)


@pytest.mark.parametrize("name", PEFTS)
@torch.no_grad()
def test_an_adapter_that_peft_saved_gives_pefts_logits(name):
    *inputs, base_logits = golden_example(PEFTS[name])
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    real = real_tokens(PEFTS[name])
    model = mb.load_adapter(base_of(name), GOLDEN / name)
    logits = model(*inputs)
    tolerance = 1e-4 if name in SUBTRACTED else 1e-5  # another machine's SVD differs, and a large part cancels
    assert (logits - expected)[real].abs().max() < tolerance * expected[real].abs().max()
    assert distance(expected[real], base_logits[real]) > 0.01  # the adapter does something
    with mb.pretrained(model):
        assert torch.equal(model(*inputs), base_of(name)(*inputs))
    mb.merge(model)
    assert distance(model(*inputs)[real], logits[real]) < tolerance / 10


@pytest.mark.parametrize("name", PEFTS)
@torch.no_grad()
def test_an_adapter_survives_loading_and_saving(name, tmp_path):
    """Patterns, scalings and whole modules are saved so that they load as the same change."""
    *inputs, _ = golden_example(PEFTS[name])
    model = mb.load_adapter(base_of(name), GOLDEN / name)
    mb.save_adapter(model, tmp_path)
    assert distance(mb.load_adapter(base_of(name), tmp_path)(*inputs), model(*inputs)) < 1e-6


@pytest.mark.parametrize("name", ["peft_whole_head", "peft_adapted_head", "peft_roberta"])
@torch.no_grad()
def test_bfloat16_models_take_adapters_whose_head_is_trained(name):
    *inputs, _ = golden_example(PEFTS[name])
    model = mb.load_adapter(base_of(name, torch.bfloat16), GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    real = real_tokens(PEFTS[name])
    assert distance(model(*inputs)[real], expected[real]) < 0.05  # bfloat16 has 3 digits; a lost adapter costs more


def test_two_adapters_are_used_in_turn_on_one_base_that_never_changes():
    """One starts from PiSSA, one from LoRA. Both are relative to the base's files, which do not change."""
    before = {path.name: path.read_bytes() for path in (GOLDEN / "llama3").iterdir()}
    logits = {}
    with torch.no_grad():
        for init in ("pissa", "lora", "pissa", "lora"):
            model = mb.load_adapter(mb.load_model(GOLDEN / "llama3"), GOLDEN / f"adapter_{init}")
            expected = load_file(GOLDEN / f"adapter_{init}" / "expected.safetensors")["logits"][REAL]
            assert (model(IDS)[REAL] - expected).abs().max() < 1e-5 * expected.abs().max()
            assert torch.equal(logits.setdefault(init, model(IDS)), model(IDS))
            with mb.pretrained(model):
                assert torch.equal(model(IDS), mb.load_model(GOLDEN / "llama3")(IDS))
    assert distance(logits["pissa"], logits["lora"]) > 0.1
    assert {path.name: path.read_bytes() for path in (GOLDEN / "llama3").iterdir()} == before


def test_a_loaded_adapter_can_be_trained_on():
    model = mb.load_adapter(base_of("peft_whole_head"), GOLDEN / "peft_whole_head")
    model(IDS).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B", "weight"} and len(trained) == 2 * 2 + 2


@pytest.mark.parametrize("rank", [1, 3, 6, 50])
@torch.no_grad()
def test_an_adapter_is_saved_with_a_smaller_rank(rank, tmp_path):
    model = adapted("pissa")
    stretch(model)
    logits = model(IDS)
    error = mb.truncate(model, rank)
    mb.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == min(rank, 6)
    again = mb.load_adapter(mb.load_model(GOLDEN / "llama3"), tmp_path)(IDS)
    assert distance(again, model(IDS)) < 1e-6 and distance(again, logits) < max(3 * error, 1e-5)


# Errors.


@pytest.fixture
def adapter(tmp_path):
    """adapter(name, config changes, tensor changes) makes a changed copy of a golden adapter; None removes a key."""

    def copy(name: str = "peft_lora", config: dict | None = None, tensors: dict | None = None):
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
        changed = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
        present = {key: value for key, value in changed.items() if value is not None}
        (folder / "adapter_config.json").write_text(json.dumps(present))
        stored = load_file(folder / "adapter_model.safetensors") | (tensors or {})
        save_file({k: t for k, t in stored.items() if t is not None}, folder / "adapter_model.safetensors")
        return folder

    return copy


@pytest.fixture
def refused(refuses):
    """Check that loading is refused with these words and leaves the model unchanged."""

    def check(folder, *parts, base="llama3", head="lm"):
        model = mb.load_model(GOLDEN / base, head)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        refuses(lambda: mb.load_adapter(model, folder), *parts)
        after = model.state_dict()
        assert not adapted_layers(model) and all(torch.equal(after[name], before[name]) for name in before)

    return check


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_config_without_a_key_is_refused(adapter, refused, key):
    refused(adapter(config={key: None}), "adapter_config.json", key, "missing")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"peft_type": 7},
        {"r": 0},
        {"r": True},
        {"r": "8"},
        {"lora_alpha": "16"},
        {"lora_alpha": float("inf")},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": [1]},
        {"target_modules": "(q_proj"},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": None}},
        {"modules_to_save": "lm_head"},
        {"use_rslora": "yes"},
        {"layers_to_transform": "0"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"use_dora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [5]},
        {"enable_lora": [True, False, True]},
        {"megatron_config": {"tensor_model_parallel_size": 2}},
        {"something_of_tomorrow": "on"},
        {"scale_of_tomorrow": 1.0},
        {"config_of_tomorrow": {"depth": 2}},
    ],
)
def test_a_config_that_is_wrong_or_not_implemented_is_refused_by_its_key(adapter, refused, config):
    refused(adapter(config=config), "adapter_config.json", *config)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq"])
def test_an_init_that_does_not_follow_from_the_base_is_refused_with_the_cure(adapter, refused, init):
    refused(adapter(config={"init_lora_weights": init}), init, "subtracted", "path_initial_model_for_weight_conversion")


def test_a_pissa_adapter_that_pissa_cannot_have_made_is_refused(adapter, refused):
    """The factors would be infinite or too narrow."""
    refused(adapter("peft_pissa", {"lora_alpha": 0}), "alpha 0", "pissa")
    wide = {name: torch.ones(30, 24) for name in [f"{Q0}.lora_A.weight"]} | {f"{Q0}.lora_B.weight": torch.ones(48, 30)}
    refused(adapter("peft_pissa", {"rank_pattern": {r"layers\.0.*q_proj": 30}}, wide), "rank 30", "pissa")


def test_a_variants_adapter_that_does_not_fit_is_refused(adapter, refused):
    value = f"{Q0}.lora_magnitude_vector"
    refused(adapter("peft_dora", tensors={value: None}), "q_proj has no lora_magnitude_vector", "use_dora")
    shutil.rmtree(adapter("peft_dora"))
    refused(adapter("peft_dora", tensors={value: torch.ones(47)}), "[47]", "saved together")
    shutil.rmtree(adapter("peft_dora"))
    refused(adapter("peft_dora", {"use_dora": False}), "lora_magnitude_vector", "not say that such factors are used")
    refused(GOLDEN / "peft_dora", "not a linear layer of this model", base="gpt2")
    refused(GOLDEN / "adapter_loha", "another base", base="llama2")


@pytest.mark.parametrize(
    ("name", "config", "parts"),
    [
        ("peft_loha", {"alpha": None}, ["the key alpha is missing"]),
        ("peft_loha", {"alpha": "8"}, ["alpha is '8'"]),
        ("peft_loha", {"r": 5}, ["says rank 5"]),
        ("peft_loha", {"use_dora": True}, ["lora_magnitude_vector", "use_dora"]),
        ("peft_adalora", {"init_r": None}, ["the key init_r is missing"]),
        ("peft_adalora", {"rank_pattern": {"q_proj": 2}}, ["rank_pattern", "AdaLoRA's"]),
        ("peft_adalora", {"rank_pattern": None}, ["says rank 4"]),
        ("peft_adalora", {"use_dora": True}, ["lora_magnitude_vector"]),
        ("peft_adalora", {"peft_type": "LORA"}, ["peft_adalora"]),
        ("peft_lora", {"peft_type": "LOHA", "alpha": 3}, ["has no hada_w1_a"]),
        ("peft_lora", {"alpha": 3}, ["alpha is 3, an unknown key"]),
    ],
)
def test_a_variants_config_that_is_wrong_is_refused_by_its_key(adapter, refused, name, config, parts):
    refused(adapter(name, config), *parts, base=PEFTS[name])


def test_a_loha_of_transposed_layers_is_refused(adapter, refused):
    """PEFT has none."""
    shapes = {"w1_a": (72, 3), "w1_b": (3, 24), "w2_a": (72, 3), "w2_b": (3, 24)}
    layer = "base_model.model.transformer.h.0.attn.c_attn.hada_"
    old = dict.fromkeys(load_file(GOLDEN / "peft_loha" / "adapter_model.safetensors"))
    tensors = old | {f"{layer}{part}": torch.ones(shape) for part, shape in shapes.items()}
    refused(adapter("peft_loha", {"rank_pattern": None}, tensors), "c_attn is a LoHa", "GPT-2", base="gpt2")


def test_olora_of_transposed_layers_is_refused(adapter, refused):
    refused(adapter("peft_gpt2", {"init_lora_weights": "olora"}), "olora", "GPT-2", base="gpt2")


def test_unknown_keys_that_are_off_are_ignored_and_named(adapter, capsys):
    """No note about known keys, which PEFT 0.21 writes or which matter only in training."""
    known = {"use_dora": False, "qalora_group_size": 16, "runtime_config": {"ephemeral_gpu_offload": False}}
    known |= {"megatron_core": "megatron.core", "lora_dropout": 0.1, "layer_replication": [], "peft_version": "0.99"}
    mb.load_adapter(mb.load_model(GOLDEN / "llama3"), adapter(config=known))
    assert capsys.readouterr() == ("", "")
    unknown = {"trick_b": False, "trick_a": [], "trick_c": {"depth": 0}}
    mb.load_adapter(mb.load_model(GOLDEN / "llama3"), adapter(config=unknown))
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "adapter_config.json" in printed.err and "ignored: trick_a, trick_b, trick_c" in printed.err


@pytest.mark.parametrize("side", "AB")
def test_a_missing_factor_is_refused(adapter, refused, side):
    refused(adapter(tensors={f"{Q0}.lora_{side}.weight": None}), f"q_proj has no lora_{side}")


def test_a_layer_named_in_target_modules_must_exist(adapter, refused):
    pair = {f"{Q0}.lora_{side}.weight": None for side in "AB"}
    refused(adapter(tensors=pair), "model.layers.0.self_attn.q_proj", "target_modules")
    refused(adapter(config={"target_modules": r".*\.gate_proj"}), "mlp.gate_proj", "target_modules")


def test_a_rank_that_contradicts_the_config_is_refused(adapter, refused):
    refused(adapter(config={"r": 4}), "[3, 40]", "rank 4")
    refused(adapter(config={"rank_pattern": {"down_proj": 2}}), "down_proj", "rank 2")
    refused(
        adapter(config={"r": 3, "rank_pattern": {}}, tensors={f"{Q0}.lora_B.weight": torch.zeros(48, 2)}), "[48, 2]"
    )
    refused(adapter(tensors={f"{Q0}.lora_A.weight": torch.zeros(72)}), "[72]")


def test_an_adapter_for_another_base_is_refused(adapter, refused):
    refused(adapter(config={"base_model_name_or_path": "that/one"}), "24 x 16", "24 x 24", "that/one", base="llama2")
    refused(GOLDEN / "peft_gpt2", "not a linear layer of this model")
    refused(GOLDEN / "peft_lora", "not a linear layer of this model", base="gpt2")
    refused(GOLDEN / "peft_bert", "another base or head", base="roberta", head="classifier")
    refused(GOLDEN / "peft_adapted_head", "lm_head", "tie_word_embeddings", base="llama_bias_tied")


def test_tensors_that_are_saved_whole_must_fit(adapter, refused):
    head = "base_model.model.lm_head.weight"
    refused(adapter("peft_whole_head", tensors={head: None}), "lacks lm_head.weight", base="llama2")
    refused(adapter("peft_whole_head", tensors={head: torch.zeros(61, 20)}), "[61, 20]", "[61, 24]", base="llama2")
    stranger = {"base_model.model.score.weight": torch.zeros(2, 24)}
    refused(adapter("peft_lora", tensors=stranger), "score.weight", "none")
    three_classes = {"base_model.model.classifier.out_proj.weight": torch.zeros(3, 24)}
    refused(adapter("peft_roberta", tensors=three_classes), "[3, 24]", "[2, 24]", base="roberta", head="classifier")


@pytest.mark.parametrize("base", ["llama_bias_tied", "gemma"])
def test_a_changed_embedding_for_a_tied_base_is_refused(adapter, refused, base):
    """PEFT unties the two, so the head keeps the old weight. Here the head would use the new embedding."""
    embedding = {"base_model.model.model.embed_tokens.weight": torch.zeros(61, 24)}
    refused(adapter("peft_whole_head", tensors=embedding | {"base_model.model.lm_head.weight": None}),
            "embed_tokens", "tie_word_embeddings", base=base)  # fmt: skip


@pytest.mark.parametrize("base", ["llama3", "llama_bias_tied"])
@pytest.mark.parametrize("rows", [60, 64])
def test_added_tokens_are_named_and_no_other_base(adapter, base, rows):
    """PEFT stores embedding and head whole if the vocabulary was resized, with or without a LoRA of the head."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    whole = {f"base_model.model.{name}": torch.ones(rows, 24) for name in names}
    part = {name.replace("lm_head", "lm_head.base_layer"): value for name, value in whole.items()}
    repeated = {name.replace(".weight", ".original_module.weight"): value + 1 for name, value in whole.items()}
    lora = {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 24)}
    lora |= {"base_model.model.lm_head.lora_B.weight": torch.ones(rows, 2)}
    for tensors in (whole, part, whole | repeated, lora):
        folder = adapter(config={"rank_pattern": {"lm_head": 2}}, tensors=tensors)
        with pytest.raises(mb.InputError) as refusal:
            mb.load_adapter(mb.load_model(GOLDEN / base), folder)
        if tensors is lora and base == "llama_bias_tied":
            assert "tie_word_embeddings" in str(refusal.value)
        else:
            assert f"{rows} tokens" in str(refusal.value) and "tokens were added" in str(refusal.value)
        assert "another base" not in str(refusal.value)
        shutil.rmtree(folder)


@pytest.mark.parametrize("base", ["llama3", "llama_bias_tied", "t5"])
@torch.no_grad()
def test_an_embedding_that_only_repeats_the_bases_is_left_out(base, tmp_path):
    """PEFT's save_embedding_layers=True saves it. Loading it would untie a tied head."""
    model = mb.adapt(mb.load_model(GOLDEN / base), rank=2, init="lora")
    stretch(model)
    mb.save_adapter(model, tmp_path)
    embedding = model.embedding.weight
    copies = ("encoder.embed_tokens", "decoder.embed_tokens") if base == "t5" else ("model.embed_tokens",)
    whole = {f"base_model.model.{name}.weight": embedding.clone() for name in copies}
    whole["base_model.model.lm_head.weight"] = model.head_weight.to(torch.bfloat16)  # the dtype of the base's file
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | whole, file)
    again = mb.load_adapter(mb.load_model(GOLDEN / base), tmp_path)
    *inputs, _ = golden_example(base)
    assert again.own_head == [] and distance(again(*inputs), model(*inputs)) < 1e-6


@torch.no_grad()
def test_the_trained_one_of_three_copies_of_a_module_is_loaded(adapter, refused):
    """PEFT with modules_to_save and save_embedding_layers=True stores the trained module twice, and the base's."""
    base = "base_model.model.lm_head"
    trained = load_file(GOLDEN / "peft_whole_head" / "adapter_model.safetensors")[f"{base}.weight"]
    original = mb.load_model(GOLDEN / "llama2").lm_head.weight.detach().clone()
    names = {f"{base}.modules_to_save.weight": trained, f"{base}.original_module.weight": original}
    model = mb.load_adapter(mb.load_model(GOLDEN / "llama2"), adapter("peft_whole_head", tensors=names))
    assert torch.equal(model.lm_head.weight, trained)
    names[f"{base}.original_module.weight"] = original + 1
    refused(adapter("peft_whole_head", tensors=names), "lm_head.weight", "differs", base="llama2")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module."])
@torch.no_grad()
def test_names_of_wrapped_modules_are_understood(adapter, wrapper):
    """torch.compile and FSDP insert their own names; a plain state_dict keeps the adapter's name, "default"."""
    folder = adapter()
    file = folder / "adapter_model.safetensors"
    stored = {
        name.replace("model.layers", f"{wrapper}model.layers"): tensor for name, tensor in load_file(file).items()
    }
    save_file({name.replace("lora_A", "lora_A.default"): tensor for name, tensor in stored.items()}, file)
    expected = load_file(GOLDEN / "peft_lora" / "expected.safetensors")["logits"][REAL]
    assert distance(mb.load_adapter(mb.load_model(GOLDEN / "llama3"), folder)(IDS)[REAL], expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
@torch.no_grad()
def test_factors_and_heads_load_from_any_floating_dtype(adapter, dtype):
    stored = load_file(GOLDEN / "peft_whole_head" / "adapter_model.safetensors")
    rounded = {name: tensor.to(dtype) for name, tensor in stored.items()}
    inputs = EXPECTED["input_ids"]
    model = mb.load_adapter(mb.load_model(GOLDEN / "llama2"), adapter("peft_whole_head", tensors=rounded))
    as_float32 = {name: tensor.float() for name, tensor in rounded.items()}
    again = mb.load_adapter(mb.load_model(GOLDEN / "llama2"), adapter("peft_whole_head", tensors=as_float32))
    assert torch.equal(model(inputs), again(inputs))


def test_tensors_that_are_not_factors_are_refused_by_name(adapter, refused):
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    lora = {f"{embedding}A": torch.ones(2, 61), f"{embedding}B": torch.ones(24, 2)}
    refused(adapter(tensors=lora), "embed_tokens.lora_embedding_A", "LoRA of an embedding")
    shutil.rmtree(adapter())
    refused(adapter(tensors={f"{Q0}.lora_magnitude_vector": torch.ones(48)}), "lora_magnitude_vector", "used")
    shutil.rmtree(adapter())
    refused(adapter(tensors={f"{Q0}.lora_A.weight": torch.ones(3, 24).to(torch.int8)}), "q_proj.lora_A", "int8")


@pytest.mark.parametrize("name", [f"{Q0}.lora_B.weight", "base_model.model.lm_head.weight"])
def test_a_tensor_that_zero3_left_empty_is_refused_with_the_cure(adapter, refused, name):
    refused(adapter(tensors={name: torch.zeros(0)}), name, "ZeRO-3", "zero_to_fp32.py")


def test_an_adapter_of_a_model_without_its_head_is_refused_with_the_reason(adapter, refused):
    folder = adapter()
    file = folder / "adapter_model.safetensors"
    save_file(
        {name.replace("model.model.model.", "model.model."): tensor for name, tensor in load_file(file).items()}, file
    )
    refused(folder, "without its head", "AutoModel")


def test_a_classifiers_adapter_is_not_for_a_language_model(adapter, refused):
    head = {"base_model.model.score.weight": torch.zeros(2, 24)}
    refused(adapter(config={"task_type": "SEQ_CLS"}, tensors=head), "score.weight", "head='classifier'")


def test_a_lora_of_a_module_that_is_not_linear_is_refused(adapter, refused):
    factors = {f"base_model.model.model.embed_tokens.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}
    refused(adapter(tensors=factors), "embed_tokens (embedding)", "only linear layers")


@pytest.mark.parametrize("init", ["pissa", "olora"])
@torch.no_grad()
def test_an_unconverted_adapter_in_bfloat16_is_as_near_to_float32_as_its_base(init):
    """PEFT rounds the residual to bfloat16, the base's dtype; here the base stays as it is."""
    name = f"peft_{init}"
    *inputs, base_logits = golden_example(PEFTS[name])
    expected, real = load_file(GOLDEN / name / "expected.safetensors")["logits"], real_tokens(PEFTS[name])
    model = mb.load_adapter(base_of(name, torch.bfloat16), GOLDEN / name)
    of_base = distance(base_of(name, torch.bfloat16)(*inputs)[real], base_logits[real])
    assert distance(model(*inputs)[real], expected[real]) < 2 * of_base


def test_an_adapter_of_any_model_of_linears_loads_again(tmp_path):
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))

    model, x = mb.adapt(net(), rank=2), torch.randn(4, 5)
    stretch(model)
    mb.save_adapter(model, tmp_path)
    assert distance(mb.load_adapter(net(), tmp_path)(x), model(x)) < 1e-6


def test_a_base_without_a_head_needs_an_adapter_with_one(adapter, refuses, tmp_path):
    stored = load_file(GOLDEN / "peft_roberta" / "adapter_model.safetensors")
    without = adapter("peft_roberta", {"modules_to_save": None}, {key: None for key in stored if "classifier" in key})
    model = mb.load_model(headless("roberta", tmp_path / "base"), "classifier", 2)
    refuses(lambda: mb.load_adapter(model, without), "lacks classifier.dense.weight", "modules_to_save")


def test_the_untrained_head_that_a_state_dict_holds_is_not_compared(adapter, tmp_path):
    stored = load_file(GOLDEN / "peft_roberta" / "adapter_model.safetensors")
    heads = {name: tensor for name, tensor in stored.items() if "classifier" in name}
    untrained = {
        name.replace("classifier.", "classifier.original_module."): tensor + 1 for name, tensor in heads.items()
    }
    model = mb.load_model(headless("roberta", tmp_path / "base"), "classifier", 2)
    mb.load_adapter(model, adapter("peft_roberta", tensors=untrained))
    for name, tensor in heads.items():
        assert torch.equal(model.get_parameter(name.removeprefix("base_model.model.")), tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(adapter, refused, value):
    refused(adapter(tensors={f"{Q0}.lora_A.weight": torch.full((3, 24), value)}), "q_proj.lora_A", "finite")


def test_missing_and_broken_files_are_refused(adapter, refused, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(GOLDEN / "llama2", "adapter_config.json", "no such file")
    folder = adapter()
    (folder / "adapter_model.safetensors").write_bytes(b"no safetensors")
    refused(folder, "not a readable safetensors file")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.safetensors", "no such file")
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    refused(folder, "safe_serialization", "pickle")
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, "not an object")
    refused(
        adapter("peft_gpt2", tensors={"transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(1)}), "base_model.model."
    )


def test_a_second_adapter_on_an_adapted_model_is_refused():
    model = adapted("lora")
    with pytest.raises(ValueError, match="load the base again"):
        mb.load_adapter(model, GOLDEN / "adapter_lora")
