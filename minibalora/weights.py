"""From a folder as Hugging Face hands it out to a model: config.json and safetensors, checked before allocating.

No pickle is read and no code from a checkpoint is run. Peak host memory is the model once, plus one tensor where the
dtype changes: the model is built without storage (on the meta device) and gets its tensors from memory-mapped files,
one shard at a time. On a CPU, in the file's own dtype, weights stay mapped and are not copied at all.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minibalora.errors import InputError
from minibalora.files import read_json_object
from minibalora.models.decoder import Decoder, DecoderConfig

# What a config.json of each family may leave out, as that family's own code fills it in.
FAMILIES = {
    "llama": {"tie_word_embeddings": False, "hidden_act": "silu"},
    "mistral": {
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "gemma": {
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = ("F32", "F16", "BF16")  # as safetensors spells them
MIB = 1 << 20
LARGEST = {int: 1 << 20, float: 1e30}  # of any number in config.json: products of three sizes still fit 64 bits


def load_model(
    path: str | Path,
    head: str = "lm",
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Decoder:
    """The model in the folder `path`, in eval mode, its parameters in `dtype` on `device`.

    model(input_ids) -> logits (B, T, V). `model.source` is the folder. Raises InputError, naming file and tensor, for
    anything missing, superfluous, misshapen, not finite, or not implemented.
    """
    if head != "lm" or num_labels is not None:
        raise InputError(
            f"head {head!r} with num_labels {num_labels} is not implemented: there is 'lm', without labels"
        )
    folder = Path(path)
    config = read_config(folder)
    stored = stored_tensors(folder)
    if config.num_hidden_layers > len(stored):  # before building them, for a wrong number may be a million
        layers = f"{config.num_hidden_layers} hidden layers, but the weights are {len(stored)} tensors"
        raise InputError(f"{folder}: config.json has {layers}: download both again")
    with torch.device("meta"):
        model = Decoder(config)
    check_tensors(folder, model, stored)

    for name in list(dict(model.named_parameters())):
        file = stored[name].file
        with safe_open(file, framework="pt") as shard:  # opened anew: closing gives the pages of a mapped file back
            tensor = shard.get_tensor(name).to(device=device, dtype=dtype)
        _check_finite(tensor, name, file)
        _set_parameter(model, name, nn.Parameter(tensor))
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        _check_tied(model, stored["lm_head.weight"].file)
    model.source = folder
    return model.eval()


def read_config(folder: Path) -> DecoderConfig:
    """config.json as our configuration; InputError names the key that is missing, wrong or not implemented."""
    path = folder / "config.json"
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder: give the folder that holds config.json")
    raw = read_json_object(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{path}: model_type {family!r} is not implemented: there are {', '.join(FAMILIES)}")
    raw = {key: value for key, value in (FAMILIES[family] | raw).items() if value is not None}
    _refuse_unknown_features(raw, path)

    def number(key: str, kind: type, default=None):
        value = raw.get(key, default)
        if value is None:
            raise InputError(f"{path}: the key {key} is missing: download the file again")
        fits = type(value) is bool if kind is bool else _in_range(value, kind)
        if not fits:
            expected = {int: f"an integer from 1 to {LARGEST[int]}", float: "a positive number", bool: "true or false"}
            raise InputError(f"{path}: {key} is {value!r}: it must be {expected[kind]}")
        return value

    heads, d = number("num_attention_heads", int), number("hidden_size", int)
    rope = _rope_settings(raw, path)
    config = DecoderConfig(
        vocab_size=number("vocab_size", int),
        hidden_size=d,
        intermediate_size=number("intermediate_size", int),
        num_hidden_layers=number("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", int, heads),
        head_dim=number("head_dim", int, d // heads),
        rms_norm_eps=number("rms_norm_eps", float),
        rope_theta=_rope_number(rope, "rope_theta", path),
        rope_scaling=_rope_scaling(rope, path),
        sliding_window=number("sliding_window", int) if family == "mistral" and "sliding_window" in raw else None,
        attention_bias=number("attention_bias", bool, False),
        mlp_bias=number("mlp_bias", bool, False),
        tie_word_embeddings=number("tie_word_embeddings", bool),
        activation=_activation(raw, path),
        norm_offset=1.0 if family == "gemma" else 0.0,
        embedding_scale=d**0.5 if family == "gemma" else 1.0,
    )
    if heads % config.num_key_value_heads or config.head_dim % 2 or ("head_dim" not in raw and d % heads):
        shape = f"hidden_size {d}, {heads} heads, {config.num_key_value_heads} key-value heads"
        raise InputError(f"{path}: {shape} of size {config.head_dim} do not fit together: download the file again")
    return config


def _in_range(value: object, kind: type) -> bool:
    return type(value) in {kind, int} and 0 < value <= LARGEST[kind]


def _refuse_unknown_features(raw: dict, path: Path) -> None:
    """Nothing is silently approximated: what would change the numbers and is not here is refused by name."""
    refused = {
        "quantization_config": "quantised weights are",
        "use_bidirectional_attention": "bidirectional attention is",
        "attention_dropout": "dropout in attention is",
    }
    for key, what in refused.items():
        if raw.get(key):
            raise InputError(f"{path}: {key} is {raw[key]!r}, but {what} not implemented: use a checkpoint without")


def _activation(raw: dict, path: Path) -> str:
    """The MLP's activation. Gemma's first releases say "gelu" in hidden_act and mean the tanh form."""
    name = raw.get("hidden_act")
    if raw["model_type"] == "gemma":
        name = raw.get("hidden_activation", "gelu_pytorch_tanh" if name == "gelu" else name)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(f"{path}: activation {name!r} is not implemented: there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _rope_settings(raw: dict, path: Path) -> dict:
    """Both spellings: rope_theta and rope_scaling at the top level, or all inside rope_parameters (transformers 5)."""
    settings = {"rope_theta": raw.get("rope_theta", 10000.0)}  # LLaMA 2's config.json leaves the theta out
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key, {}), dict):
            raise InputError(f"{path}: {key} is {raw[key]!r}: it must be an object or null")
        settings |= raw.get(key, {})
    settings["rope_type"] = settings.get("rope_type", settings.get("type", "default"))
    settings.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    return settings


def _rope_number(settings: dict, key: str, path: Path) -> float:
    value = settings.get(key)
    if not _in_range(value, float):
        raise InputError(f"{path}: {key} is {value!r}: it must be a positive number")
    return float(value)


def _rope_scaling(settings: dict, path: Path) -> dict | None:
    """None for plain RoPE, or the four numbers of the llama3 type."""
    if settings["rope_type"] not in ("default", "llama3") or settings["partial_rotary_factor"] != 1:
        kind = f"{settings['rope_type']!r} with partial_rotary_factor {settings['partial_rotary_factor']!r}"
        raise InputError(f"{path}: rope_type {kind} is not implemented: there are default and llama3, both with 1")
    if settings["rope_type"] == "default":
        return None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {key: _rope_number(settings, key, path) for key in keys}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{path}: low_freq_factor must be below high_freq_factor: download the file again")
    return scaling


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> file and shape of every tensor in the folder's safetensors, from the headers alone."""
    stored = {}
    for file, promised in _weight_files(folder).items():
        try:
            with safe_open(file, framework="pt") as shard:
                slices = {name: shard.get_slice(name) for name in shard.keys()}
                headers = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, but the index names it: download the shard") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file}: not a readable safetensors file ({error}): download it again") from None
        if absent := promised - headers.keys():
            raise InputError(f"{file}: lacks {_some(absent)}, which the index promises: download it again")
        for name, (dtype, shape) in headers.items():
            if dtype not in DTYPES:
                raise InputError(f"{file}: {name} is stored as {dtype}: use a checkpoint in {', '.join(DTYPES)}")
            if name in stored:
                raise InputError(f"{file}: {name} is also in {stored[name].file.name}: download the folder again")
            stored[name] = StoredTensor(file, shape)
    return stored


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Each weight file and the tensors that the index, if there is one, promises in it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {single: set()}
    if not index.exists():
        if list(folder.glob("pytorch_model*.bin")):
            raise InputError(
                f"{folder}: has only pytorch_model.bin, a pickle, never read here: convert it with transformers, "
                'AutoModelForCausalLM.from_pretrained(folder).save_pretrained("new folder")'
            )
        raise InputError(f"{folder}: has neither {single.name} nor {index.name}: download the weights")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map: download it again")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise InputError(f"{index}: {name} is said to be in {file!r}, which is no file of this folder")
        files.setdefault(folder / file, set()).add(name)
    return files


