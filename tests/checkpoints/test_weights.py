"""Load checkpoints: accepted forms, dtypes, and errors for everything broken."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import GOLDEN, golden_example
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

import minibalora as mb
from minibalora.checkpoints.families import read_config, read_family
from minibalora.checkpoints.weights import weights_digest

ABSENT = object()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORM, EMBEDDING, QUERY = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture
def copy(tmp_path):
    """copy(name) is a golden checkpoint that a test may damage."""
    return lambda name: shutil.copytree(GOLDEN / name, tmp_path / name)


def edit_json(path, **changes):
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ABSENT}))


def read(path):
    """Load the tensors of a file that will be overwritten, so not memory-mapped."""
    return load(path.read_bytes())


def edit_tensors(folder, changes):
    """Replace, add or, where ABSENT, remove tensors of model.safetensors."""
    tensors = read(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not ABSENT}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_a_file_in_any_dtype_loads_as_any_dtype(copy, stored, dtype):
    folder = copy("llama2")
    tensors = {name: tensor.to(stored) for name, tensor in read(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    parameters = dict(mb.load_model(folder, dtype=dtype).named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert parameters[name].dtype == dtype and torch.equal(parameters[name], tensor.to(dtype))


def test_a_loaded_model_is_in_eval_mode_and_knows_its_folder():
    model = mb.load_model(GOLDEN / "gemma")
    assert not any(module.training for module in model.modules()) and model.checkpoint.folder == GOLDEN / "gemma"


@torch.no_grad()
def test_changing_a_loaded_model_leaves_its_file_alone(copy):
    file = copy("llama2") / "model.safetensors"
    before = file.read_bytes()
    for parameter in mb.load_model(file.parent, dtype=torch.bfloat16).parameters():  # the file's own dtype
        parameter.add_(1)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | ROPE},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | ROPE},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | ROPE},
        {"rope_theta": 500000, "rope_parameters": {"rope_type": "llama3"} | ROPE, "rope_scaling": None},
    ],
)
def test_old_and_new_spellings_of_rope_settings_are_equivalent(copy, spelling):
    folder = copy("llama3")
    edit_json(folder / "config.json", **{"rope_theta": ABSENT, "rope_scaling": ABSENT} | spelling)
    assert read_config(folder) == read_config(GOLDEN / "llama3")
    assert read_config(folder).rope_scaling == ROPE and read_config(folder).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"original_max_position_embeddings": 32}, 32),
        ({"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "llama3"} | ROPE}, 32),
        ({"max_position_embeddings": 64}, 64),
    ],
)
def test_llama3_s_original_context_may_stand_at_the_top_level(copy, changes, expected):
    """As in transformers 5.24's AutoConfig. Without one, it is max_position_embeddings."""
    folder = copy("llama3")
    scaling = {key: value for key, value in ROPE.items() if key != "original_max_position_embeddings"}
    edit_json(folder / "config.json", **{"rope_scaling": {"rope_type": "llama3"} | scaling} | changes)
    assert read_config(folder).rope_scaling == ROPE | {"original_max_position_embeddings": expected}


@pytest.mark.parametrize("theta, expected", [(ABSENT, 1e4), (5e5, 5e5)])
def test_rope_parameters_do_not_count_beside_rope_scaling(copy, refuses, theta, expected):
    """As in transformers 5.24."""
    path = copy("llama2") / "config.json"
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    edit_json(path, rope_theta=theta, rope_scaling={"type": "linear", "factor": 4.0}, rope_parameters=parameters)
    assert read_config(path.parent).rope_scaling == {"factor": 4.0} and read_config(path.parent).rope_theta == expected
    edit_json(path, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]})
    refuses(lambda: read_config(path.parent), path, "mrope")
    edit_json(path, rope_scaling=None, rope_parameters={"full_attention": {"rope_theta": 1e4}})
    refuses(lambda: read_config(path.parent), path, "rope_parameters has settings of its own for full_attention")


def test_the_windows_of_ministral_follow_its_layer_types(copy):
    path = copy("mistral_window") / "config.json"
    edit_json(path, sliding_window=3, layer_types=["sliding_attention", "full_attention"])
    assert read_config(path.parent).windows == (3, None)
    edit_json(path, layer_types=None)
    assert read_config(path.parent).windows == (3, 3)


