# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Mixtral and DeepSeek-MoE: LLaMA's blocks with a mixture of experts in place of the MLP.

For each token, a router chooses the few experts with the highest probabilities. The output is the sum of these experts'
outputs, weighted by the probabilities. The router is always frozen: no method adapts or trains it.

Mixtral: arXiv 2401.04088. DeepSeek-MoE: arXiv 2401.06066. DeepSeek-MoE has many small experts, some shared experts that
all tokens use, and an ordinary MLP in its first block.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Attend, Decoder, pick
from .llama import MLP, Attention, Backbone, Block, LlamaConfig, RMSNorm, swiglu

__all__ = "Mixture MixtureConfig Router balance deepseek keep_router_outputs load_balance mixtral routers_of".split()


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(LlamaConfig):
    """LLaMA's configuration and the experts'. `intermediate_size` is for ordinary MLPs, which only DeepSeek-MoE has."""

    num_experts: int  # E
    num_experts_per_tok: int  # K
    expert_size: int  # an expert's intermediate_size
    shared_size: int  # intermediate_size of the shared experts, taken as one MLP; 0: no shared experts
    norm_topk_prob: bool  # whether the K probabilities of a token are divided by their sum
    has_experts: tuple[bool, ...]  # per layer


class Router(nn.Module):
    """Chooses the experts. It is always frozen, and not an nn.Linear, so that nothing adapts or quantises it."""

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size), requires_grad=False)
        self.top_k = config.num_experts_per_tok
        self.is_watched = False
        self.outputs = None  # of the last forward pass with `is_watched`

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (N, d) to probabilities (N, E), float32, and the indices (N, K) of the chosen experts."""
        with torch.autocast(rows.device.type, enabled=False):  # --method full uses autocast, which would round
            probabilities = F.linear(rows.float(), self.weight.float()).softmax(-1)
        chosen = probabilities.topk(self.top_k, sorted=False).indices
        if self.is_watched:
            self.outputs = probabilities, chosen
        return probabilities, chosen


class Mixture(nn.Module):
    """Σ_k p_k expert_k(x) over the K experts that the router chooses for x, plus shared_experts(x)."""

    can_compile = False  # 0 and 1 tokens for an expert each recompile it: half a minute for 5 tiny experts

    def __init__(self, config: MixtureConfig, experts: list[nn.Module], shared_experts: nn.Module | None = None):
        super().__init__()
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = Router(config)
        self.experts = nn.ModuleList(experts)
        self.shared_experts = shared_experts

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d) to (..., d)."""
        rows = x.flatten(0, -2)  # (N, d)
        probabilities, chosen = self.gate(rows)
        weights = probabilities.gather(1, chosen)  # (N, K)
        if self.norm_topk_prob:
            weights = weights / weights.sum(1, keepdim=True)
        y = self.routed(rows, chosen, weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    def routed(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sums (N, d) of the chosen experts' outputs, added in float32.

        rows: tokens (N, d); chosen and weights (N, K): each token's experts and their weights. The N·K pairs of token
        and expert are sorted by expert, so that each expert computes all of its tokens at once.
        """
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        counts = choices(chosen, len(self.experts)).tolist()  # waits for the GPU, once per layer
        parts = zip(self.experts, rows[token].split(counts), strict=True)
        # With autograd, an expert without tokens computes an empty batch. Its A and B then get zero gradients, and the
        # set of tensors that the ranks sum and that Adam has moments for does not depend on the data.
        outputs = torch.cat([expert(part) for expert, part in parts if len(part) or torch.is_grad_enabled()])
        outputs = outputs * weights.flatten()[order, None]  # float32
        return torch.zeros_like(rows, dtype=outputs.dtype).index_add(0, token, outputs).to(rows.dtype)


def choices(chosen: Tensor, experts: int) -> Tensor:
    """Return how often each expert occurs in `chosen`, (experts,). On a GPU, unlike bincount, without a wait."""
    chosen = chosen.flatten()
    return chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))


class MixtralExpert(nn.Module):
    """w2(silu(w1(x)) · w3(x)): LLaMA's MLP with other names."""

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.expert_size, bias=False)
        self.w2 = nn.Linear(config.expert_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.expert_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class MixtralBlock(nn.Module):
    """LLaMA's block with a mixture in place of the MLP, which has the name `block_sparse_moe`."""

    def __init__(self, config: MixtureConfig, index: int):
        super().__init__()
        d, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_offset
        self.input_layernorm = RMSNorm(d, eps, offset)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(d, eps, offset)
        self.block_sparse_moe = Mixture(config, [MixtralExpert(config) for _ in range(config.num_experts)])

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        x = pick(x, wanted) + self.self_attn(self.input_layernorm(x), rotary, attend, wanted)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class DeepseekBlock(Block):
    def __init__(self, config: MixtureConfig, index: int):
        super().__init__(config, index)
        if config.has_experts[index]:
            experts = [MLP(replace(config, intermediate_size=config.expert_size)) for _ in range(config.num_experts)]
            shared = MLP(replace(config, intermediate_size=config.shared_size)) if config.shared_size else None
            self.mlp = Mixture(config, experts, shared)


class MixtureBackbone(Backbone):
    """LLaMA's backbone. With `watches_routers`, its routers keep their outputs in forward passes with gradients.

    The teacher's passes, and blocks that gradient checkpointing recomputes in the backward pass, leave no outputs.
    """

    watches_routers = False

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        routers = routers_of(self) if self.watches_routers and torch.is_grad_enabled() else []
        try:
            for router in routers:
                router.is_watched = True
            return super().forward(input_ids, positions, attend, wanted)
        finally:
            for router in routers:
                router.is_watched = False


def mixtral(config: MixtureConfig, num_labels: int | None = None) -> Decoder:
    return Decoder(config, MixtureBackbone(config, MixtralBlock), "model", num_labels)


def deepseek(config: MixtureConfig, num_labels: int | None = None) -> Decoder:
    return Decoder(config, MixtureBackbone(config, DeepseekBlock), "model", num_labels)


def routers_of(model: nn.Module) -> list[Router]:
    """Return all routers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, Router)]


def keep_router_outputs(model: nn.Module) -> None:
    """Make each router keep its outputs of the last forward pass with gradients, for `load_balance`."""
    for module in model.modules():
        if isinstance(module, MixtureBackbone):
            module.watches_routers = True


def load_balance(model: nn.Module) -> Tensor:
    """Return `balance` (a scalar) of all routers' outputs in the last forward pass, and delete these outputs.

    The tokens are those that each router saw. In `Decoder.packed`, tokens that rows share count once, and the last
    layer's router sees only the wanted tokens. Raises ValueError if a router has no outputs.
    """
    routers = routers_of(model)
    outputs = [router.outputs for router in routers]
    if not outputs or None in outputs:
        raise ValueError("no router outputs are kept: call keep_router_outputs once, then the model with gradients on")
    for router in routers:
        router.outputs = None
    return balance(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Return E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961, equations 4 to 6), as Mixtral's code computes it.

    probabilities (N, E) and chosen (N, K): the routers' outputs for the tokens of all layers together. f_e is the mean
    number of a token's K choices that are expert e; P_e is the mean probability of expert e. Perfect balance gives K. f
    has no gradient and the router is frozen, so the gradient moves only the router's input.

    DeepSeek-MoE's expert-level loss (arXiv 2401.06066, equations 12 to 14) is Σ_e f_e P_e E/K, separately for each
    layer and sequence; perfect balance gives 1. Here both families use Mixtral's form, because rows that share their
    first tokens are not separate sequences.
    """
    tokens, experts = probabilities.shape
    f = choices(chosen, experts) / tokens
    return experts * (f * probabilities.mean(0)).sum()  # autocast would round a product of vectors
