"""Adapters as PEFT reads them (committed golden values), and merged checkpoints."""

import json

import pytest
import torch
from helpers import GOLDEN, distance, golden_example, headless, stretch
from safetensors import safe_open
from safetensors.torch import load_file

import minibalora as mb
from minibalora import adapter_io

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


@pytest.mark.parametrize("init", ["pissa", "lora"])
@torch.no_grad()
def test_a_saved_adapter_is_what_peft_loads_on_the_original_base(init):
    """expected.safetensors holds PEFT's logits with exactly these files on transformers' model of the base."""
    golden = GOLDEN / f"adapter_{init}"
    expected = load_file(golden / "expected.safetensors")["logits"][REAL]
    model = mb.load_model(GOLDEN / "llama3")
    for name, change in adapter_weights(golden).items():
        model.get_submodule(name).weight += change
    assert (model(IDS)[REAL] - expected).abs().max() < 1e-5 * expected.abs().max()  # the bar is 1e-4


@torch.no_grad()
def test_saving_gives_the_golden_adapter_again(tmp_path):
    model = adapted("pissa")
    stretch(model)
    mb.save_adapter(model, tmp_path)
    again, golden = adapter_weights(tmp_path), adapter_weights(GOLDEN / "adapter_pissa")
    assert again.keys() == golden.keys()
    assert all(distance(again[name], golden[name]) < 1e-4 for name in golden)  # the SVD may differ between machines
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, GOLDEN / "adapter_pissa")
    ]
    assert configs[0] | {"base_model_name_or_path": None} == configs[1]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "lora"])
def test_what_is_saved_is_the_change_from_the_original_base(init, tmp_path):
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


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
@torch.no_grad()
def test_a_saved_model_is_the_adapted_one_on_its_own(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(adapter_io, "SHARD_BYTES", shard_bytes)
    model = adapted("pissa")
    stretch(model)
    before = model(IDS)
    mb.save_model(model, tmp_path)
    assert torch.equal(model(IDS), before) and adapter_io.adapted_layers(model)  # left as it was
    assert distance(mb.load_model(tmp_path)(IDS)[REAL], before[REAL]) < 1e-6
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_bytes > 5000
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}  # transformers insists on it


def test_saving_the_base_gives_its_bits_back(tmp_path):
    model = mb.load_model(GOLDEN / "llama_bias_tied", dtype=torch.bfloat16)
    mb.save_model(mb.adapt(model, rank=2), tmp_path)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / "llama_bias_tied"))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in original)


def test_a_model_is_not_saved_beside_weights_that_would_be_read_instead(tmp_path, monkeypatch):
    model = mb.load_model(GOLDEN / "llama3")
    mb.save_model(model, tmp_path)
    mb.save_model(model, tmp_path)  # the same files: replaced
    monkeypatch.setattr(adapter_io, "SHARD_BYTES", 5000)
    with pytest.raises(mb.InputError, match="holds other weights"):
        mb.save_model(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


ADAPTERS_OF_CLASSIFIERS = {  # as in make_golden.py: base, init, whether the base is without a head
    "adapter_gpt2": ("gpt2_classifier", "pissa", False),
    "adapter_bert": ("bert", "lora", False),
    "adapter_roberta": ("roberta", "lora", True),
    "adapter_deberta": ("deberta", "pissa", True),
}


@pytest.mark.parametrize("name", ADAPTERS_OF_CLASSIFIERS)
@torch.no_grad()
def test_a_saved_classifier_is_what_peft_loads_on_the_original_base(name, tmp_path):
    """PEFT's logits come from these files alone, so weights and head that give them here are all that counts."""
    base, _, is_headless = ADAPTERS_OF_CLASSIFIERS[name]
    *inputs, logits = golden_example(base)
    path = headless(base, tmp_path) if is_headless else GOLDEN / base
    model = mb.load_model(path, head="classifier", num_labels=logits.shape[1])
    tensors = load_file(GOLDEN / name / "adapter_model.safetensors")
    config = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == model.own_head
    for layer, weight in adapter_weights(GOLDEN / name).items():
        model.get_submodule(layer).weight += weight
    for key, tensor in tensors.items():
        if ".lora_" not in key:
            model.get_parameter(key.removeprefix("base_model.model.")).copy_(tensor)
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    assert (model(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "gpt2_classifier", "llama_classifier"])
@torch.no_grad()
def test_a_classifiers_adapter_holds_its_changes_and_its_whole_head(name, tmp_path):
    """With fan_in_fan_out for GPT-2 only, which tells PEFT that the base stores its linears as (in, out)."""
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
    assert len(tensors) == len(head) + 2 * len(adapter_io.adapted_layers(model))


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "gpt2_classifier", "llama_classifier"])
@torch.no_grad()
def test_a_saved_classifier_says_so_in_its_config_and_loads_again(name, tmp_path):
    *inputs, _ = golden_example(name)
    model = mb.adapt(mb.load_model(GOLDEN / name, head="classifier"), rank=2)
    stretch(model)
    names = [f"class {index}" for index in range(model.num_labels)]
    mb.save_model(model, tmp_path, names)
    assert distance(mb.load_model(tmp_path, head="classifier")(*inputs), model(*inputs)) < 1e-6
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["id2label"] == {str(index): label for index, label in enumerate(names)}
    assert config["label2id"] == {label: index for index, label in enumerate(names)}
    mb.save_model(mb.load_model(tmp_path, head="classifier"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_saving_gpt2_gives_its_transposed_bits_back(tmp_path):
    mb.save_model(mb.adapt(mb.load_model(GOLDEN / "gpt2", dtype=torch.bfloat16), rank=2), tmp_path)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / "gpt2"))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in original)