@pytest.mark.parametrize(
    "spelling, theta",
    [
        ({}, 1e4),
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
    ],
)
def test_plain_rope_needs_no_settings(copy, spelling, theta):
    folder = copy("llama2")
    edit_json(folder / "config.json", **spelling)
    assert read_config(folder).rope_theta == theta and read_config(folder).rope_scaling is None


@pytest.mark.parametrize(("name", "default"), [("llama2", 2048), ("mistral", 131072), ("gemma", 8192)])
def test_the_context_comes_from_config_json_or_the_family(copy, name, default):
    path = copy(name) / "config.json"
    for value, expected in ((ABSENT, default), (77, 77)):
        edit_json(path, max_position_embeddings=value)
        assert read_config(path.parent).max_position_embeddings == expected


def test_gemma_s_gelu_means_the_tanh_form(copy):
    folder = copy("gemma")
    edit_json(folder / "config.json", hidden_act="gelu")
    assert read_config(folder) == read_config(GOLDEN / "gemma")


def test_stored_rotary_frequencies_are_ignored(copy):
    folder = copy("llama2")
    edit_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((3,), 7.0)})
    ids = torch.tensor([[5, 9, 2]])
    assert torch.equal(mb.load_model(folder)(ids), mb.load_model(GOLDEN / "llama2")(ids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_checkpoint_may_repeat_its_embedding_as_head(copy, dtype):
    folder = copy("gemma")
    edit_tensors(folder, {"lm_head.weight": read(folder / "model.safetensors")[EMBEDDING].clone()})
    model = mb.load_model(folder, dtype=dtype)
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(("name", "embedding"), [("gemma", EMBEDDING), ("gpt2", "transformer.wte.weight")])
@torch.no_grad()
def test_a_tied_checkpoint_may_have_its_head_only(copy, name, embedding):
    """safetensors' save_model keeps the first of two names in the order of the alphabet."""
    folder = copy(name)
    edit_tensors(folder, {embedding: ABSENT, "lm_head.weight": read(folder / "model.safetensors")[embedding]})
    ids = torch.tensor([[5, 9, 2]])
    assert torch.equal(mb.load_model(folder)(ids), mb.load_model(GOLDEN / name)(ids))
    stored = mb.load_model(folder, head="classifier").get_parameter(embedding)
    assert torch.equal(stored, mb.load_model(GOLDEN / name).get_parameter(embedding))


@pytest.mark.parametrize("head", [torch.zeros(61, 24), torch.zeros(60, 24), torch.full((61, 24), float("nan"))])
def test_a_tied_checkpoint_with_another_head_is_refused(copy, refuses, head):
    folder = copy("gemma")
    edit_tensors(folder, {"lm_head.weight": head})
    refuses(lambda: mb.load_model(folder), folder / "model.safetensors", "lm_head.weight", "tie_word_embeddings")


# Files of weights.


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: raw[:1000],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: (3 << 30).to_bytes(8, "little") + raw[8:],
        lambda raw: (2**64 - 1).to_bytes(8, "little") + raw[8:],
        lambda raw: raw.replace(b"[61,24]", b"[61,25]", 1),
        lambda raw: raw.replace(b"BF16", b"BF17", 1),
        lambda raw: raw.replace(b'"dtype"', b'"etype"', 1),
        lambda raw: b"version https://git-lfs.github.com/spec/v1\n",
        lambda raw: bytes(len(raw)),
    ],
)
def test_a_broken_safetensors_file_is_refused_by_name(copy, refuses, damage):
    file = copy("llama2") / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refuses(lambda: mb.load_model(file.parent), file)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_flipped_bit_of_a_header_goes_unnoticed(tmp_path_factory, refuses, data):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.copytree(GOLDEN / "llama2", folder, dirs_exist_ok=True)
    raw = bytearray((GOLDEN / "llama2" / "model.safetensors").read_bytes())
    start = raw.index(b"}") + 1  # behind the free text of __metadata__, which means nothing
    byte = data.draw(st.integers(0, 7) | st.integers(start, 7 + int.from_bytes(raw[:8], "little")))
    raw[byte] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "model.safetensors").write_bytes(raw)
    refuses(lambda: mb.load_model(folder), folder, "model.safetensors")


