"""DeepSeek-MoE written down once more, in float64 and token by token, to compare ours with: it shares no code with it.

From the paper (arXiv 2401.06066, equations 3 to 11), for what it does not say from the model's published description:
LLaMA's attention and norms, routers of softmax and greedy choice, the tensor names.
"""

import math

import torch
from torch import Tensor


def logits(tensors: dict[str, Tensor], config: dict, ids: list[int]) -> Tensor:
    """(T, V) of one text; tensors and config are those of the checkpoint's files."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    states = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        eps = config["rms_norm_eps"]
        seen = attention([rms_norm(u, own["input_layernorm.weight"], eps) for u in states], own, config)
        states = [u + found for u, found in zip(states, seen, strict=True)]
        normed = [rms_norm(u, own["post_attention_layernorm.weight"], eps) for u in states]
        mlp = mixture if is_mixture(layer, config) else dense
        states = [u + mlp(x, own, config) for u, x in zip(states, normed, strict=True)]
    final = [rms_norm(u, weights["model.norm.weight"], config["rms_norm_eps"]) for u in states]
    return torch.stack([weights["lm_head.weight"] @ u for u in final])


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint."""
    d, size = config["hidden_size"], config["moe_intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    found["lm_head.weight"] = (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        rows = {"self_attn.q_proj": d, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": d}
        own = {f"{name}.weight": (count, d) for name, count in rows.items()}
        own |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        mlps = {"mlp": config["intermediate_size"]}
        if is_mixture(layer, config):
            own["mlp.gate.weight"] = (config["n_routed_experts"], d)
            mlps = {f"mlp.experts.{i}": size for i in range(config["n_routed_experts"])}
            if config["n_shared_experts"]:
                mlps["mlp.shared_experts"] = size * config["n_shared_experts"]
        for name, width in mlps.items():
            own |= {f"{name}.gate_proj.weight": (width, d), f"{name}.up_proj.weight": (width, d)}
            own[f"{name}.down_proj.weight"] = (d, width)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return found


def is_mixture(layer: int, config: dict) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def rms_norm(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * u / math.sqrt(sum(float(number) ** 2 for number in u) / len(u) + eps)


def attention(inputs: list[Tensor], own: dict[str, Tensor], config: dict) -> list[Tensor]:
    """Causal, with rotary positions; queries in groups that share a key."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    queries, keys, values = (
        [(own[f"self_attn.{name}_proj.weight"] @ x).view(-1, size) for x in inputs] for name in "qkv"
    )
    found = []
    for t, query in enumerate(queries):
        heard = []
        for head in range(heads):
            group = head * kv_heads // heads
            q = turned(query[head], t, config["rope_theta"])
            past = [turned(keys[s][group], s, config["rope_theta"]) for s in range(t + 1)]
            scores = [math.exp(float(q @ k) / math.sqrt(size)) for k in past]
            heard.append(sum(score * values[s][group] for s, score in enumerate(scores)) / sum(scores))
        found.append(own["self_attn.o_proj.weight"] @ torch.cat(heard))
    return found


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Numbers i and i + size/2 are the real and imaginary part of one that is turned by position · theta^(−2i/size)."""
    half = len(x) // 2
    y = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def dense(x: Tensor, own: dict[str, Tensor], config: dict, prefix: str = "mlp") -> Tensor:
    gate, up = own[f"{prefix}.gate_proj.weight"] @ x, own[f"{prefix}.up_proj.weight"] @ x
    return own[f"{prefix}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def mixture(x: Tensor, own: dict[str, Tensor], config: dict) -> Tensor:
    """Equation 9: what all tokens go through, and the K_r likeliest experts by their affinity s_i."""
    affinities = [math.exp(float(centroid @ x)) for centroid in own["mlp.gate.weight"]]
    affinities = [affinity / sum(affinities) for affinity in affinities]
    best = sorted(range(len(affinities)), key=lambda i: -affinities[i])[: config["num_experts_per_tok"]]
    is_normalised = config["norm_topk_prob"] and len(best) > 1  # as its published code has it
    total = sum(affinities[i] for i in best) if is_normalised else 1.0
    y = dense(x, own, config, "mlp.shared_experts") if config["n_shared_experts"] else torch.zeros_like(x)
    for i in best:
        y = y + affinities[i] / total * dense(x, own, config, f"mlp.experts.{i}")
    return y
