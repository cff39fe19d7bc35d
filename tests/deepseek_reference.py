"""An independent reference for DeepSeek-MoE, in float64 and token by token; it shares no code with the package.

It follows the paper (arXiv 2401.06066, equations 3 to 11). Attention, norms and tensor names are LLaMA's, and the
router has a softmax and a greedy choice, as in the model's published description.
"""

import math

import torch
from torch import Tensor


def logits(tensors: dict[str, Tensor], config: dict, ids: list[int]) -> Tensor:
    """Return the logits (T, V) of one text; tensors and config are the contents of the checkpoint's files."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    states = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        prefix, eps = f"model.layers.{layer}.", config["rms_norm_eps"]
        block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        y = attention([rms_norm(u, block["input_layernorm.weight"], eps) for u in states], block, config)
        states = [u + y_t for u, y_t in zip(states, y, strict=True)]
        normed = [rms_norm(u, block["post_attention_layernorm.weight"], eps) for u in states]
        mlp = mixture if is_mixture(layer, config) else dense
        states = [u + mlp(x, block, config) for u, x in zip(states, normed, strict=True)]
    final = [rms_norm(u, weights["model.norm.weight"], config["rms_norm_eps"]) for u in states]
    return torch.stack([weights["lm_head.weight"] @ u for u in final])


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a checkpoint, by name."""
    d, size = config["hidden_size"], config["moe_intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    result = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    result["lm_head.weight"] = (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        rows = {"self_attn.q_proj": d, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": d}
        block = {f"{name}.weight": (count, d) for name, count in rows.items()}
        block |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        mlps = {"mlp": config["intermediate_size"]}
        if is_mixture(layer, config):
            block["mlp.gate.weight"] = (config["n_routed_experts"], d)
            mlps = {f"mlp.experts.{i}": size for i in range(config["n_routed_experts"])}
            if config["n_shared_experts"]:
                mlps["mlp.shared_experts"] = size * config["n_shared_experts"]
        for name, width in mlps.items():
            block |= {f"{name}.gate_proj.weight": (width, d), f"{name}.up_proj.weight": (width, d)}
            block[f"{name}.down_proj.weight"] = (d, width)
        result |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return result


def is_mixture(layer: int, config: dict) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def rms_norm(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * u / math.sqrt(sum(float(number) ** 2 for number in u) / len(u) + eps)


def attention(inputs: list[Tensor], block: dict[str, Tensor], config: dict) -> list[Tensor]:
    """Return the outputs of causal self-attention with rotary positions; groups of queries share a key."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    queries, keys, values = (
        [(block[f"self_attn.{name}_proj.weight"] @ x).view(-1, size) for x in inputs] for name in "qkv"
    )
    outputs = []
    for t, query in enumerate(queries):
        heads_of_t = []
        for head in range(heads):
            group = head * kv_heads // heads
            q = rotated(query[head], t, config["rope_theta"])
            past = [rotated(keys[s][group], s, config["rope_theta"]) for s in range(t + 1)]
            scores = [math.exp(float(q @ k) / math.sqrt(size)) for k in past]
            heads_of_t.append(sum(score * values[s][group] for s, score in enumerate(scores)) / sum(scores))
        outputs.append(block["self_attn.o_proj.weight"] @ torch.cat(heads_of_t))
    return outputs


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate x: the complex numbers x_i + j x_{i + size/2} are turned by the angles position · theta^(−2i/size)."""
    half = len(x) // 2
    y = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def dense(x: Tensor, block: dict[str, Tensor], config: dict, prefix: str = "mlp") -> Tensor:
    gate, up = block[f"{prefix}.gate_proj.weight"] @ x, block[f"{prefix}.up_proj.weight"] @ x
    return block[f"{prefix}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def mixture(x: Tensor, block: dict[str, Tensor], config: dict) -> Tensor:
    """Return the sum of the shared experts and the K_r experts with the highest affinity s_i (equation 9)."""
    affinities = [math.exp(float(centroid @ x)) for centroid in block["mlp.gate.weight"]]
    affinities = [affinity / sum(affinities) for affinity in affinities]
    best = sorted(range(len(affinities)), key=lambda i: -affinities[i])[: config["num_experts_per_tok"]]
    is_normalised = config["norm_topk_prob"] and len(best) > 1  # as in the published code
    total = sum(affinities[i] for i in best) if is_normalised else 1.0
    y = dense(x, block, config, "mlp.shared_experts") if config["n_shared_experts"] else torch.zeros_like(x)
    for i in best:
        y = y + affinities[i] / total * dense(x, block, config, f"mlp.experts.{i}")
    return y
