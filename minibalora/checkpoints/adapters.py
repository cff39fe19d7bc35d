"""Save and load adapters in PEFT's format, always relative to the original checkpoint."""

import math
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minibalora.base import progress
from minibalora.base.errors import InputError
from minibalora.base.files import replacing, write_json
from minibalora.checkpoints.adapter_checks import check_layer, checked_whole
from minibalora.checkpoints.adapter_config import SUBTRACTED_INITS, init_of, is_target
from minibalora.checkpoints.adapter_file import PREFIX, Adapter, read_adapter
from minibalora.checkpoints.adapter_layers import config_of, device_of, layer_of, parts_of, type_of
from minibalora.checkpoints.weights import checkpoint_of, is_stored_transposed, read, set_parameter
from minibalora.lowrank import adapted_layers, initial_values, install


@torch.no_grad()
def save_adapter(model: nn.Module, folder: str | Path, as_lora: bool = True) -> None:
    """Write adapter_config.json and adapter_model.safetensors: ΔW of every adapted layer, for the ORIGINAL base.

    An adapter of rank r that starts from PiSSA becomes a plain LoRA of rank 2r (see `LowRankLinear.update`), so PEFT
    and vLLM need neither the residual nor the initial factors; `truncate` makes it smaller. A trained head is saved
    whole, as PEFT's modules_to_save. Of the layers in variants.py, DoRA is saved with its magnitudes, and the others
    as the plain LoRA that they equal: AdaLoRA without the values that were set to 0, LoHa of rank r², DyLoRA of rank r,
    DeltaLoRA of rank 2r. as_lora=False saves AdaLoRA and LoHa in PEFT's own format.
    Raises ValueError if no layer is adapted, or if as_lora is False and PEFT has no format for the layers.
    """
    layers, head = adapted_layers(model), list(getattr(model, "own_head", []))
    if not layers:
        raise ValueError("nothing to save: the model has no adapted layer")
    tensors, shapes, peft_type = {}, {}, type_of(layers, as_lora)
    for name, layer in layers:
        parts, *shapes[name] = parts_of(layer, peft_type)
        tensors |= {f"{PREFIX}{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
    config = config_of(_lora_config(model, shapes, head), peft_type, layers)
    for module in head:
        part = model.get_submodule(module)
        initial = initial_values(part)
        for name, parameter in [(name, p) for name, p in part.named_parameters() if name not in initial]:
            value = read(model.checkpoint.stored[f"{module}.{name}"], name) if parameter.is_meta else parameter
            tensors[f"{PREFIX}{module}.{name}"] = value.cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def _lora_config(model: nn.Module, shapes: dict[str, list], head: list[str]) -> dict:
    """Return adapter_config.json for layers of these (rank, alpha). Its defaults are the most frequent values."""
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
    """Return the last parts of the adapted layers' names, or whole names if a last part would match other layers."""
    names = {name for name, _ in adapted_layers(model)}
    last_parts = {name.rpartition(".")[2] for name in names}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    is_ambiguous = any(name.rpartition(".")[2] in last_parts for name in linears)
    return sorted(names if is_ambiguous else last_parts)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter that we or PEFT saved onto `model`, freshly loaded from its base checkpoint; return the model.

    ΔW = s (lora_B lora_A), with s = alpha / r, or alpha / √r for use_rslora (arXiv 2312.03732); rank_pattern and
    alpha_pattern apply. modules_to_save replace the base's parameters in the base's dtype, except that a classifier's
    head is float32. An unconverted PiSSA or OLoRA adapter becomes a LoRA of the base, of rank 2r: see `layer_of`. DoRA
    and LoHa become their layers in variants.py, AdaLoRA a LoRA. The base's own weights stay untouched, so
    `pretrained(model)` is the base, and `merge(model)` makes plain linears of the sum.
    Raises ValueError if the model is adapted already. Raises InputError, with the model unchanged, if the adapter is
    incomplete, contradicts its config, is for another base, or is of a kind that is not implemented.
    """
    return put_adapter(model, read_adapter(folder))


@torch.no_grad()
def put_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put onto `model` an adapter that has been read: the second half of `load_adapter`."""
    if adapted_layers(model):
        raise ValueError("the model has an adapter already: load the base again")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    whole = checked_whole(model, adapter)
    is_slow = init_of(adapter.config) in SUBTRACTED_INITS
    layers = {}
    for name in progress.over(adapter.factors, "initial factors", "layer", delay=2, is_shown=is_slow):
        check_layer(model, name, linears.get(name), adapter)
        layers[name] = layer_of(model, name, linears[name], adapter)
    if missing := [name for name in linears if is_target(adapter.config, name) and name not in layers]:
        raise InputError(f"{adapter.file}: lacks {missing[0]}, which target_modules names: save the adapter again")

    modules = list(getattr(model, "own_head", ()))
    parameters, own_head = dict(model.named_parameters()), tuple(f"{module}." for module in modules)
    others = {name.rpartition(".")[0] for name in whole if not name.startswith(own_head)}
    model.own_head = [*modules, *sorted(others)]
    install(model, layers)
    for name, value in whole.items():
        dtype = torch.float32 if name.startswith(own_head) else parameters[name].dtype
        set_parameter(model, name, nn.Parameter(value.to(device_of(parameters[name]), dtype)))
    return model
