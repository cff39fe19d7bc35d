"""The files of an adapter in PEFT's format, read and checked without a base."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minibalora.base.errors import InputError
from minibalora.base.files import refuse_pointer
from minibalora.checkpoints.adapter_config import parts_of_type, read_adapter_config

PREFIX = "base_model.model."  # PEFT's wrapper around the base model
# "default": in a state dict that PEFT did not rename
FACTOR = re.compile(r"(.*)\.(?:lora|hada)_([ABE]|magnitude_vector|w[12]_[ab])(?:\.default)?(?:\.weight)?")
REPEATED = re.compile(r"\.(base_layer|original_module)\.")  # the base's weights, beside the adapter's
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|modules_to_save(\.default)?)\.")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter's folder, with names as in the base model."""

    file: Path
    config: dict
    factors: dict[str, dict[str, Tensor]]  # layer -> {"A": lora_A (r, m), "B": lora_B (n, r), ...}, float32
    whole: dict[str, Tensor]  # parameters that replace the base's: modules_to_save
    repeated: dict[str, Tensor]  # weights of the base, which PEFT sometimes stores, too


def read_adapter(folder: str | Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors. Raises InputError as `load_adapter` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give the folder that holds adapter_config.json")
    config, file = read_adapter_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    factors, whole, repeated = {}, {}, {}
    for stored_name, tensor in _read_tensors(file).items():
        if not stored_name.startswith(PREFIX):
            raise InputError(f"{file}: {stored_name} does not begin with {PREFIX}: give an adapter as PEFT saves it")
        _check_tensor(file, stored_name, tensor)
        name = WRAPPERS.sub("", stored_name.removeprefix(PREFIX))
        if tensor.dtype.itemsize == 1:
            tensor = tensor.float()
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor.float()
        elif REPEATED.search(name):
            repeated[REPEATED.sub(".", name)] = tensor
        else:
            whole[name] = tensor
    parts = {part.partition("_")[2]: part for part in parts_of_type(config)}
    for name, tensors in factors.items():
        if missing := parts.keys() - tensors.keys():
            part = parts[sorted(missing)[0]]
            reason = ", which use_dora in adapter_config.json asks for" if part == "lora_magnitude_vector" else ""
            raise InputError(f"{file}: {name} has no {part}{reason}: save the adapter again")
        if more := tensors.keys() - parts.keys():
            part = ("hada_" if "w1_a" in more else "lora_") + sorted(more)[0]
            raise InputError(f"{file}: {name} has {part}, but adapter_config.json does not say that such factors are "
                             "used: use the two files that were saved together")  # fmt: skip
    if not factors:
        raise InputError(f"{file}: has no {' and '.join(parts.values())}: save the adapter again")
    return Adapter(file, config, factors, whole, repeated)


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


def _check_tensor(file: Path, name: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor that is empty, not finite, or of a kind that is not implemented."""
    if ".lora_embedding_" in name:
        raise InputError(f"{file}: {name}: a LoRA of an embedding is not implemented: merge the adapter in PEFT")
    if (".lora_" in name or ".hada_" in name) and not FACTOR.fullmatch(name):
        raise InputError(f"{file}: {name} is not a factor of LoRA, DoRA, AdaLoRA or LoHa of a linear layer, and "
                         "nothing else is implemented: merge the adapter in PEFT")  # fmt: skip
    if tensor.numel() == 0 and tensor.ndim < 2:  # AdaLoRA may leave a layer rank 0
        raise InputError(f"{file}: {name} is empty, as DeepSpeed ZeRO-3 saves weights that it has not gathered: save "
                         "the adapter again with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on "
                         "the checkpoint")  # fmt: skip
    if tensor.dtype not in FLOATS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{file}: {name} is stored as {dtype}: save the adapter in float32 or bfloat16")
    if not tensor.float().isfinite().all():
        raise InputError(f"{file}: {name} has values that are not finite: train the adapter again")