def check_tensors(folder: Path, model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Every name and shape against the model that config.json describes; InputError names the first that differ."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if missing := expected.keys() - stored.keys():
        files = ", ".join(sorted({tensor.file.name for tensor in stored.values()}))
        raise InputError(f"{folder}: {files or 'no file'} lacks {_some(missing)}: download the weights again")
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name]:
            shapes = f"{list(tensor.shape)}, but config.json asks for {list(expected[name])}"
            raise InputError(f"{tensor.file}: {name} has shape {shapes}: config and weights are of different models")
    allowed = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    buffers = {name for name in stored if name.endswith("rotary_emb.inv_freq")}  # old files; computed from config.json
    if superfluous := stored.keys() - expected.keys() - allowed - buffers:
        file = stored[min(superfluous)].file
        raise InputError(f"{file}: holds {_some(superfluous)}, which a model of this config.json does not have")


def _check_finite(tensor: Tensor, name: str, file: Path) -> None:
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # aminmax allocates nothing and passes NaN on
        raise InputError(f"{file}: {name} has NaN or infinite values in {tensor.dtype}: download the file again")


def _check_tied(model: Decoder, file: Path) -> None:
    """Some files repeat the tied head; if it differs from the embedding, one of the two would be silently lost."""
    embedding = model.model.embed_tokens.weight
    with safe_open(file, framework="pt") as shard:
        head = shard.get_tensor("lm_head.weight").to(embedding)
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise InputError(f"{file}: lm_head.weight differs from the embedding: set tie_word_embeddings to false")


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def weights_digest(folder: str | Path) -> str:
    """SHA-256 over config, tokenizer and, of each weight file, its size, first and last MiB: which checkpoint it is.

    It reads a few MiB where a digest of every byte would read gigabytes; a fine-tuned copy differs in it, a single
    flipped bit may not. Raises InputError as `load_model` does where a header can't be read.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        digest.update((folder / name).read_bytes() if (folder / name).exists() else b"")
    for path in sorted({tensor.file for tensor in stored_tensors(folder).values()}):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in (0, max(0, size - MIB)):
                file.seek(start)
                digest.update(file.read(MIB))
            digest.update(str(size).encode())
    return digest.hexdigest()
