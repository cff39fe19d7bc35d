"""PEFT's adapter_config.json: which layers are adapted, their rank and alpha, and which settings are refused."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # leave the base as it is
SUBTRACTED_INITS = ("pissa", "olora")  # train against W − s A₀B₀, where A₀ and B₀ follow from W alone
# Keys that do not change what a trained adapter computes. An adapter that changes tied weights is refused in any case.
HARMLESS = set(
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode fan_in_fan_out "
    "lora_dropout loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)
HARMLESS_IN = {  # more of them, by peft_type
    "LORA": set(),
    "ADALORA": set("init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step".split()),
    "LOHA": set("alpha rank_dropout module_dropout init_weights use_effective_conv2d".split()),
}
OTHER_NAMES = {"ADALORA": {"r": "init_r"}, "LOHA": {"lora_alpha": "alpha"}}  # LoRA's name of a key -> the type's own
PARTS = {"LORA": ("lora_A", "lora_B"), "ADALORA": ("lora_A", "lora_B", "lora_E")}  # the tensors of a layer
PARTS["LOHA"] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
ADALORA_EPSILON = 1e-5  # PEFT divides alpha by r + 1e-5
# PEFT's keys for features that are not implemented; each is harmless as long as it is off.
FEATURES = set(
    "alora_invocation_tokens arrow_config bias enable_lora kasa_config layer_replication lora_bias megatron_config "
    "monteclora_config target_parameters trainable_token_indices use_bdlora use_qalora velora_config".split()
)


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
    return isinstance(value, dict) and all(_is_regex(key) and accepts(number) for key, number in value.items())


def _is_off(value: object) -> bool:
    """Whether a setting has the value of a feature that is not used."""
    return not value or value == "none" or (isinstance(value, dict) and all(map(_is_off, value.values())))


CONFIG = {  # the keys that are read, and what their values must be
    "r": ("a positive integer", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "target_modules": ("a list of names or a regular expression", lambda value: _is_list(value) or _is_regex(value)),
    "exclude_modules": ("a list of names or a regular expression", lambda value: _is_list(value) or _is_regex(value)),
    "layers_to_transform": ("an integer or a list", lambda value: isinstance(value, int | list)),
    "layers_pattern": ("a name or a list of names", lambda value: _is_list(value) or isinstance(value, str)),
    "modules_to_save": ("a list of names", _is_list),
    "rank_pattern": ("positive integers by name", lambda value: _is_pattern(value, _is_rank)),
    "alpha_pattern": ("numbers by name", lambda value: _is_pattern(value, _is_number)),
    "use_dora": ("true or false", lambda value: isinstance(value, bool)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "init_lora_weights": ("a name or true or false", lambda value: isinstance(value, bool | str)),
}
REQUIRED = ("r", "lora_alpha", "target_modules")


def read_adapter_config(path: Path) -> dict:
    """Read and check adapter_config.json.

    Raises InputError for a key that is missing or wrong, or that changes what an adapter computes in a way that is not
    implemented. Unknown keys that are off (null, false, 0, empty) are ignored, and named on standard error.
    """
    config = read_json_object(path)
    peft_type = config.get("peft_type")
    if peft_type not in PARTS:
        kind = repr(peft_type) if "peft_type" in config else "missing"
        raise InputError(f"{path}: peft_type is {kind}, but only {', '.join(PARTS)} are implemented: merge the adapter "
                         "in PEFT")  # fmt: skip
    config = _as_lora(path, config)
    for key, (expected, accepts) in CONFIG.items():
        stored = OTHER_NAMES.get(peft_type, {}).get(key, key)
        if config.get(key) is None and key in REQUIRED:
            raise InputError(f"{path}: the key {stored} is missing: save the adapter again")
        is_checked = peft_type == "ADALORA" and key == "rank_pattern"  # by _as_lora; a rank may be 0
        if config.get(key) is not None and not is_checked and not accepts(config[key]):
            raise InputError(f"{path}: {stored} is {config[key]!r}, not {expected}: save the adapter again")
    if init_of(config) not in PLAIN_INITS + SUBTRACTED_INITS:
        raise InputError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, so the adapter belongs to a base from "
            "which initial factors were subtracted that no file here tells: save the adapter where it was "
            "trained with save_pretrained(..., path_initial_model_for_weight_conversion=...), as a LoRA of the "
            "original base"
        )
    ignored = []
    for key in sorted(config.keys() - HARMLESS - HARMLESS_IN[peft_type] - CONFIG.keys()):
        if not _is_off(config[key]):
            reason = "which is not implemented" if key in FEATURES else "an unknown key that may change the results"
            cure = "" if key in FEATURES else ", or delete the key if it matters in training only"
            raise InputError(f"{path}: {key} is {config[key]!r}, {reason}: merge the adapter in PEFT{cure}")
        if key not in FEATURES:
            ignored.append(key)
    if ignored:
        print(f"{path}: unknown keys that are off are ignored: {', '.join(ignored)}", file=sys.stderr)
    return config


def _as_lora(path: Path, config: dict) -> dict:
    """Return the config with LoRA's names of the keys that mean the same, and without those that PEFT does not read."""
    peft_type = config["peft_type"]
    if peft_type == "LORA":
        return config
    config = config | {key: config.get(stored) for key, stored in OTHER_NAMES[peft_type].items()}
    if peft_type == "LOHA" or config.get("use_dora"):
        return config
    pattern = config.get("rank_pattern") or {}
    if not (isinstance(pattern, dict) and all(isinstance(kept, list) for kept in pattern.values())):
        raise InputError(f"{path}: rank_pattern is not AdaLoRA's, a list of true and false for each layer: save the "
                         "adapter again")  # fmt: skip
    ranks = {re.escape(re.sub(r"\.lora_E(\.default)?$", "", name)): sum(map(bool, pattern[name])) for name in pattern}
    return config | {"rank_pattern": ranks, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}


