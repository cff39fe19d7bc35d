"""Write a model, with its adapters merged, as a checkpoint in Hugging Face's format: shards and an index."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object, replacing, write_json
from minibalora.checkpoints.chat_template import MORE
from minibalora.checkpoints.families import FAMILIES
from minibalora.checkpoints.weights import is_stored_transposed, read
from minibalora.lowrank import LowRankLinear, adapted_layers, initial_values

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model spiece.model "
    "spm.model sentencepiece.bpe.model vocab.txt vocab.json merges.txt chat_template.jinja generation_config.json"
).split()


@torch.no_grad()
def save_model(
    model: nn.Module,
    folder: str | Path,
    label_names: Sequence[str] | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> None:
    """Write a merged Hugging Face checkpoint: config.json, tokenizer files and safetensors of at most 5 GB each.

    Adapters are merged into the written tensors, one at a time; the model itself does not change. If the model is a
    `weights.skeleton`, each tensor is read just before it is written, so little more than a shard is ever in memory.
    Config and tokenizer files are copied from `model.checkpoint.folder`. label_names: the names of a classifier's
    columns for its config (None: the source's). progress wraps the list of shards, for instance `tqdm`.
    Raises InputError if `folder` holds other weight files or is the source, or if adapted weights are quantised.
    """
    folder, source = Path(folder), model.checkpoint.folder
    if folder.resolve() == source.resolve():
        raise InputError(
            f"{folder}: is the model's own folder, whose weights would be overwritten: give another folder"
        )
    if any(isinstance(layer.W, nn.Module) for _, layer in adapted_layers(model)):
        raise InputError("the model is quantised: save its adapter, or call merge first")
    tensors = _checkpoint_tensors(model)
    shards = _shards(tensors)
    files = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    others = {path.name for path in folder.glob("model*.safetensors*")} - {*files, INDEX if len(shards) > 1 else ""}
    if others:
        raise InputError(f"{folder}: holds other weights ({min(others)}), which would be read instead: empty it")

    folder.mkdir(parents=True, exist_ok=True)
    for file, names in progress(list(zip(files, shards, strict=True))):
        with replacing(folder / file) as temporary:  # no name is bound to the shard, so its memory is freed at once
            save_file({name: _merged(model, name, *tensors[name]) for name in names}, temporary, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        size = sum(parameter.nbytes for parameter, _ in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = read_json_object(source / "config.json") | {"dtype": dtype, "torch_dtype": dtype}  # transformers 5's, 4's
    family = model.checkpoint.family  # old files do not name it
    config["model_type"] = config.get("model_type") or next(name for name in FAMILIES if FAMILIES[name] is family)
    write_json(folder / "config.json", config | _classifier_config(model, config, label_names))
    for name in (*TOKENIZER_FILES, *_code_files(config)):
        if (source / name).exists():
            with replacing(folder / name) as temporary:
                shutil.copyfile(source / name, temporary)
    if (source / MORE).is_dir():
        shutil.copytree(source / MORE, folder / MORE, dirs_exist_ok=True)


def _code_files(config: dict) -> list[str]:
    """Return the names of the code files of a model that transformers lacks, such as DeepSeek-MoE. None of it runs."""
    auto_map = config.get("auto_map")
    modules = {str(name).partition(".")[0] for name in (auto_map.values() if isinstance(auto_map, dict) else ())}
    return [f"{module}.py" for module in sorted(modules) if module.isidentifier()]


def _classifier_config(model: nn.Module, source: dict, label_names: Sequence[str] | None) -> dict:
    """Return the keys that a classifier's config.json adds to `source`; {} for a language model."""
    count = getattr(model, "num_labels", None)
    if count is None:
        return {}
    stored = source.get("id2label")
    stored = stored if isinstance(stored, dict) and len(stored) == count else {}
    names = label_names or [stored.get(str(index), f"LABEL_{index}") for index in range(count)]
    return {
        "architectures": [f"{model.checkpoint.family.transformers}ForSequenceClassification"],
        "problem_type": "regression" if count == 1 else "single_label_classification",
        "num_labels": count,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _checkpoint_tensors(model: nn.Module) -> dict[str, tuple[Tensor, LowRankLinear | None]]:
    """Return, by its name in a checkpoint, every tensor of the base and the layer that changes it, if any."""
    layers, initial, tensors = dict(adapted_layers(model)), initial_values(model), {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if name in initial:
            continue
        if owner not in layers or leaf == "bias":
            tensors[name] = parameter, None
        elif leaf == "W":
            tensors[f"{owner}.weight"] = parameter, layers[owner]
    return tensors


def _merged(model: nn.Module, name: str, parameter: Tensor, layer: LowRankLinear | None) -> Tensor:
    """Return the tensor as a checkpoint stores it: W + ΔW, summed in float32 and rounded once to W's dtype."""
    W = read(model.checkpoint.stored[name], name) if parameter.is_meta else parameter
    if layer is not None and parameter.is_meta:
        layer.W = nn.Parameter(W, requires_grad=False)  # DoRA's change depends on it
    tensor = W if layer is None else (W.float() + layer.delta).to(W.dtype)
    if layer is not None:
        layer.W = parameter
    return (tensor.T if is_stored_transposed(model, name) else tensor).detach().cpu().contiguous()


def _shards(tensors: dict[str, tuple[Tensor, LowRankLinear | None]]) -> list[list[str]]:
    """Return the names, in order, in groups of at most SHARD_BYTES."""
    shards, filled = [[]], 0
    for name, (parameter, _) in tensors.items():
        if shards[-1] and filled + parameter.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += parameter.nbytes
    return shards
