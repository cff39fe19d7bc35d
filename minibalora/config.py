"""config.json as the configuration of one of our models. Whatever would change the numbers and is not implemented is
refused by name; nothing is silently approximated."""

import os
from pathlib import Path

from minibalora.errors import InputError
from minibalora.files import read_json_object
from minibalora.models.decoder import DecoderConfig, GPT2Config
from minibalora.models.encoder import EncoderConfig

LARGEST = {int: 1 << 20, float: 1e30}  # of any number in config.json: products of three sizes still fit 64 bits
GATED = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
INITIALIZER_RANGE = 0.02  # the default of all these families
PLAIN = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}

# What a config.json of each family may leave out, as that family's own code fills it in.
BERT = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
}
FAMILIES = {
    "llama": {"tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 2048},
    "mistral": {
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "gemma": {
        "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "bert": BERT,
    "roberta": BERT | {"pad_token_id": 1},
    "deberta-v2": {
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-7,
        "type_vocab_size": 0,
        "relative_attention": False,
        "position_biased_input": True,
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "pos_att_type": "",
        "conv_kernel_size": 0,
        "pooler_hidden_act": "gelu",
        "pooler_dropout": 0.0,
    },
}
# The only form of DeBERTa that is here: v3's, which is v2's without the convolution.
DEBERTA_V3 = {
    "relative_attention": True,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pooler_hidden_act": "gelu",
    "type_vocab_size": 0,
    "conv_kernel_size": 0,
}


def read_config(folder: Path) -> DecoderConfig | GPT2Config | EncoderConfig:
    """config.json as our configuration; InputError names the key that is missing, wrong or not implemented."""
    path = folder / "config.json"
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder: give the folder that holds config.json")
    raw = read_json_object(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{path}: model_type {family!r} is not implemented: there are {', '.join(FAMILIES)}")
    fields = Fields(FAMILIES[family] | raw, path)
    fields.refuse("quantization_config", "quantised weights are")
    if family == "gpt2":
        return _gpt2(fields)
    if family == "deberta-v2":
        return _deberta(fields)
    return _bert(fields, family) if family in ("bert", "roberta") else _llama(fields, family)


class Fields:
    """The values of a config.json, each checked when it is asked for; null counts as absent."""

    def __init__(self, raw: dict, path: Path):
        self.path, self.raw = path, {key: value for key, value in raw.items() if value is not None}

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._present(key, default)
        return self._checked(key, value, _in_range(value, int), f"an integer from 1 to {LARGEST[int]}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        return self._checked(key, value, _in_range(value, float), "a positive number")

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._present(key, default)
        return self._checked(key, value, type(value) is bool, "true or false")

    def dropout(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        return float(self._checked(key, value, type(value) in (int, float) and 0 <= value < 1, "a number in [0, 1)"))

    def activation(self, key: str, known: dict[str, str]) -> str:
        name = self.raw.get(key)
        if not isinstance(name, str) or name not in known:
            raise InputError(f"{self.path}: activation {name!r} is not implemented: there are {', '.join(known)}")
        return known[name]

    def refuse(self, key: str, what: str) -> None:
        if self.raw.get(key):
            raise InputError(
                f"{self.path}: {key} is {self.raw[key]!r}, but {what} not implemented: use a checkpoint without"
            )

    def expect(self, **values: object) -> None:
        """Refuse a feature that is implemented in one form only."""
        for key, value in values.items():
            if self.raw.get(key) != value:
                raise InputError(f"{self.path}: {key} is {self.raw.get(key)!r}, but only {value!r} is implemented")

    def _present(self, key: str, default: object) -> object:
        value = self.raw.get(key, default)
        if value is None:
            raise InputError(f"{self.path}: the key {key} is missing: download the file again")
        return value

    def _checked(self, key: str, value, fits: bool, expected: str):
        if not fits:
            raise InputError(f"{self.path}: {key} is {value!r}: it must be {expected}")
        return value


def _in_range(value: object, kind: type) -> bool:
    return type(value) in {kind, int} and 0 < value <= LARGEST[kind]


def _llama(fields: Fields, family: str) -> DecoderConfig:
    """LLaMA, Mistral and Gemma."""
    fields.refuse("use_bidirectional_attention", "bidirectional attention is")
    fields.refuse("attention_dropout", "dropout in attention is")
    if family == "gemma":  # its first releases say "gelu" in hidden_act and mean the tanh form
        name = fields.raw["hidden_act"]
        default = "gelu_pytorch_tanh" if name == "gelu" else name
        fields.raw["hidden_act"] = fields.raw.get("hidden_activation", default)
    heads, d = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    rope = _rope_settings(fields)
    has_window = family == "mistral" and "sliding_window" in fields.raw
    config = DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=d,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", d // heads),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_number(rope, "rope_theta", fields.path),
        rope_scaling=_rope_scaling(rope, fields.path),
        sliding_window=fields.integer("sliding_window") if has_window else None,
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        activation=fields.activation("hidden_act", GATED),
        norm_offset=1.0 if family == "gemma" else 0.0,
        embedding_scale=d**0.5 if family == "gemma" else 1.0,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        initializer_range=fields.number("initializer_range", INITIALIZER_RANGE),
    )
    if heads % config.num_key_value_heads or config.head_dim % 2 or ("head_dim" not in fields.raw and d % heads):
        shape = f"hidden_size {d}, {heads} heads, {config.num_key_value_heads} key-value heads"
        raise InputError(f"{fields.path}: {shape} of size {config.head_dim} do not fit together: download it again")
    return config


def _rope_settings(fields: Fields) -> dict:
    """Both spellings: rope_theta and rope_scaling at the top level, or all inside rope_parameters (transformers 5)."""
    raw = fields.raw
    settings = {"rope_theta": raw.get("rope_theta", 10000.0)}  # LLaMA 2's config.json leaves the theta out
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key, {}), dict):
            raise InputError(f"{fields.path}: {key} is {raw[key]!r}: it must be an object or null")
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


def _gpt2(fields: Fields) -> GPT2Config:
    fields.refuse("scale_attn_by_inverse_layer_idx", "scaling attention by the layer is")
    fields.refuse("add_cross_attention", "cross attention is")
    fields.expect(scale_attn_weights=True)
    fields.activation("activation_function", {"gelu_new": "gelu_tanh"})
    d, heads = fields.integer("n_embd"), fields.integer("n_head")
    _check_heads(fields, d, heads)
    return GPT2Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=d,
        intermediate_size=fields.integer("n_inner", 4 * d),
        num_hidden_layers=fields.integer("n_layer"),
        num_attention_heads=heads,
        max_position_embeddings=fields.integer("n_positions"),
        layer_norm_eps=fields.number("layer_norm_epsilon"),
        embedding_dropout=fields.dropout("embd_pdrop"),
        attention_dropout=fields.dropout("attn_pdrop"),
        residual_dropout=fields.dropout("resid_pdrop"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        initializer_range=fields.number("initializer_range", INITIALIZER_RANGE),
    )


def _bert(fields: Fields, family: str) -> EncoderConfig:
    """BERT and RoBERTa."""
    fields.refuse("is_decoder", "a decoder made of an encoder is")
    fields.expect(position_embedding_type="absolute")
    rows = fields.integer("max_position_embeddings")
    # RoBERTa counts positions from the padding index + 1; the rows of its table below that are not used.
    padding = fields.raw["pad_token_id"] if family == "roberta" else -1
    if type(padding) is not int or not -1 <= padding < rows - 1:
        raise InputError(f"{fields.path}: pad_token_id is {padding!r}: it must be a position, below {rows - 1}")
    return EncoderConfig(
        **_encoder_settings(fields, family, "classifier_dropout"),
        max_position_embeddings=rows - (padding + 1),
        type_vocab_size=fields.integer("type_vocab_size"),
        first_position=padding + 1,
    )


def _deberta(fields: Fields) -> EncoderConfig:
    fields.expect(**DEBERTA_V3)
    kinds = fields.raw["pos_att_type"]
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or sorted(map(str, kinds)) != ["c2p", "p2c"]:
        raise InputError(f"{fields.path}: pos_att_type is {kinds!r}, but only c2p|p2c is implemented")
    settings = _encoder_settings(fields, "deberta-v2", "cls_dropout")
    for key in ("embedding_size", "pooler_hidden_size"):
        fields.expect(**{key: fields.raw.get(key) and settings["hidden_size"]})
    is_default = fields.raw.get("max_relative_positions", -1) == -1
    furthest = fields.integer("max_position_embeddings" if is_default else "max_relative_positions")
    buckets = fields.integer("position_buckets")
    if not 1 <= buckets // 2 < furthest - 1:
        raise InputError(f"{fields.path}: {buckets} position_buckets do not fit {furthest} positions: download again")
    return EncoderConfig(
        **settings,
        position_buckets=buckets,
        max_relative_positions=furthest,
        pooler_dropout=fields.dropout("pooler_dropout"),
    )


def _encoder_settings(fields: Fields, family: str, classifier_dropout: str) -> dict:
    """What all encoders have."""
    d, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    _check_heads(fields, d, heads)
    hidden_dropout = fields.dropout("hidden_dropout_prob")
    return {
        "family": family,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": d,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "activation": fields.activation("hidden_act", PLAIN),
        "layer_norm_eps": fields.number("layer_norm_eps"),
        "hidden_dropout": hidden_dropout,
        "attention_dropout": fields.dropout("attention_probs_dropout_prob"),
        "classifier_dropout": fields.dropout(classifier_dropout, hidden_dropout),
        "initializer_range": fields.number("initializer_range", INITIALIZER_RANGE),
    }


def _check_heads(fields: Fields, hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        shape = f"a hidden size of {hidden_size} and {heads} heads"
        raise InputError(f"{fields.path}: {shape} do not fit together: download it again")
