"""Adapters in PEFT's format, always relative to the original checkpoint, and merged checkpoints in Hugging Face's.

PEFT's lora_A is (r, m) and lora_B is (n, r): the transposes of the paper's A (m, r) and B (r, n). Only this file
converts.
"""

import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minibalora.files import read_json_object, replacing, write_json
from minibalora.lowrank import LowRankLinear, adapted_layers

PREFIX = "base_model.model."  # PEFT's wrapper around the base model
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model "
    "chat_template.jinja generation_config.json"
).split()


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors: ΔW of every adapted layer, for the ORIGINAL base.

    A PiSSA-initialised adapter of rank r becomes a plain LoRA of rank 2r (see LowRankLinear.update), so that PEFT and
    vLLM need neither the residual nor the initial factors. Raises ValueError if nothing is adapted.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("nothing to save: the model has no adapted layer")
    tensors = {}
    for name, layer in layers:
        left, right = (factor.detach().cpu() for factor in layer.update())
        tensors[f"{PREFIX}{name}.lora_A.weight"] = left.T.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = right.T.contiguous()
    first = layers[0][1]
    rank = first.update()[0].shape[1]
    alpha = first.scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(model.source).resolve()) if hasattr(model, "source") else None,
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def _target_modules(model: nn.Module) -> list[str]:
    """The last parts of the adapted names; whole names where a last part would match a layer that is not adapted."""
    names = {name for name, _ in adapted_layers(model)}
    last_parts = {name.rpartition(".")[2] for name in names}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    is_ambiguous = any(name.rpartition(".")[2] in last_parts for name in linears)
    return sorted(names if is_ambiguous else last_parts)


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write a merged Hugging Face checkpoint: config.json, tokenizer files and safetensors of at most 5 GB each.

    Adapters are merged into what is written, one tensor at a time; the model itself stays as it was. `model.source`
    is the folder that config and tokenizer are copied from.
    """
    folder, source = Path(folder), Path(model.source)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(model.parameters()).dtype
    shards = _shards(model)
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        with replacing(folder / file) as temporary:
            save_file({name: _merged(model, name) for name in names}, temporary, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(_bytes(model, name) for name in weight_map)
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": weight_map},
        )
    config = read_json_object(source / "config.json")
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            with replacing(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)


def _shards(model: nn.Module) -> list[list[str]]:
    """The checkpoint's tensor names, in groups of at most SHARD_BYTES."""
    shards, filled = [[]], 0
    for name in _names(model):
        size = _bytes(model, name)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _names(model: nn.Module) -> list[str]:
    """Parameter names as in the base model: an adapted layer counts as its weight and bias."""
    own = ("A", "B")
    layers = {name for name, _ in adapted_layers(model)}
    names = []
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in layers:
            names.append(name)
        elif leaf not in own:
            names.append(f"{owner}.weight" if leaf == "W" else name)
    return names


def _bytes(model: nn.Module, name: str) -> int:
    return _stored(model, name).nbytes


def _stored(model: nn.Module, name: str) -> Tensor:
    """The frozen tensor behind a checkpoint's name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return getattr(module, "W" if isinstance(module, LowRankLinear) and leaf == "weight" else leaf)


@torch.no_grad()
def _merged(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    return tensor.detach().to(_stored(model, name).dtype).cpu().contiguous()