def test_a_missing_shard_is_refused_by_name(copy, refuses):
    folder = copy("llama3")
    (folder / SHARD).unlink()
    refuses(lambda: mb.load_model(folder), folder / SHARD, "no such file")


@pytest.mark.parametrize("file", ["../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", 5, None, ["x"], "a\0b"])
def test_an_index_that_names_no_file_of_the_folder_is_refused(copy, refuses, file):
    folder = copy("llama3")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {NORM: file})
    refuses(lambda: mb.load_model(folder), folder)


@pytest.mark.parametrize("weight_map", [ABSENT, None, {}, [], "x"])
def test_an_index_without_weight_map_is_refused(copy, refuses, weight_map):
    folder = copy("llama3")
    edit_json(folder / INDEX, weight_map=weight_map)
    refuses(lambda: mb.load_model(folder), folder / INDEX, "weight_map")


def test_a_tensor_that_its_shard_lacks_is_refused(copy, refuses):
    folder = copy("llama3")
    tensors = read(folder / SHARD)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, folder / SHARD)
    refuses(lambda: mb.load_model(folder), folder / SHARD, name, "index")


def test_a_tensor_in_two_shards_is_refused(copy, refuses):
    folder = copy("llama3")
    first, second = (read(folder / name) for name in (SHARD.replace("2-of", "1-of"), SHARD))
    name = min(first)
    save_file(second | {name: first[name]}, folder / SHARD)
    refuses(lambda: mb.load_model(folder), folder, SHARD, name)


