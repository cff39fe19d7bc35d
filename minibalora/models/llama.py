# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""LLaMA 1 to 3.3, Yi, Mistral, Gemma 1 and 2, Qwen 1.5 to 3: one model with several settings.

Pre-norm blocks with causal self-attention, rotary positions and a gated MLP. Attribute names are the tensor names of
Hugging Face checkpoints.

LLaMA: arXiv 2302.13971, 2307.09288, 2407.21783. Yi: 2403.04652. Mistral: 2310.06825. Gemma: 2403.08295,
2408.00118. Qwen: 2309.16609, 2407.10671, 2505.09388.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Attend, Decoder, check_setting, pick

__all__ = "MLP Attention Backbone Block LlamaConfig RMSNorm llama swiglu".split()


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and settings. Names follow config.json where it has the field; see `DecoderConfig` for its fields."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # see `rotary_frequencies`; None: plain RoPE
    windows: tuple[int | None, ...]
    qk_norm: bool  # True for Qwen 3: each head's queries and keys are normalised
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    activation: str  # "silu" or "gelu_tanh"
    norm_offset: float  # 1 for Gemma, which multiplies by 1 + w; else 0
    embedding_scale: float  # √d for Gemma; else 1
    max_position_embeddings: int
    initializer_range: float
    # Gemma 2
    has_post_norms: bool = False  # additional norms after attention and MLP
    query_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    attention_dropout: float = 0.0  # Granite Code: in training only

    has_learned_positions = False

    def __post_init__(self):
        check_setting("activation", self.activation, "silu", "gelu_tanh")
        check_setting("rope_type", rope_type(self.rope_scaling), "default", "linear", "llama3")


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · (offset + w), in float32 inside."""

    def __init__(self, size: int, eps: float, offset: float):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.offset == 0 and self.weight.dtype == x.dtype:  # torch computes in float32, on a GPU in one kernel
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], self.offset + self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    can_compile = False  # every new row length would recompile it

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        d, self.head_dim, self.index, self.query_scale = config.hidden_size, config.head_dim, index, config.query_scale
        self.dropout = config.attention_dropout
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, d, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps, config.norm_offset) for _ in "qk")
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None) -> Tensor:
        q, k, v = (
            projection(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for projection, tokens in ((self.q_proj, pick(x, wanted)), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *(pick(table, wanted) for table in rotary)), rotate(k, *rotary)
        y = attend(self.index, q if self.query_scale == 1 else q * self.query_scale, k, v, self.dropout * self.training)
        return self.o_proj(y.transpose(1, 2).flatten(-2))  # (B, T, d)


class MLP(nn.Module):
    """Gated: down(act(gate(x)) · up(x)); SwiGLU with silu, GeGLU with gelu (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(swiglu(gate, up))
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up (arXiv 2002.05202). All shapes are equal. Saves only gate and up for the backward pass."""
    return SwiGLU.apply(gate, up)


class SwiGLU(torch.autograd.Function):
    """silu(g) · u with silu(g) = g σ(g). Autograd would also save silu(g); this recomputes it in the backward pass.

    d/dg silu(g) = σ(g) (1 + g (1 − σ(g))).
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("swiglu can't be differentiated twice: write F.silu(gate) * up")
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(dy)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, d_up


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        d, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_offset
        self.input_layernorm = RMSNorm(d, eps, offset)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(d, eps, offset)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """Map x (B, T, d) to (B, T, d), or to (B, M, d) of the tokens `wanted` (M,). All tokens serve as keys."""
        x = pick(x, wanted) + self.self_attn(self.input_layernorm(x), rotary, attend, wanted)
        return x + self.mlp(self.post_attention_layernorm(x))


class Gemma2Block(nn.Module):
    """A block with norms before and after each half. Here `post_attention_layernorm` does come after the attention."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Attention(config, index)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rotary, attend, wanted)
        x = pick(x, wanted) + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Backbone(nn.Module):
    """Everything below the head: ids -> states after the final norm."""

    def __init__(self, config: LlamaConfig, block: Callable[[LlamaConfig, int], nn.Module]):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)

    @property
    def embedding(self) -> nn.Embedding:
        return self.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """Map ids (B, T) at positions (1 or B, T) to states (B, T, d), or (B, M, d) of the tokens `wanted` (M,)."""
        x = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)  # Gemma rounds the scale to x's dtype
        rotary = rotary_table(positions, self.config, x.dtype)
        for layer in self.layers[:-1]:
            x = layer(x, rotary, attend)
        return self.norm(self.layers[-1](x, rotary, attend, wanted))


def rope_type(scaling: dict | None) -> str:
    """Return the rope_type of config.json's rope_scaling. Without it and its old name `type`, the numbers say which."""
    scaling = scaling or {"rope_type": "default"}
    implied = "llama3" if "low_freq_factor" in scaling else "linear"
    return scaling.get("rope_type") or scaling.get("type") or implied


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Return θ_i = theta^(−2i/head_dim), (head_dim/2,) float32 (RoFormer, arXiv 2104.09864), scaled.

    rope_type "default" scales nothing; "linear" divides positions, and so frequencies, by `factor` (arXiv 2306.15595).
    LLaMA 3.1 (rope_type "llama3") divides a frequency by `factor` if its wavelength is longer than
    original_context/low_freq_factor, keeps it if the wavelength is shorter than original_context/high_freq_factor, and
    interpolates between the two.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequency, kind = 1.0 / config.rope_theta**exponent, rope_type(config.rope_scaling)
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / config.rope_scaling["factor"]
    low, high = config.rope_scaling["low_freq_factor"], config.rope_scaling["high_freq_factor"]
    turns = config.rope_scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a short wave, unchanged; 0: a long wave, stretched
    return share * frequency + (1 - share) * frequency / config.rope_scaling["factor"]


def rotary_table(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and ∓sin of position · frequency, each (B, 1, T, head_dim): the second half repeats the first, where
    the sine is negative."""
    angle = positions[:, None, :, None].float() * rotary_frequencies(config, positions.device)
    angle = torch.cat([-angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + head_dim/2}) of x (B, heads, T, head_dim) by its angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def llama(config: LlamaConfig, num_labels: int | None = None) -> Decoder:
    return Decoder(config, Backbone(config, Gemma2Block if config.has_post_norms else Block), "model", num_labels)
