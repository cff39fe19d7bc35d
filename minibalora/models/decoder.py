"""A decoder-only transformer that is LLaMA 2 and 3, Mistral or Gemma, depending on its config.

Pre-norm blocks of causal self-attention with rotary positions and a gated MLP. Modules are named as in Hugging Face
checkpoints, so a checkpoint's tensor names are this file's attribute names and nothing has to be translated.

LLaMA: arXiv 2302.13971, 2307.09288, 2407.21783. Mistral: arXiv 2310.06825. Gemma: arXiv 2403.08295.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class DecoderConfig:
    """Field names are config.json's, where it has them."""

    vocab_size: int
    hidden_size: int  # d
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than attention heads: grouped-query attention
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # LLaMA 3.1's, see `rotary_frequencies`; None = plain RoPE
    sliding_window: int | None  # a token sees itself and the window − 1 before it; None = everything before it
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    activation: str  # "silu" or "gelu_tanh"
    norm_offset: float  # Gemma stores w and multiplies by 1 + w
    embedding_scale: float  # Gemma multiplies embeddings by √d


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · (offset + w), in float32."""

    def __init__(self, size: int, eps: float, offset: float):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], self.offset + self.weight.float(), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        d, self.head_dim, self.index = config.hidden_size, config.head_dim, index
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, d, bias=config.attention_bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: "KVCache | None") -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        k, v = (t.repeat_interleave(self.queries_per_key, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(-2))  # (B, T, d)


class MLP(nn.Module):
    """Gated: down(act(gate(x)) · up(x)); SwiGLU with silu, GeGLU with gelu (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        d, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_offset
        self.input_layernorm = RMSNorm(d, eps, offset)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(d, eps, offset)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: "KVCache | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything below the head; a module of its own because checkpoints prefix its tensors with `model.`"""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)


class Decoder(nn.Module):
    """input_ids (B, T) -> logits (B, T, V). Set `grad_checkpoint` to recompute each block in the backward pass."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.grad_checkpoint = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); those at t predict token t + 1. The arguments are those of `hidden`."""
        return self.head(self.hidden(input_ids, attention_mask))

    def head(self, hidden: Tensor) -> Tensor:
        """(..., d) states after the final norm -> (..., V) logits."""
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self.model.embed_tokens.weight if tied else self.lm_head.weight)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: "KVCache | None" = None) -> Tensor:
        """States (B, T, d) after the final norm, before the head.

        attention_mask (B, T): 1 = real token, right padding only (ValueError otherwise). It changes nothing: a causal
        model never looks to the right, so real tokens never see the padding. Leave it out to save the check.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask has a 0 before a 1: the decoder takes right padding only")
        if cache is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
            mask = causal_mask(positions, input_ids.shape[1], self.config.sliding_window)
        else:
            positions = cache.advance(input_ids.shape[1])  # (B, T)
            mask = cache_mask(positions, cache.capacity, self.config.sliding_window)

        x = self.model.embed_tokens(input_ids)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)  # rounded to x's dtype, as Gemma does
        rotary = rotary_table(positions, self.config, x.dtype)
        for layer in self.model.layers:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
        return self.model.norm(x)


def causal_mask(positions: Tensor, length: int, window: int | None) -> Tensor | None:
    """None (SDPA's own causal mask, its fast path) unless a window is shorter than the text; then (1, 1, T, T) bool."""
    return None if window is None or length <= window else cache_mask(positions, length, window)


def cache_mask(positions: Tensor, capacity: int, window: int | None) -> Tensor:
    """Which keys 0..capacity−1 the queries at `positions` (B, T) may see: (B, 1, T, capacity), True = visible."""
    keys = torch.arange(capacity, device=positions.device)
    queries = positions[:, None, :, None]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def rotary_frequencies(config: DecoderConfig, device: torch.device) -> Tensor:
    """θ_i = theta^(−2i/head_dim), (head_dim/2,) float32 (RoFormer, arXiv 2104.09864); LLaMA 3.1 slows the slow ones.

    LLaMA 3.1 (rope_type "llama3"): wavelengths beyond original_context/low_freq_factor are stretched by `factor`,
    those below original_context/high_freq_factor are kept, and between the two the frequency is interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency
    low, high = config.rope_scaling["low_freq_factor"], config.rope_scaling["high_freq_factor"]
    turns = config.rope_scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a short wave, untouched; 0: a long one, stretched
    return kept * frequency + (1 - kept) * frequency / config.rope_scaling["factor"]


def rotary_table(positions: Tensor, config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency, each (B, 1, T, head_dim) with the frequencies twice in a row."""
    angle = positions[:, None, :, None].float() * rotary_frequencies(config, positions.device)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim/2}) by its angle; x: (B, heads, T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far, allocated once; every row of the batch has its own length.

    Prompts are padded on the right. A row's next token is written over its first padding slot, so that its tokens are
    always contiguous and its positions are those it would have alone.
    """

    def __init__(self, config: DecoderConfig, lengths: Tensor, capacity: int, dtype: torch.dtype):
        """lengths (B,): tokens of each prompt; capacity: slots, the longest prompt plus what will be generated."""
        self.lengths, self.capacity, self.positions = lengths, capacity, None
        shape = (
            config.num_hidden_layers,
            len(lengths),
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=lengths.device)
        self.values = torch.zeros_like(self.keys)

    def advance(self, count: int) -> Tensor:
        """Positions (B, T) of the tokens about to be written: first the padded prompts, then one token at a time."""
        if self.positions is None:
            self.positions = torch.arange(count, device=self.lengths.device).expand(len(self.lengths), -1)
        else:
            self.positions = self.lengths[:, None]
            self.lengths = self.lengths + 1
        return self.positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, kv_heads, T, head_dim) at the current positions; return the layer's whole cache."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[layer][rows, :, self.positions] = k.transpose(1, 2)  # indexed as (B, T, kv_heads, head_dim)
        self.values[layer][rows, :, self.positions] = v.transpose(1, 2)
        return self.keys[layer], self.values[layer]
