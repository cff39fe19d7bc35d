"""Adapters in PEFT's format, always relative to the original checkpoint.

PEFT's lora_A is (r, m) and lora_B is (n, r): the transposes of the paper's A (m, r) and B (r, n). Only this file
converts.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minibalora.base.errors import InputError
from minibalora.base.files import refuse_pointer, replacing, write_json
from minibalora.checkpoints.adapter_config import is_target, read_adapter_config, setting
from minibalora.checkpoints.weights import checkpoint_of, is_stored_transposed, read, set_parameter
from minibalora.lowrank import LowRankLinear, adapted_layers, initial_values, install
from minibalora.models.mixture import Router

PREFIX = "base_model.model."  # PEFT's wrapper around the base model
FACTOR = re.compile(r"(.*)\.lora_([AB])\.weight")


@torch.no_grad()
def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors: ΔW of every adapted layer, for the ORIGINAL base.

    A PiSSA-initialised adapter of rank r becomes a plain LoRA of rank 2r (see LowRankLinear.update), so that PEFT and
    vLLM need neither the residual nor the initial factors; `truncate` makes it smaller. A trained head is saved whole,
    as PEFT's modules_to_save. Raises ValueError if nothing is adapted.
    """
    layers, head = adapted_layers(model), list(getattr(model, "own_head", []))
    if not layers:
        raise ValueError("nothing to save: the model has no adapted layer")
    tensors, shapes = {}, {}
    for name, layer in layers:
        left, right = (factor.cpu() for factor in layer.update())
        tensors[f"{PREFIX}{name}.lora_A.weight"] = left.T.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = right.T.contiguous()
        shapes[name] = left.shape[1], layer.scaling * left.shape[1]
    for module in head:
        part = model.get_submodule(module)
        kept = initial_values(part)
        for name, parameter in [(name, p) for name, p in part.named_parameters() if name not in kept]:
            value = read(model.checkpoint.stored[f"{module}.{name}"], name) if parameter.is_meta else parameter
            tensors[f"{PREFIX}{module}.{name}"] = value.cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", _config_of(model, shapes, head))


def _config_of(model: nn.Module, shapes: dict[str, tuple[int, float]], head: list[str]) -> dict:
    """adapter_config.json of layers with these ranks and alphas; the ones that most layers have are the default."""
    shapes = {
        name: (r, round(alpha) if math.isclose(alpha, round(alpha)) else alpha) for name, (r, alpha) in shapes.items()
    }
    ranks, alphas = ({name: shape[index] for name, shape in shapes.items()} for index in (0, 1))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    checkpoint = checkpoint_of(model)
    task = "CAUSAL_LM" if checkpoint is None else checkpoint.family.peft_task
    return {
        "peft_type": "LORA",
        "task_type": task if getattr(model, "num_labels", None) is None else "SEQ_CLS",
        "base_model_name_or_path": str(checkpoint.folder.resolve()) if checkpoint and checkpoint.folder else None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model),
        "bias": "none",
        "fan_in_fan_out": any(is_stored_transposed(model, f"{name}.weight") for name in shapes),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": head or None,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }


def _target_modules(model: nn.Module) -> list[str]:
    """The last parts of the adapted names; whole names where a last part would match a layer that is not adapted."""
    names = {name for name, _ in adapted_layers(model)}
    last_parts = {name.rpartition(".")[2] for name in names}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    is_ambiguous = any(name.rpartition(".")[2] in last_parts for name in linears)
    return sorted(names if is_ambiguous else last_parts)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, with names as in the base model."""

    file: Path
    config: dict
    factors: dict[str, dict[str, Tensor]]  # layer -> {"A": lora_A (r, m), "B": lora_B (n, r)}
    whole: dict[str, Tensor]  # parameters that replace the base's: modules_to_save


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter that we or PEFT saved onto `model`, freshly loaded from its base checkpoint; return the model.

    ΔW = s (lora_B lora_A), s = alpha / r, or alpha / √r with use_rslora (arXiv 2312.03732); rank_pattern and
    alpha_pattern are obeyed, modules_to_save replace the base's, in the base's dtype but for a classifier's head, which
    is float32. The base's own weights stay untouched, so that `pretrained(model)` is the base, and `merge(model)` makes
    plain linears of the sum.
    Raises ValueError if the model is adapted already, and InputError, with the model unchanged, if the adapter is
    incomplete, contradicts its config, is for another base, or is of a kind that is not implemented.
    """
    return put_adapter(model, read_adapter(folder))


@torch.no_grad()
def put_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """`load_adapter` of an adapter that is read already."""
    if adapted_layers(model):
        raise ValueError("the model has an adapter already: load the base anew")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in model.named_modules():
        if isinstance(module, Router) and name in adapter.factors:
            raise InputError(f"{adapter.file}: adapts {name}, a router, which stays frozen here: merge it in PEFT")
    _check_whole(model, adapter)
    layers = {name: _layer(name, linears.get(name), adapter) for name in adapter.factors}
    if absent := [name for name in linears if is_target(adapter.config, name) and name not in layers]:
        raise InputError(f"{adapter.file}: lacks {absent[0]}, which target_modules names: save the adapter again")

    modules = list(getattr(model, "own_head", ()))
    parameters, own_head = dict(model.named_parameters()), tuple(f"{module}." for module in modules)
    others = {name.rpartition(".")[0] for name in adapter.whole if not name.startswith(own_head)}
    model.own_head = [*modules, *sorted(others)]
    install(model, layers)
    for name, value in adapter.whole.items():
        dtype = torch.float32 if name.startswith(own_head) else parameters[name].dtype
        set_parameter(model, name, nn.Parameter(value.to(_device_of(parameters[name]), dtype)))
    return model


