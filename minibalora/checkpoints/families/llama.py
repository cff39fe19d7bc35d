"""config.json and tensor names of LLaMA, Yi (whose model_type is llama), Mistral, Gemma and Qwen."""

from functools import partial
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.checkpoints.config import INITIALIZER_RANGE, LONGEST, Family, Fields, Names, is_positive
from minibalora.models.llama import LlamaConfig, llama

GATED = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
NAMES = Names("model", "score", "score.weight", ignored=r".*rotary_emb\.inv_freq|lm_head\.weight")


def read_llama(fields: Fields) -> LlamaConfig:
    return LlamaConfig(**llama_settings(fields))


def read_mistral(fields: Fields) -> LlamaConfig:
    """Read the config of Mistral, or of Ministral, which calls itself Mistral and has layer_types."""
    kinds = fields.raw.get("layer_types")
    windows = same_windows(fields) if kinds is None else windows_of_kinds(fields, layer_kinds(fields, kinds))
    return LlamaConfig(**llama_settings(fields) | {"windows": windows})


def same_windows(fields: Fields) -> tuple[int | None, ...]:
    """Return sliding_window for every layer; None if it is null."""
    window = fields.integer("sliding_window") if "sliding_window" in fields.raw else None
    return (window,) * fields.integer("num_hidden_layers")


def read_gemma(fields: Fields) -> LlamaConfig:
    return LlamaConfig(**gemma_settings(fields))


def gemma_settings(fields: Fields) -> dict:
    name = fields.raw["hidden_act"]  # the first releases say "gelu" and mean its tanh form
    fields.raw["hidden_act"] = fields.raw.get("hidden_activation", "gelu_pytorch_tanh" if name == "gelu" else name)
    settings = llama_settings(fields)
    return settings | {"norm_offset": 1.0, "embedding_scale": settings["hidden_size"] ** 0.5}


def read_gemma2(fields: Fields) -> LlamaConfig:
    layers = fields.integer("num_hidden_layers")
    kinds = ["sliding_attention" if index % 2 == 0 else "full_attention" for index in range(layers)]
    settings = gemma_settings(fields) | {
        "windows": windows_of_kinds(fields, layer_kinds(fields, fields.raw.get("layer_types", kinds))),
        "has_post_norms": True,
        "query_scale": (fields.integer("head_dim") / fields.number("query_pre_attn_scalar")) ** 0.5,
    }
    for setting, key in (("attention_cap", "attn_logit_softcapping"), ("logit_cap", "final_logit_softcapping")):
        settings[setting] = fields.number(key) if key in fields.raw else None
    return LlamaConfig(**settings)


def read_qwen2(fields: Fields) -> LlamaConfig:
    """Read the config of Qwen 1.5, 2 or 2.5, which have biases on q, k and v only."""
    return LlamaConfig(**llama_settings(fields) | {"qkv_bias": True, "o_bias": False, "windows": qwen_windows(fields)})


def read_qwen3(fields: Fields) -> LlamaConfig:
    return LlamaConfig(**llama_settings(fields) | {"qk_norm": True, "windows": qwen_windows(fields)})


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """Return each layer's window, by layer_types or from max_window_layers on; None without use_sliding_window."""
    layers, first = fields.integer("num_hidden_layers"), fields.integer("max_window_layers", least=0)
    by_number = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    kinds = layer_kinds(fields, fields.raw.get("layer_types", by_number))
    if not fields.flag("use_sliding_window") or "sliding_window" not in fields.raw:
        return (None,) * layers
    return windows_of_kinds(fields, kinds)


def windows_of_kinds(fields: Fields, kinds: list[str]) -> tuple[int | None, ...]:
    """Return each layer's window: sliding_window, or None for full attention."""
    return tuple(fields.integer("sliding_window") if kind == "sliding_attention" else None for kind in kinds)


def layer_kinds(fields: Fields, kinds: object) -> list[str]:
    """Check that `kinds` has "full_attention" or "sliding_attention" for each layer, and return it."""
    layers, allowed = fields.integer("num_hidden_layers"), ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in allowed for kind in kinds):
        expected = f"it must have {' or '.join(allowed)} for each of {layers} layers"
        raise InputError(f"{fields.path}: layer_types is {kinds!r}: {expected}")
    return kinds


