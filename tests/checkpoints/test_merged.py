"""Merged checkpoints: from a model in memory, and from base and adapter on disk, one tensor at a time."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import GOLDEN, distance, golden_example, headless, real_tokens, stretch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minibalora as mb
from minibalora.checkpoints import export
from minibalora.checkpoints import merged as checkpoint_io
from minibalora.checkpoints.families import read_family
from minibalora.checkpoints.weights import skeleton
from minibalora.lowrank import adapted_layers
from minibalora.nf4 import quantize

EXPECTED = load_file(GOLDEN / "llama3" / "expected.safetensors")
IDS, REAL = EXPECTED["input_ids"], EXPECTED["attention_mask"].bool()


def adapted(init: str):
    return mb.adapt(mb.load_model(GOLDEN / "llama3"), rank=3, alpha=5, init=init)


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
@torch.no_grad()
def test_a_saved_model_equals_the_adapted_one(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(checkpoint_io, "SHARD_BYTES", shard_bytes)
    model = adapted("pissa")
    stretch(model)
    before = model(IDS)
    mb.save_model(model, tmp_path)
    assert torch.equal(model(IDS), before) and adapted_layers(model)  # left as it was
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
    monkeypatch.setattr(checkpoint_io, "SHARD_BYTES", 5000)
    with pytest.raises(mb.InputError, match="holds other weights"):
        mb.save_model(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "gpt2_classifier", "llama_classifier", "t5_classifier"])
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


def test_a_quantised_model_is_not_saved_before_it_is_merged(tmp_path, refuses):
    model = adapted("pissa")
    for _, layer in adapted_layers(model):
        quantize(layer)
    refuses(lambda: mb.save_model(model, tmp_path / "out"), "is quantised: save its adapter, or call merge first")
    assert not (tmp_path / "out").exists()
    mb.save_model(mb.merge(model), tmp_path / "out")


def test_saving_gpt2_gives_its_transposed_bits_back(tmp_path):
    mb.save_model(mb.adapt(mb.load_model(GOLDEN / "gpt2", dtype=torch.bfloat16), rank=2), tmp_path)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / "gpt2"))
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in original)


# python -m minibalora export


@pytest.fixture
def run_export(in_command):
    """run_export(*flags) -> status, standard output, standard error of python -m minibalora export."""
    return partial(in_command, export.main)


EXPORTS = {  # adapter: base, whether the base is without a head
    "adapter_pissa": ("llama3", False),
    "peft_rslora_regex": ("mistral_window", False),
    "peft_whole_head": ("llama2", False),
    "peft_adapted_head": ("llama3", False),
    "peft_gpt2": ("gpt2", False),
    "peft_pissa_rslora": ("llama2", False),
    "peft_pissa_gpt2": ("gpt2", False),
    "peft_olora": ("qwen2", False),
    "adapter_gpt2": ("gpt2_classifier", False),
    "adapter_bert": ("bert", False),
    "adapter_roberta": ("roberta", True),
    "adapter_deberta": ("deberta", True),
    "adapter_t5": ("t5", False),
    "peft_t5": ("t5_gated", False),
    "adapter_t5_classifier": ("t5_classifier", True),
}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
@torch.no_grad()
def test_base_and_adapter_become_one_checkpoint(name, shard_bytes, run_export, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "SHARD_BYTES", shard_bytes)
    base, is_headless = EXPORTS[name]
    *inputs, base_logits = golden_example(base)
    path = headless(base, tmp_path / "base") if is_headless else GOLDEN / base
    arguments = ("--model", path, "--adapter", GOLDEN / name, "--out", tmp_path / "merged")
    assert run_export(*arguments)[0] == 0
    is_classifier = base_logits.ndim == 2
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    merged = mb.load_model(tmp_path / "merged", "classifier" if is_classifier else "lm")
    real = real_tokens(base)
    stored_in_bfloat16 = 0.02  # as the base is: W + ΔW is rounded to 3 digits
    assert distance(merged(*inputs)[real], expected[real]) < stored_in_bfloat16 < distance(base_logits, expected)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "merged"}  # nothing temporary


def test_a_config_without_model_type_gets_one(tmp_path):
    base = shutil.copytree(GOLDEN / "bert", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "model_type"}))
    mb.save_model(mb.load_model(base, "classifier"), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "bert"


def test_tokenizer_files_and_chat_templates_are_copied(tmp_path):
    base, merged = shutil.copytree(GOLDEN / "t5", tmp_path / "base"), tmp_path / "merged"
    names = ["spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja"]
    names += ["additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"]
    (base / "additional_chat_templates").mkdir()
    for name in names:
        (base / name).write_text(name)
    mb.save_model(mb.load_adapter(skeleton(base), GOLDEN / "adapter_t5"), merged)
    assert all((merged / name).read_text() == name for name in names)


def test_a_skeleton_saves_what_the_loaded_model_saves(tmp_path):
    """Weights are read one at a time, in their own dtype, and GPT-2's transposed: the file has the same bytes."""
    for base, adapter, head in [("gpt2", "peft_gpt2", "lm"), ("bert", "adapter_bert", "classifier")]:
        loaded = mb.load_adapter(mb.load_model(GOLDEN / base, head, dtype=torch.bfloat16), GOLDEN / adapter)
        mb.save_model(loaded, tmp_path / f"{base}-loaded")
        mb.save_model(mb.load_adapter(skeleton(GOLDEN / base, head), GOLDEN / adapter), tmp_path / f"{base}-skeleton")
        for name in ("model.safetensors", "config.json"):
            assert len({(tmp_path / f"{base}-{kind}" / name).read_bytes() for kind in ("loaded", "skeleton")}) == 1


