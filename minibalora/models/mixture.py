# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Mixtral and DeepSeek-MoE: LLaMA's blocks with a mixture of experts for an MLP.

A router gives each token to the few experts that it thinks best, and the token gets their outputs, weighted by the
router's probabilities. The router is frozen: it is not adapted, and not trained in full either.

Mixtral: arXiv 2401.04088. DeepSeek-MoE: 2401.06066; its experts are many and small, some are shared by all tokens, and
its first block has an ordinary MLP.
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
    """intermediate_size is that of an ordinary MLP; only DeepSeek-MoE has one."""

    num_experts: int  # E
    num_experts_per_tok: int  # K
    expert_size: int  # an expert's intermediate_size
    shared_size: int  # that of what all tokens go through besides; 0: there is no such thing
    norm_topk_prob: bool  # whether the K probabilities of a token are made to sum to 1
    has_experts: tuple[bool, ...]  # a layer each


class Router(nn.Module):
    """Not an nn.Linear, so that nothing takes it for one to adapt or to quantise; not trained by --method full."""

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size), requires_grad=False)
        self.top_k = config.num_experts_per_tok
        self.is_watched = False
        self.given = None  # what it gave in the last forward pass in which it was watched

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, d) -> probabilities (N, E), in float32, and the experts (N, K) that are chosen."""
        with torch.autocast(rows.device.type, enabled=False):  # of --method full, which would round them
            probabilities = F.linear(rows.float(), self.weight.float()).softmax(-1)
        chosen = probabilities.topk(self.top_k, sorted=False).indices
        if self.is_watched:
            self.given = probabilities, chosen
        return probabilities, chosen


class Mixture(nn.Module):
    """Σ_k p_k expert_k(x) over the K experts that the router chooses for x, and what is shared."""

    can_compile = False  # an expert with no token or with one would compile it anew: half a minute for 5 tiny ones

    def __init__(self, config: MixtureConfig, experts: list[nn.Module], shared_experts: nn.Module | None = None):
        super().__init__()
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = Router(config)
        self.experts = nn.ModuleList(experts)
        self.shared_experts = shared_experts

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)"""
        rows = x.flatten(0, -2)  # (N, d)
        probabilities, chosen = self.gate(rows)
        weights = probabilities.gather(1, chosen)  # (N, K)
        if self.norm_topk_prob:
            weights = weights / weights.sum(1, keepdim=True)
        y = self.routed(rows, chosen, weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    def routed(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tokens (N, d), their experts and those experts' weights (N, K) -> (N, d); summed in float32.

        Pairs of token and expert are sorted by expert once, so that an expert computes once, on its own rows.
        """
        order = chosen.flatten().argsort(stable=True)  # of the N·K pairs
        token = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()  # waits for a GPU once a layer
        parts = zip(self.experts, rows[token].split(counts), strict=True)
        # With autograd an expert without a token computes on none: its A and B get a gradient, of zeros, so that what
        # the ranks sum and Adam keeps does not depend on the data.
        found = torch.cat([expert(own) for expert, own in parts if len(own) or torch.is_grad_enabled()])
        found = found * weights.flatten()[order, None]  # float32
        return torch.zeros_like(rows, dtype=found.dtype).index_add(0, token, found).to(rows.dtype)


class MixtralExpert(nn.Module):
    """w2(silu(w1(x)) · w3(x)): an MLP by other names."""

    def __init__(self, config: MixtureConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.expert_size, bias=False)
        self.w2 = nn.Linear(config.expert_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.expert_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class MixtralBlock(nn.Module):
    """llama.py's, but for the name of its MLP."""

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
    """llama.py's, which lets its routers keep what they give while it runs with gradient.

    So the teacher's pass does not count, nor a block that gradient checkpointing computes once more.
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
    return [module for module in model.modules() if isinstance(module, Router)]


def keep_router_outputs(model: nn.Module) -> None:
    """From now on each router keeps what it gave in the last forward pass with gradient, for `load_balance`."""
    for module in model.modules():
        if isinstance(module, MixtureBackbone):
            module.watches_routers = True


def load_balance(model: nn.Module) -> Tensor:
    """`balance` of what all routers gave in the last forward pass, a scalar. Afterwards they keep nothing of it.

    Tokens are those that a router sees: of `Decoder.packed` the last layer's router sees only those from which
    something is predicted, and what rows share counts once. Raises ValueError if a router has kept nothing since.
    """
    routers = routers_of(model)
    given = [router.given for router in routers]
    if not given or None in given:
        raise ValueError("no router has kept anything: call keep_router_outputs once, then the model with gradient")
    for router in routers:
        router.given = None
    return balance(*(torch.cat(parts) for parts in zip(*given, strict=True)))


def balance(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961, equations 4 to 6), as Mixtral's code has it.

    probabilities (N, E) and chosen (N, K) of the tokens of all layers together. f_e: how many of the K choices of a
    token fall on expert e; P_e: its probability; both are means over tokens, so that perfect balance gives K. f has no
    gradient, and the router is frozen: what can move is its input.

    DeepSeek-MoE's expert-level loss (arXiv 2401.06066, equations 12 to 14) is Σ_e f_e P_e E/K, of each layer and
    sequence by itself: the same product, 1 in perfect balance, which a layer or a sequence can't make up for another.
    Here both families take Mixtral's: rows that share their first tokens are no longer sequences by themselves.
    """
    tokens, experts = probabilities.shape
    f = chosen.flatten().bincount(minlength=experts) / tokens
    return experts * (f * probabilities.mean(0)).sum()  # autocast would round a product of vectors
