"""Adapters in PEFT's format, always relative to the original checkpoint, and merged checkpoints in Hugging Face's.

PEFT's lora_A is (r, m) and lora_B is (n, r): the transposes of the paper's A (m, r) and B (r, n). Only this file
converts.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minibalora.errors import InputError
from minibalora.files import read_json_object, replacing, write_json
from minibalora.lowrank import LowRankLinear, adapted_layers
from minibalora.weights import is_stored_transposed

PREFIX = "base_model.model."  # PEFT's wrapper around the base model
SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model spm.model "
    "vocab.txt vocab.json merges.txt chat_template.jinja generation_config.json"
).split()
CLASSES = {  # transformers' spelling of a model_type
    "llama": "Llama",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gpt2": "GPT2",
    "bert": "Bert",
    "roberta": "Roberta",
    "deberta-v2": "DebertaV2",
}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors: ΔW of every adapted layer, for the ORIGINAL base.

    A PiSSA-initialised adapter of rank r becomes a plain LoRA of rank 2r (see LowRankLinear.update), so that PEFT and
    vLLM need neither the residual nor the initial factors. A classifier's trained head is saved whole, as PEFT's
    modules_to_save. Raises ValueError if nothing is adapted.
    """
    layers, head = adapted_layers(model), list(getattr(model, "own_head", []))
    if not layers:
        raise ValueError("nothing to save: the model has no adapted layer")
    tensors = {}
    for name, layer in layers:
        left, right = (factor.detach().cpu() for factor in layer.update())
        tensors[f"{PREFIX}{name}.lora_A.weight"] = left.T.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = right.T.contiguous()
    for module in head:
        for name, parameter in model.get_submodule(module).named_parameters():
            tensors[f"{PREFIX}{module}.{name}"] = parameter.detach().cpu().contiguous()
    rank = left.shape[1]  # one rank and one scaling for all, as `adapt` makes them
    alpha = layers[0][1].scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": str(Path(model.source).resolve()) if hasattr(model, "source") else None,
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model),
        "bias": "none",
        "fan_in_fan_out": any(is_stored_transposed(model, f"{name}.weight") for name, _ in layers),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": head or None,
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


@torch.no_grad()
def save_model(model: nn.Module, folder: str | Path, label_names: Sequence[str] | None = None) -> None:
    """Write a merged Hugging Face checkpoint: config.json, tokenizer files and safetensors of at most 5 GB each.

    Adapters are merged into what is written, one tensor at a time; the model itself stays as it was. `model.source`
    is the folder that config and tokenizer are copied from. label_names: of a classifier's columns, for its config
    (None: as in the source).
    Raises InputError if `folder` holds other weight files.
    """
    folder, source = Path(folder), Path(model.source)
    tensors = _checkpoint_tensors(model)
    shards = _shards(tensors)
    files = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    others = {path.name for path in folder.glob("model*.safetensors*")} - {*files, INDEX if len(shards) > 1 else ""}
    if others:
        raise InputError(f"{folder}: holds other weights ({min(others)}), which would be read instead: empty it")

    folder.mkdir(parents=True, exist_ok=True)
    for file, names in zip(files, shards, strict=True):
        merged = {name: _merged(*tensors[name], is_stored_transposed(model, name)) for name in names}
        with replacing(folder / file) as temporary:
            save_file(merged, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = sum(stored.nbytes for stored, _ in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = read_json_object(source / "config.json") | {"dtype": dtype, "torch_dtype": dtype}  # transformers 5's, 4's
    write_json(folder / "config.json", config | _classifier_config(model, config, label_names))
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            with replacing(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)


def _classifier_config(model: nn.Module, source: dict, label_names: Sequence[str] | None) -> dict:
    """What makes the config.json `source` that of a classifier; nothing for a language model."""
    count = getattr(model, "num_labels", None)
    if count is None:
        return {}
    stored = source["id2label"] if len(source.get("id2label") or {}) == count else {}
    names = label_names or [stored.get(str(index), f"LABEL_{index}") for index in range(count)]
    return {
        "architectures": [f"{CLASSES[source['model_type']]}ForSequenceClassification"],
        "problem_type": "regression" if count == 1 else "single_label_classification",
        "num_labels": count,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _checkpoint_tensors(model: nn.Module) -> dict[str, tuple[Tensor, LowRankLinear | None]]:
    """Every tensor of the base model by its name in a checkpoint, and the layer that changed it, if one did."""
    layers = dict(adapted_layers(model))
    tensors = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in layers or leaf == "bias":
            tensors[name] = parameter, None
        elif leaf == "W":
            tensors[f"{owner}.weight"] = parameter, layers[owner]
    return tensors


def _merged(stored: Tensor, layer: LowRankLinear | None, is_transposed: bool) -> Tensor:
    tensor = stored if layer is None else layer.weight.to(stored.dtype)
    return (tensor.T if is_transposed else tensor).detach().cpu().contiguous()


def _shards(tensors: dict[str, tuple[Tensor, LowRankLinear | None]]) -> list[list[str]]:
    """The names, in order, in groups of at most SHARD_BYTES."""
    shards, filled = [[]], 0
    for name, (stored, _) in tensors.items():
        if shards[-1] and filled + stored.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += stored.nbytes
    return shards