def test_the_tensors_of_a_mixed_base_keep_their_dtypes(tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    save_file(tensors | norms, tmp_path / "base" / "model.safetensors")
    mb.save_model(mb.load_adapter(skeleton(tmp_path / "base"), GOLDEN / "peft_last_block"), tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(merged[name].dtype == (torch.float32 if name in norms else torch.bfloat16) for name in tensors)


def test_a_trained_classifier_keeps_its_labels(run_export, tmp_path):
    shutil.copytree(GOLDEN / "adapter_bert", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": {"labels": ["bad", "so so", "good"]}}))
    run_export("--model", GOLDEN / "bert", "--adapter", tmp_path / "run", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["1"] == "so so"


def test_a_model_is_not_saved_over_its_own_source(tmp_path, refuses):
    shutil.copytree(GOLDEN / "llama2", tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    model = mb.adapt(mb.load_model(tmp_path / "base"), rank=2)
    refuses(lambda: mb.save_model(model, tmp_path / "base"), "own folder")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_a_classifiers_adapter_without_a_head_is_made_smaller_with_the_bases(run_export, tmp_path):
    shutil.copytree(GOLDEN / "peft_roberta", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / "peft_roberta" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    arguments = ("--model", GOLDEN / "roberta", "--adapter", tmp_path / "adapter", "--out", tmp_path / "small")
    assert run_export(*arguments, "--adapter-rank", 1)[0] == 0
    model = mb.load_adapter(mb.load_model(GOLDEN / "roberta", "classifier"), tmp_path / "small")
    base = mb.load_model(GOLDEN / "roberta", "classifier")
    assert torch.equal(model.classifier.dense.weight, base.classifier.dense.weight)


def test_an_adapter_is_made_smaller(run_export, tmp_path):
    arguments = ("--model", GOLDEN / "llama3", "--adapter", GOLDEN / "adapter_pissa", "--out", tmp_path / "small")
    status, out, _ = run_export(*arguments, "--adapter-rank", 5)
    assert status == 0 and "rank 5: relative error" in out
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    model, smaller = (
        mb.load_adapter(mb.load_model(GOLDEN / "llama3"), folder)
        for folder in (GOLDEN / "adapter_pissa", tmp_path / "small")
    )
    error = float(out.split("error ")[1].split()[0])
    lost, total = 0.0, 0.0
    for (_, layer), (_, small) in zip(adapted_layers(model), adapted_layers(smaller), strict=True):
        lost, total = lost + (layer.delta - small.delta).square().sum(), total + layer.delta.square().sum()
    assert error == pytest.approx((lost / total).sqrt().item(), rel=0.01)


def test_a_failed_export_leaves_nothing_behind(run_export, tmp_path, monkeypatch):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for base, adapter, out, words in [
        ("llama2", GOLDEN / "adapter_pissa", tmp_path / "out", "another base"),
        ("nowhere", GOLDEN / "adapter_pissa", tmp_path / "out", "no such folder"),
        ("llama3", tmp_path / "nowhere", tmp_path / "out", "no such folder"),
        ("llama3", GOLDEN / "adapter_pissa", used, "exists already"),
        ("llama3", GOLDEN / "adapter_pissa", tmp_path / "link", "exists already"),
        ("llama3", GOLDEN / "adapter_pissa", ".", "exists already"),
        ("llama3", GOLDEN / "adapter_pissa", used / "mine.txt" / "out", "can't write there"),
    ]:
        status, _, error = run_export("--model", GOLDEN / base, "--adapter", adapter, "--out", out)
        assert status == 2 and words in error and len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"used", "mine.txt", "empty", "link"}


def test_a_merge_that_fails_half_way_leaves_nothing_behind(run_export, tmp_path, monkeypatch):
    """The numbers in the fourth shard of the base are damaged."""
    monkeypatch.setattr(checkpoint_io, "SHARD_BYTES", 4000)
    shutil.copytree(GOLDEN / "llama2", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    arguments = ("--model", tmp_path / "base", "--adapter", GOLDEN / "peft_last_block", "--out", tmp_path / "out")
    status, _, error = run_export(*arguments)
    assert status == 2 and "down_proj" in error.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


MEASURE = """
import resource, sys
from minibalora.checkpoints import merged as checkpoint_io, export
checkpoint_io.SHARD_BYTES = 4_000_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export.main()
print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_merging_takes_the_memory_of_a_shard_not_of_the_model(tmp_path):
    """52 MB of weights in shards of 4 MB: far below half of the model, whatever the allocator keeps."""
    config = json.loads((GOLDEN / "llama2" / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 1000}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    names = {name: parameter.shape for name, parameter in big_llama(tmp_path / "base").named_parameters()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in names.items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    mb.save_adapter(mb.adapt(mb.load_model(tmp_path / "base"), rank=2, init="lora"), tmp_path / "adapter")
    arguments = ["--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"]
    result = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    assert size > 50 and float(result.stdout.split("MB")[1]) < 0.4 * size


def big_llama(folder):
    with torch.device("meta"):
        family, config = read_family(folder)
        return family.build(config, None)
