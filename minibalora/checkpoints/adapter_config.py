"""PEFT's adapter_config.json: which layers are adapted, with which rank and alpha, and what is refused by name."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object

# PEFT's inits that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Keys that don't change what a trained adapter computes; whatever is neither here nor read below is refused if set.
HARMLESS_KEYS = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"}
HARMLESS_KEYS |= {"inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"}
HARMLESS_KEYS |= {"loftq_config", "eva_config", "corda_config"}  # of the init


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_regex(value: object) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_pattern(value: object, accepts: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_is_regex(key) and accepts(of_key) for key, of_key in value.items())


CONFIG = {  # the keys that are read: what they must be
    "r": ("a positive integer", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "target_modules": ("a list of names or a regular expression", lambda value: _is_list(value) or _is_regex(value)),
    "exclude_modules": ("a list of names or a regular expression", lambda value: _is_list(value) or _is_regex(value)),
    "layers_to_transform": ("an integer or a list", lambda value: isinstance(value, int | list)),
    "layers_pattern": ("a name or a list of names", lambda value: _is_list(value) or isinstance(value, str)),
    "modules_to_save": ("a list of names", _is_list),
    "rank_pattern": ("positive integers by name", lambda value: _is_pattern(value, _is_rank)),
    "alpha_pattern": ("numbers by name", lambda value: _is_pattern(value, _is_number)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "bias": ('"none", the only form that is implemented', lambda value: value == "none"),
    "init_lora_weights": ("a name or true or false", lambda value: isinstance(value, bool | str)),
}
REQUIRED = ("r", "lora_alpha", "target_modules")


def read_adapter_config(path: Path) -> dict:
    """adapter_config.json; InputError for a key that is missing, wrong, or changes what an adapter computes."""
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        kind = repr(config["peft_type"]) if "peft_type" in config else "missing"
        raise InputError(f"{path}: peft_type is {kind}, but only 'LORA' is implemented: merge the adapter in PEFT")
    for key, (what, accepts) in CONFIG.items():
        if config.get(key) is None and key in REQUIRED:
            raise InputError(f"{path}: the key {key} is missing: save the adapter again")
        if config.get(key) is not None and not accepts(config[key]):
            raise InputError(f"{path}: {key} is {config[key]!r}, not {what}: save the adapter again")
    if config.get("init_lora_weights", True) not in HARMLESS_INITS:
        raise InputError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, so the adapter is for a base from which "
            "its initial factors were subtracted, and neither is in this folder: save it where it was trained with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), as a LoRA of the original base"
        )
    for key in config.keys() - HARMLESS_KEYS - CONFIG.keys():
        if config[key]:
            raise InputError(f"{path}: {key} is {config[key]!r}, which is not implemented: merge the adapter in PEFT")
    return config


def setting(config: dict, key: str, pattern_key: str, layer: str) -> float:
    """config[key], or what the first regular expression of config[pattern_key] that fits says for this layer."""
    patterns = config.get(pattern_key) or {}
    return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), config[key])


def is_target(config: dict, layer: str) -> bool:
    """Whether the config says that the layer is adapted, by PEFT's rules."""
    targets, excluded, indices = map(config.get, ("target_modules", "exclude_modules", "layers_to_transform"))
    if any(f".{module}." in f".{layer}." for module in config.get("modules_to_save") or ()):
        return False
    if not _names(targets, layer) or (excluded and _names(excluded, layer)):
        return False
    if isinstance(targets, str) or indices in (None, []):
        return True
    lists = config.get("layers_pattern") or r"[^.]*"  # the names of lists of blocks
    lists = lists if isinstance(lists, str) else "|".join(lists)
    number = re.match(rf"(?:.*?\.)?(?:{lists})\.(\d+)\.", layer)  # the first one: of the block, not of an expert in it
    return number is not None and int(number[1]) in ([indices] if isinstance(indices, int) else indices)


def _names(modules: str | list[str], layer: str) -> bool:
    """A string is a regular expression for the whole name, a list has names or dotted suffixes."""
    if isinstance(modules, str):
        return re.fullmatch(modules, layer) is not None
    return any(layer == module or layer.endswith(f".{module}") for module in modules)