def parts_of_type(config: dict) -> tuple[str, ...]:
    """Return the names of the tensors that every layer of the adapter has."""
    return (*PARTS[config["peft_type"]], *(["lora_magnitude_vector"] if config.get("use_dora") else ()))


def scaling_of(config: dict, layer: str, rank: int) -> float:
    """Return s of a layer of this rank."""
    alpha = setting(config, "lora_alpha", "alpha_pattern", layer)
    if config["peft_type"] == "ADALORA":
        return (alpha if alpha > 0 else config["r"]) / (config["r"] + ADALORA_EPSILON)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def init_of(config: dict) -> bool | str | None:
    """Return init_lora_weights, in lower case as PEFT compares it; true where it is left out."""
    init = config.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) else init


def setting(config: dict, key: str, pattern_key: str, layer: str) -> float:
    """Return the value for this layer: of the first regular expression in config[pattern_key] that matches its name,
    or config[key]."""
    patterns = config.get(pattern_key) or {}
    return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", layer)), config[key])


def is_target(config: dict, layer: str) -> bool:
    """Return whether the config says, by PEFT's rules, that the layer is adapted."""
    targets, excluded, indices = map(config.get, ("target_modules", "exclude_modules", "layers_to_transform"))
    if any(f".{module}." in f".{layer}." for module in config.get("modules_to_save") or ()):
        return False
    if not _names(targets, layer) or (excluded and _names(excluded, layer)):
        return False
    if isinstance(targets, str) or indices in (None, []):
        return True
    lists = config.get("layers_pattern") or r"[^.]*"  # the names of lists of blocks
    lists = lists if isinstance(lists, str) else "|".join(lists)
    number = re.match(rf"(?:.*?\.)?(?:{lists})\.(\d+)\.", layer)  # the first number: a block's, not an expert's
    return number is not None and int(number[1]) in ([indices] if isinstance(indices, int) else indices)


def _names(modules: str | list[str], layer: str) -> bool:
    """Return whether `modules` names the layer: a regular expression for the whole name, or a list of names and dotted
    suffixes."""
    if isinstance(modules, str):
        return re.fullmatch(modules, layer) is not None
    return any(layer == module or layer.endswith(f".{module}") for module in modules)