def test_a_pickle_is_never_read(copy, refuses):
    folder = copy("llama2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(lambda: mb.load_model(folder), folder, "pytorch_model.bin", "save_pretrained", "tokenizer files")


def test_a_folder_without_weights_is_refused(copy, refuses):
    folder = copy("llama2")
    (folder / "model.safetensors").unlink()
    refuses(lambda: mb.load_model(folder), folder, "model.safetensors")


def test_a_path_that_is_not_a_folder_is_refused(tmp_path, refuses):
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file", tmp_path / ("x" * 300)):
        refuses(lambda path=path: mb.load_model(path), path, "no such folder")


# Tensors.


@pytest.mark.parametrize(
    "tensor, why",
    [
        (ABSENT, "lacks"),
        (torch.zeros(25), "[25]"),
        (torch.zeros(24, 1), "[24, 1]"),
        (torch.zeros(()), "[]"),
        (torch.zeros(0), "empty, as DeepSpeed ZeRO-3"),
        (torch.full((24,), float("nan")), "NaN"),
        (torch.arange(24) / torch.tensor([0.0] + [1.0] * 23), "NaN"),
        (torch.tensor([float("-inf")] + [0.0] * 23), "infinite"),
        (torch.zeros(24, dtype=torch.int8), "I8"),
        (torch.zeros(24, dtype=torch.int64), "I64"),
        (torch.zeros(24, dtype=torch.bool), "BOOL"),
        (torch.zeros(24, dtype=torch.float64), "F64"),
        (torch.zeros(24, dtype=torch.float8_e4m3fn), "F8_E4M3"),
    ],
)
def test_a_bad_tensor_is_refused_by_name(copy, refuses, tensor, why):
    folder = copy("llama2")
    edit_tensors(folder, {NORM: tensor})
    refuses(lambda: mb.load_model(folder), folder, "model.safetensors", NORM, why)


@pytest.mark.parametrize("name", ["lm_head.bias", "score.weight", "model.layers.2.mlp.up_proj.weight", "x"])
def test_a_superfluous_tensor_is_refused_by_name(copy, refuses, name):
    folder = copy("llama2")
    edit_tensors(folder, {name: torch.zeros(61)})
    refuses(lambda: mb.load_model(folder), folder / "model.safetensors", name)


@pytest.mark.parametrize(
    "prefix, wrapper", [("_orig_mod.", "torch.compile"), ("module.", "DistributedData"), ("_orig_mod.module.", "_orig")]
)
def test_weights_saved_inside_a_wrapper_are_refused(copy, refuses, prefix, wrapper):
    folder = copy("llama2")
    tensors = {f"{prefix}{name}": tensor for name, tensor in read(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    refuses(lambda: mb.load_model(folder), folder, f"begin with {prefix.partition('.')[0]}", wrapper)


@pytest.mark.parametrize(
    "shape",
    [
        lambda name, tensor: {f"base_model.model.{name}": tensor},
        lambda name, tensor: {name.replace("q_proj.", "q_proj.base_layer."): tensor},
        lambda name, tensor: {name: tensor, QUERY.replace("weight", "lora_A.default.weight"): torch.zeros(2, 24)},
    ],
)
def test_weights_saved_inside_peft_are_refused(copy, refuses, shape):
    folder = copy("llama2")
    tensors = {}
    for name, tensor in read(folder / "model.safetensors").items():
        tensors |= shape(name, tensor)
    save_file(tensors, folder / "model.safetensors")
    refuses(lambda: mb.load_model(folder), folder, "inside PEFT", "merge_and_unload()")


def test_an_adapter_in_a_model_s_folder_is_refused(copy, refuses, tmp_path):
    """Transformers would apply it."""
    folder = copy("llama2")
    mb.save_adapter(mb.adapt(mb.load_model(folder), rank=2), tmp_path / "adapter")
    for call in (mb.load_model, mb.load_tokenizer, weights_digest):
        refuses(lambda call=call: call(tmp_path / "adapter"), "holds an adapter, not a model", "--adapter", "export")
    (tmp_path / "adapter" / "adapter_config.json").rename(folder / "adapter_config.json")
    refuses(lambda: mb.load_model(folder), folder, "holds an adapter", "export", "remove adapter_config.json")


def test_an_untied_model_needs_its_head(copy, refuses):
    folder = copy("llama2")
    edit_tensors(folder, {"lm_head.weight": ABSENT})
    refuses(lambda: mb.load_model(folder), folder, "lm_head.weight")


def test_values_beyond_float16_are_refused_in_float16_only(copy, refuses):
    folder = copy("llama2")
    edit_tensors(folder, {QUERY: torch.full((24, 24), 1e5)})
    assert mb.load_model(folder).get_parameter(QUERY).max() == 1e5
    refuses(lambda: mb.load_model(folder, dtype=torch.float16), folder / "model.safetensors", QUERY, "float16")


# config.json.


@pytest.mark.parametrize(
    "content", [ABSENT, b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"vocab_size": %s}' % (b"9" * 5000)]
)
def test_a_config_that_is_not_a_json_object_is_refused(copy, refuses, content):
    path = copy("llama2") / "config.json"
    path.unlink() if content is ABSENT else path.write_bytes(content)
    refuses(lambda: mb.load_model(path.parent), path)


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
@pytest.mark.parametrize("key", NEEDED)
def test_a_config_without_a_needed_key_is_refused(copy, refuses, name, key):
    path = copy(name) / "config.json"
    for nothing in (None, ABSENT):
        edit_json(path, **{key: nothing})
        refuses(lambda: mb.load_model(path.parent), path, key)


@pytest.mark.parametrize("value", ["4", True, 0, -4, 4.0, float("nan"), [4], {}, 2**20 + 1, 2**40, 10**400])
@pytest.mark.parametrize("key", [*NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_an_invalid_size_is_refused(copy, refuses, key, value):
    path = copy("llama2") / "config.json"
    value = 2**30 + 1 if (key, value) == ("max_position_embeddings", 2**20 + 1) else value
    edit_json(path, **{key: value})
    refuses(lambda: mb.load_model(path.parent), path, key, "integer from 1 to")


def test_a_context_of_millions_of_tokens_is_accepted(copy):
    """Llama-3-8B-Instruct-Gradient-4194k has one."""
    path = copy("llama3") / "config.json"
    edit_json(path, max_position_embeddings=4194304)
    model = mb.load_model(path.parent)
    assert model.config.max_position_embeddings == 4194304
    assert max(buffer.numel() for buffer in [*model.parameters(), *model.buffers()]) < 10_000


@pytest.mark.parametrize("name, eps", [("llama2", 1e-6), ("mistral", 1e-6), ("mixtral", 1e-5), ("gemma", 1e-6)])
def test_a_missing_rms_norm_eps_is_that_of_transformers(copy, refuses, name, eps):
    path = copy(name) / "config.json"
    edit_json(path, rms_norm_eps=ABSENT)
    assert read_config(path.parent).rms_norm_eps == eps
    edit_json(path, rms_norm_eps=None)
    refuses(lambda: mb.load_model(path.parent), path, "rms_norm_eps")


def test_a_context_of_null_is_refused(copy, refuses):
    path = copy("llama3") / "config.json"
    edit_json(path, max_position_embeddings=None)
    refuses(lambda: mb.load_model(path.parent), path, "max_position_embeddings")


@pytest.mark.parametrize("value", ["1e-5", True, 0, -1e-5, float("nan"), float("inf"), [1], {}, 10**400])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_an_invalid_number_is_refused(copy, refuses, key, value):
    path = copy("llama2") / "config.json"
    edit_json(path, **{key: value})
    refuses(lambda: mb.load_model(path.parent), path, key, "positive number")


@pytest.mark.parametrize("value", ["true", 1, 0, [], 0.0])
@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
def test_an_invalid_switch_is_refused(copy, refuses, key, value):
    path = copy("llama2") / "config.json"
    edit_json(path, **{key: value})
    refuses(lambda: mb.load_model(path.parent), path, key, "true or false")


@pytest.mark.parametrize("value", ["5", True, 0, -5, 2.5, 2**40])
def test_an_invalid_window_is_refused(copy, refuses, value):
    path = copy("mistral_window") / "config.json"
    edit_json(path, sliding_window=value)
    refuses(lambda: mb.load_model(path.parent), path, "sliding_window")


@pytest.mark.parametrize("value", [None, "8", True, 0, -1, float("inf"), 10**400, []])
@pytest.mark.parametrize("key", ROPE)
def test_an_invalid_llama3_rope_number_is_refused(copy, refuses, key, value):
    path = copy("llama3") / "config.json"
    edit_json(path, rope_scaling={"rope_type": "llama3"} | ROPE | {key: value})
    refuses(lambda: mb.load_model(path.parent), path, key)


LINEAR = [
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
]


@pytest.mark.parametrize("spelling", LINEAR)
@torch.no_grad()
def test_linear_rope_scaling_gives_the_logits_of_transformers(copy, spelling):
    """Expects transformers 5.24's first five logits; without scaling, they begin 0.031, −0.629, −0.260."""
    folder = copy("llama2")
    edit_json(folder / "config.json", **spelling)
    expected = torch.tensor([-0.00581, -0.65713, -0.12666, -0.04281, -0.29948])
    ids, _, _ = golden_example("llama2")
    assert (mb.load_model(folder)(ids[:1])[0, -1, :5] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["llama2", "gemma2", "mixtral", "deepseek"])
@torch.no_grad()
def test_attention_dropout_matters_in_training_only(copy, name):
    folder = copy(name)
    edit_json(folder / "config.json", attention_dropout=0.5)
    ids, mask, _ = golden_example(name)
    model, plain = mb.load_model(folder), mb.load_model(GOLDEN / name)
    expected = plain(ids, mask)
    assert torch.equal(model(ids, mask), expected)
    assert torch.equal(plain.train()(ids, mask), expected)
    dropped = model.train()(ids, mask)
    assert not torch.equal(dropped, model(ids, mask)) and not torch.equal(dropped, expected)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"model_type": "gpt_neox"}, ["model_type", "gpt_neox"]),
        ({"model_type": None, "architectures": None}, ["has no model_type"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"model_type": ABSENT, "architectures": ["GPTNeoXForCausalLM"]}, ["has no model_type"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, ["factor"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["rope_type", "longrope"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["rope_type", "dynamic"]),
        ({"rope_parameters": {"rope_type": ["default"]}}, ["rope_type"]),
        ({"rope_scaling": "linear"}, ["rope_scaling"]),
        ({"rope_parameters": [1]}, ["rope_parameters"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"rope_type": "llama3"} | ROPE | {"low_freq_factor": 4.0}}, ["low_freq_factor"]),
        ({"is_causal": False}, ["is_causal", "only True"]),
        ({"hidden_act": "relu"}, ["activation", "relu"]),
        ({"hidden_act": "gelu"}, ["activation", "gelu"]),
        ({"hidden_act": 5}, ["activation"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"attention_dropout": 1.0}, ["attention_dropout"]),
        ({"num_key_value_heads": 3}, ["key-value heads"]),
        ({"head_dim": 7}, ["7"]),
        ({"head_dim": ABSENT, "num_attention_heads": 5, "num_key_value_heads": 5}, ["hidden_size"]),
    ],
)
def test_unimplemented_settings_are_refused_by_name(copy, refuses, changes, parts):
    path = copy("llama2") / "config.json"
    edit_json(path, **changes)
    refuses(lambda: mb.load_model(path.parent), path, *parts)


@pytest.mark.parametrize("layers", [1, 3, 22, 2**20])
def test_more_or_fewer_layers_than_stored_are_refused(copy, refuses, layers):
    folder = copy("llama2")
    edit_json(folder / "config.json", num_hidden_layers=layers)
    refuses(lambda: mb.load_model(folder), folder, "layers")


@pytest.mark.parametrize("head", ["", "token", None])
def test_a_head_that_is_not_implemented_is_refused(refuses, head):
    refuses(lambda: mb.load_model(GOLDEN / "llama2", head=head), "head", "'lm'")


def test_the_digest_distinguishes_checkpoints(copy):
    folder = copy("llama2")
    digest = weights_digest(GOLDEN / "llama2")
    assert weights_digest(folder) == digest
    edit_tensors(folder, {NORM: torch.ones(24, dtype=torch.bfloat16)})
    assert weights_digest(folder) != digest
    assert len({weights_digest(GOLDEN / name) for name in ("llama2", "llama3", "gemma")}) == 3


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"]
    + ["chat_template.jinja"],
)
def test_the_digest_notices_every_file_that_decides_tokens(copy, name):
    folder = copy("llama2")
    digests = {weights_digest(folder)}
    for content in ("{}", '{"eos_token": "</s>"}'):
        (folder / name).write_text(content)
        digests.add(weights_digest(folder))
    assert len(digests) == 3


LOADED = {"llama2": 4, "mixtral": 1}  # layers
MEASURE = """
import os, sys
import torch, minibalora as mb

def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024

small, *folders = sys.argv[1:]
for folder in folders:
    for dtype in (torch.float32, torch.bfloat16):
        if os.fork() == 0:  # to measure a separate peak
            mb.load_model(small, dtype=dtype)  # so that torch's own first allocations do not count
            before = peak()
            model = mb.load_model(folder, dtype=dtype)
            print((peak() - before) / sum(p.nbytes for p in model.parameters()), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_the_memory_of_one_model(tmp_path):
    """About 15 M parameters, 60 MB in float32; a change of dtype adds the largest tensor (4 MB)."""
    for name, layers in LOADED.items():
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers, "vocab_size": 500}
        config = json.loads((GOLDEN / name / "config.json").read_text()) | sizes | {"head_dim": 128}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        family, config = read_family(tmp_path / name)
        with torch.device("meta"):
            shapes = {key: p.shape for key, p in family.build(config, None).named_parameters()}
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / name / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, GOLDEN / "llama2", *(tmp_path / name for name in LOADED)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork has no other threads than the one that made it
    ended = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True)
    shares = [float(line) for line in ended.stdout.splitlines()]
    assert len(shares) == 4 and all(0.5 < share < 1.25 for share in shares), shares


# Encoders and GPT-2.

NEEDED_OF = {
    "bert": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    + ("max_position_embeddings",),
    "roberta": ("vocab_size", "hidden_size", "max_position_embeddings"),
    "deberta": ("vocab_size", "hidden_size", "position_buckets", "max_position_embeddings"),
    "gpt2_classifier": ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NEEDED_OF.items() for key in keys])
@pytest.mark.parametrize("value", [ABSENT, None, 0, -3, 2.5, "7", True, [], 10**30])
def test_an_invalid_size_is_refused_in_every_family(copy, refuses, name, key, value):
    path = copy(name) / "config.json"
    edit_json(path, **{key: value})
    refuses(lambda: mb.load_model(path.parent, head="classifier"), path, key)


@pytest.mark.parametrize(("name", "changes", "parts"), [
    ("bert", {"hidden_act": "swish"}, ("swish", "gelu")),
    ("bert", {"hidden_act": ["gelu"]}, ("gelu",)),
    ("bert", {"position_embedding_type": "relative_key"}, ("position_embedding_type", "relative_key", "absolute")),
    ("bert", {"is_decoder": True}, ("is_decoder",)),
    ("bert", {"num_attention_heads": 5}, ("5 heads", "do not fit")),
    ("bert", {"hidden_dropout_prob": 1.5}, ("hidden_dropout_prob", "[0, 1)")),
    ("bert", {"classifier_dropout": "much"}, ("classifier_dropout",)),
    ("bert", {"quantization_config": {"bits": 8}}, ("quantization_config",)),
    ("roberta", {"pad_token_id": 21}, ("pad_token_id",)),
    ("roberta", {"pad_token_id": "1"}, ("pad_token_id",)),
    ("roberta", {"pad_token_id": -5}, ("pad_token_id",)),
    ("deberta", {"conv_kernel_size": 3}, ("conv_kernel_size",)),
    ("deberta", {"pos_att_type": "c2p"}, ("pos_att_type", "c2p|p2c")),
    ("deberta", {"pos_att_type": 3}, ("pos_att_type",)),
    ("deberta", {"share_att_key": False}, ("share_att_key",)),
    ("deberta", {"norm_rel_ebd": "none"}, ("norm_rel_ebd",)),
    ("deberta", {"relative_attention": False}, ("relative_attention",)),
    ("deberta", {"position_biased_input": True}, ("position_biased_input",)),
    ("deberta", {"type_vocab_size": 2}, ("type_vocab_size",)),
    ("deberta", {"embedding_size": 12}, ("embedding_size",)),
    ("deberta", {"position_buckets": 100}, ("100 position_buckets",)),
    ("deberta", {"position_buckets": 1}, ("1 position_buckets",)),
    ("deberta", {"max_relative_positions": 0}, ("max_relative_positions",)),
    ("gpt2_classifier", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx",)),
    ("gpt2_classifier", {"scale_attn_weights": False}, ("scale_attn_weights",)),
    ("gpt2_classifier", {"is_causal": False}, ("is_causal",)),
    ("gpt2_classifier", {"add_cross_attention": True}, ("add_cross_attention",)),
    ("gpt2_classifier", {"activation_function": "relu"}, ("relu", "gelu_new")),
    ("gpt2_classifier", {"n_head": 5}, ("5 heads",)),
])  # fmt: skip
def test_an_unimplemented_feature_is_refused_by_name_in_every_family(copy, refuses, name, changes, parts):
    path = copy(name) / "config.json"
    edit_json(path, **changes)
    refuses(lambda: mb.load_model(path.parent, head="classifier"), path, *parts)


def test_an_unused_buffer_of_integers_is_harmless(copy):
    """Many published BERTs have `embeddings.position_ids`."""
    folder = copy("bert")
    edit_tensors(folder, {"bert.embeddings.position_ids": torch.arange(20)[None]})
    mb.load_model(folder, head="classifier")


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "gpt2_classifier"])
def test_an_unknown_tensor_is_refused_in_every_family(copy, refuses, name):
    folder = copy(name)
    edit_tensors(folder, {"conv.weight": torch.zeros(3)})
    refuses(lambda: mb.load_model(folder, head="classifier"), "conv.weight")


def test_gpt2_linears_in_our_orientation_are_refused(copy, refuses):
    """(out, in) instead of the (in, out) of GPT-2's files."""
    folder = copy("gpt2_classifier")
    name = "transformer.h.0.mlp.c_fc.weight"
    edit_tensors(folder, {name: read(folder / "model.safetensors")[name].T.contiguous()})
    refuses(lambda: mb.load_model(folder, head="classifier"), name, "shape")
