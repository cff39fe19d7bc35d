"""config.json and tensor names of Mixtral and of DeepSeek-MoE, whose model_type is deepseek."""

from functools import partial

from minibalora.base.errors import InputError
from minibalora.checkpoints.config import Family, Fields
from minibalora.checkpoints.families.llama import LLAMA, NAMES, llama_settings, same_windows
from minibalora.models.mixture import MixtureConfig, deepseek, mixtral


def read_mixtral(fields: Fields) -> MixtureConfig:
    fields.refuse("router_jitter_noise", "noise in the router's input is")
    settings = mixture_settings(fields, "num_local_experts") | {"windows": same_windows(fields)}
    return MixtureConfig(
        **settings,
        expert_size=fields.integer("intermediate_size"),
        shared_size=0,
        norm_topk_prob=True,
        has_experts=(True,) * settings["num_hidden_layers"],
    )


def read_deepseek(fields: Fields) -> MixtureConfig:
    """Read the config of DeepSeek-MoE. aux_loss_alpha, seq_aux and pretraining_tp do not change the outputs."""
    fields.expect(scoring_func="softmax")
    settings = mixture_settings(fields, "n_routed_experts")
    first, every = fields.integer("first_k_dense_replace", least=0), fields.integer("moe_layer_freq")
    size, shared = fields.integer("moe_intermediate_size"), fields.integer("n_shared_experts", 0, least=0)
    is_normalised = fields.flag("norm_topk_prob") and settings["num_experts_per_tok"] > 1  # as in its own code
    return MixtureConfig(
        **settings,
        expert_size=size,
        shared_size=shared * size,
        norm_topk_prob=is_normalised,
        has_experts=tuple(n >= first and n % every == 0 for n in range(settings["num_hidden_layers"])),
    )


def mixture_settings(fields: Fields, experts: str) -> dict:
    """Return the settings that both have. experts: the key of the number of experts."""
    fields.expect(hidden_act="silu")
    count, chosen = fields.integer(experts), fields.integer("num_experts_per_tok")
    if chosen > count:
        raise InputError(f"{fields.path}: num_experts_per_tok is {chosen}, but {experts} is {count}: download it again")
    return llama_settings(fields) | {"num_experts": count, "num_experts_per_tok": chosen}


MIXTRAL = LLAMA | {
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
DEEPSEEK = LLAMA | {
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
family = partial(Family, names=NAMES)
FAMILIES = {
    "mixtral": family(read_mixtral, mixtral, transformers="Mixtral", defaults=MIXTRAL),
    "deepseek": family(read_deepseek, deepseek, transformers="Deepseek", defaults=DEEPSEEK),
}