def llama_settings(fields: Fields) -> dict:
    """Return the settings of LLaMA; the other families replace those that differ."""
    fields.refuse("use_bidirectional_attention", "bidirectional attention is")
    d, layers, heads = map(fields.integer, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    rope, has_bias = _rope_settings(fields), fields.flag("attention_bias", False)
    kv_heads, head_dim = fields.integer("num_key_value_heads", heads), fields.integer("head_dim", d // heads)
    if heads % kv_heads or head_dim % 2 or ("head_dim" not in fields.raw and d % heads):
        shape = f"hidden_size {d}, {heads} heads, {kv_heads} key-value heads"
        raise InputError(f"{fields.path}: {shape} of size {head_dim} do not fit together: download it again")
    return {
        **fields.integers("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "max_position_embeddings": fields.integer("max_position_embeddings", most=LONGEST),
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "rope_theta": _rope_number(rope, "rope_theta", fields.path),
        "rope_scaling": _rope_scaling(rope, fields.path),
        "windows": (None,) * layers,
        "qk_norm": False,
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "mlp_bias": fields.flag("mlp_bias", False),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "activation": fields.activation("hidden_act", GATED),
        "norm_offset": 0.0,
        "embedding_scale": 1.0,
        "initializer_range": fields.number("initializer_range", INITIALIZER_RANGE),
        "attention_dropout": fields.dropout("attention_dropout", 0.0),
    }


def _rope_settings(fields: Fields) -> dict:
    """Return all settings of RoPE, from the top level and rope_scaling or from rope_parameters (transformers 5).

    As in transformers 5, rope_parameters do not count beside rope_scaling, and the original context may stand at the
    top level, which wins.
    """
    raw = fields.raw
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key, {}), dict):
            raise InputError(f"{fields.path}: {key} is {raw[key]!r}: it must be an object or null")
        if nested := [name for name, value in raw.get(key, {}).items() if isinstance(value, dict)]:
            raise InputError(f"{fields.path}: {key} has settings of its own for {nested[0]}, which are not implemented")
    scaling, original = raw.get("rope_scaling") or raw.get("rope_parameters", {}), "original_max_position_embeddings"
    theta = raw.get("rope_theta", 10000.0)  # LLaMA 2's config.json leaves it out
    settings = {"rope_theta": theta, original: raw.get("max_position_embeddings")} | scaling
    settings[original] = raw.get(original, settings[original])
    settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    settings.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    return settings


def _rope_number(settings: dict, key: str, path: Path) -> float:
    value = settings.get(key)
    if not is_positive(value):
        raise InputError(f"{path}: {key} is {value!r}: it must be a positive number")
    return float(value)


def _rope_scaling(settings: dict, path: Path) -> dict | None:
    """Return the numbers of the scaling, see `models.llama.rotary_frequencies`; None for plain RoPE."""
    kind = settings["rope_type"]
    if kind not in ("default", "linear", "llama3") or settings["partial_rotary_factor"] != 1:
        kind = f"{kind!r} with partial_rotary_factor {settings['partial_rotary_factor']!r}"
        raise InputError(
            f"{path}: rope_type {kind} is not implemented: there are default, linear and llama3, each with 1"
        )
    if kind == "default":
        return None
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if kind == "llama3" else ()
    scaling = {key: _rope_number(settings, key, path) for key in ("factor", *keys)}
    if keys and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{path}: low_freq_factor must be below high_freq_factor: download the file again")
    return scaling


LLAMA = {"tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
MISTRAL = LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
GEMMA = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
GEMMA2 = GEMMA | {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
QWEN = LLAMA | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
family = partial(Family, build=llama, names=NAMES)
FAMILIES = {
    "llama": family(read_llama, transformers="Llama", defaults=LLAMA),
    "mistral": family(read_mistral, transformers="Mistral", defaults=MISTRAL),
    "gemma": family(read_gemma, transformers="Gemma", defaults=GEMMA),
    "gemma2": family(read_gemma2, transformers="Gemma2", defaults=GEMMA2),
    "qwen2": family(read_qwen2, transformers="Qwen2", defaults=QWEN),
    "qwen3": family(read_qwen3, transformers="Qwen3", defaults=QWEN | {"head_dim": 128}),
}