def _layer(name: str, linear: nn.Linear | None, adapter: Adapter) -> LowRankLinear:
    lora_A, lora_B = adapter.factors[name]["A"], adapter.factors[name]["B"]
    rank = setting(adapter.config, "r", "rank_pattern", name)
    alpha = setting(adapter.config, "lora_alpha", "alpha_pattern", name)
    if lora_A.ndim != 2 or len(lora_A) != rank or lora_B.shape[1:] != (rank,):
        shapes = f"factors of shape {list(lora_A.shape)} and {list(lora_B.shape)}"
        raise InputError(f"{adapter.file}: {name} has {shapes}, but adapter_config.json says rank {rank}: "
                         "use the two files that were saved together")  # fmt: skip
    A, B = lora_A.T, lora_B.T
    other_base = f"it is for another base{_base_of(adapter)}: give that one"
    if linear is None:
        raise InputError(f"{adapter.file}: {name} is no linear layer of this model: {other_base}")
    if (len(A), B.shape[1]) != (linear.in_features, linear.out_features):
        sizes = f"{len(A)} x {B.shape[1]}, but the model's layer is {linear.in_features} x {linear.out_features}"
        raise InputError(f"{adapter.file}: {name} is {sizes}: {other_base}")
    device = _device_of(linear.weight)
    scaling = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    return LowRankLinear(linear, A.contiguous().to(device), B.contiguous().to(device), scaling, keep_initial=False)


def _check_whole(model: nn.Module, adapter: Adapter) -> None:
    """InputError unless what is saved whole fits the model, and is all of each module and all that the base lacks."""
    parameters, config = dict(model.named_parameters()), adapter.config
    is_tied = getattr(model, "num_labels", 0) is None and model.config.tie_word_embeddings
    for name in (*adapter.whole, *adapter.factors) if is_tied else ():
        if name.startswith("lm_head") or parameters.get(name) is model.embedding.weight:
            tied = "head and embedding of this model are one tensor (tie_word_embeddings), which would become two"
            raise InputError(f"{adapter.file}: changes {name}, but {tied}: not implemented, merge it in PEFT")
    for name, value in adapter.whole.items():
        if name not in parameters or value.shape != parameters[name].shape:
            has = f"{list(parameters[name].shape)}" if name in parameters else "none"
            raise InputError(f"{adapter.file}: {name} has shape {list(value.shape)}, but the model has {has}: "
                             f"it is for another base or head{_base_of(adapter)}: give that one")  # fmt: skip
    checkpoint = checkpoint_of(model)
    to_save = [*(config.get("modules_to_save") or ()), *(checkpoint.new_modules if checkpoint else ())]
    for name in parameters:
        if name not in adapter.whole and any(f".{module}." in f".{name}" for module in to_save):
            raise InputError(f"{adapter.file}: lacks {name}, which only an adapter has: save it with modules_to_save")


def _base_of(adapter: Adapter) -> str:
    base = adapter.config.get("base_model_name_or_path")
    return f" ({base})" if base else ""


def _device_of(parameter: Tensor) -> torch.device:
    """The CPU for a parameter of a `weights.skeleton`, which has no memory yet."""
    return torch.device("cpu") if parameter.is_meta else parameter.device


def read_adapter(folder: str | Path) -> Adapter:
    """adapter_config.json and adapter_model.safetensors, checked without a base; InputError as in `load_adapter`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give the folder that holds adapter_config.json")
    config, file = read_adapter_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    factors, whole = {}, {}
    for stored_name, tensor in _read_tensors(file).items():
        if not stored_name.startswith(PREFIX):
            raise InputError(f"{file}: {stored_name} does not begin with {PREFIX}: give an adapter as PEFT saves it")
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise InputError(f"{file}: {stored_name} has values that are not finite: train it again")
        name = stored_name.removeprefix(PREFIX)
        if ".base_layer." in name:
            continue  # of an adapted lm_head PEFT repeats the frozen weight
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor.float()
        else:
            whole[name] = tensor
    for name, pair in factors.items():
        if missing := {"A", "B"} - pair.keys():
            raise InputError(f"{file}: {name} has no lora_{missing.pop()}: save the adapter again")
    if not factors:
        raise InputError(f"{file}: has no lora_A and lora_B: save the adapter again")
    return Adapter(file, config, factors, whole)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        is_pickled = file.with_suffix(".bin").exists()
        hint = "PEFT writes it with safe_serialization=True; a .bin is a pickle, never read here"
        raise InputError(f"{file}: no such file: {hint if is_pickled else 'save the adapter again'}") from None
    except (SafetensorError, OSError) as error:
        refuse_pointer(file)
        raise InputError(f"{file}: not a readable safetensors file ({error}): save the adapter again") from None
