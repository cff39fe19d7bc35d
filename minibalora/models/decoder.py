"""Decoder-only transformers: LLaMA 2 and 3, Mistral and Gemma, which are one model with several settings, and GPT-2.

Pre-norm blocks of causal self-attention and an MLP; rotary positions and a gated MLP, or, in GPT-2, learned positions
and a plain one. On top is a language-model head or a classifier that reads the last token. Modules are named as in
Hugging Face checkpoints, so a checkpoint's tensor names are this file's attribute names.

LLaMA: arXiv 2302.13971, 2307.09288, 2407.21783. Mistral: arXiv 2310.06825. Gemma: arXiv 2403.08295. GPT-2: Radford et
al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# (layer, q, k, v, dropout) -> what each query found among the keys that it may see; shapes as in `attention`.
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


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
    max_position_embeddings: int  # tokens that it was trained to have in view, its context
    initializer_range: float  # standard deviation of a new head's weights


@dataclass(frozen=True)
class GPT2Config:
    """The names are DecoderConfig's, where both have the thing; config.json says n_embd, n_layer and the like."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int  # positions are learned, so there is no token beyond
    layer_norm_eps: float
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float
    tie_word_embeddings: bool
    initializer_range: float

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


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
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, d, bias=config.attention_bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None) -> Tensor:
        q, k, v = (
            projection(of).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for projection, of in ((self.q_proj, pick(x, wanted)), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = rotate(q, *(pick(table, wanted) for table in rotary)), rotate(k, *rotary)
        y = attend(self.index, q, k, v, 0.0)
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
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(_SwiGLU.apply(gate, up))
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class _SwiGLU(torch.autograd.Function):
    """silu(g) · u with silu(g) = g σ(g), keeping g and u alone: autograd would keep silu(g), too.

    d/dg silu(g) = σ(g) (1 + g (1 − σ(g))).
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(dy)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, d_up


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        d, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_offset
        self.input_layernorm = RMSNorm(d, eps, offset)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(d, eps, offset)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """(B, T, d) -> (B, T, d); of the tokens `wanted` only, where given: the others are seen, but do not look."""
        x = pick(x, wanted) + self.self_attn(self.input_layernorm(x), rotary, attend, wanted)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything below the head; a module of its own because checkpoints prefix its tensors with `model.`"""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """Ids (B, T) at positions (1 or B, T) -> states (B, T, d), of the tokens `wanted` only, where given."""
        x = self.embed_tokens(input_ids)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)  # rounded to x's dtype, as Gemma does
        rotary = rotary_table(positions, self.config, x.dtype)
        for layer in self.layers[:-1]:
            x = layer(x, rotary, attend)
        return self.norm(self.layers[-1](x, rotary, attend, wanted))


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.head_dim, self.index, self.dropout = config.head_dim, index, config.attention_dropout
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.resid_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, attend: Attend, wanted: Tensor | None) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for part in (pick(q, wanted), k, v)
        )
        y = attend(self.index, q, k, v, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(-2)))  # (B, T, d)


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = GPT2Attention(config, index)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        x = pick(x, wanted) + self.attn(self.ln_1(x), attend, wanted)
        return x + self.mlp(self.ln_2(x))


class GPT2Backbone(nn.Module):
    """GPT-2 below its head. Checkpoints prefix its tensors with `transformer.` and store its linears transposed."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embedding_dropout)
        self.h = nn.ModuleList(GPT2Block(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        for block in self.h[:-1]:
            x = block(x, attend)
        return self.ln_f(self.h[-1](x, attend, wanted))


class Decoder(nn.Module):
    """input_ids (B, T) -> logits: (B, T, V) of a language model, (B, num_labels) of a classifier."""

    def __init__(self, config: DecoderConfig | GPT2Config, num_labels: int | None = None):
        super().__init__()
        self.config, self.num_labels = config, num_labels
        if isinstance(config, GPT2Config):
            self.transformer = GPT2Backbone(config)
        else:
            self.model = Backbone(config)
        if num_labels is not None:
            self.score = nn.Linear(config.hidden_size, num_labels, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def backbone(self) -> Backbone | GPT2Backbone:
        return self.transformer if isinstance(self.config, GPT2Config) else self.model

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer.wte if isinstance(self.config, GPT2Config) else self.model.embed_tokens

    @property
    def head_weight(self) -> Tensor:
        """(V, d) of the language-model head, which has no bias."""
        return self.embedding.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits; a language model's at t predict token t + 1. The arguments are those of `hidden`."""
        if self.num_labels is None:
            return self.head(self.hidden(input_ids, attention_mask))
        return self.head(self.features(input_ids, attention_mask))

    def head(self, hidden: Tensor) -> Tensor:
        """(..., d) states after the final norm -> (..., V) or (..., num_labels) logits."""
        if self.num_labels is not None:
            return self.score(hidden.to(self.score.weight.dtype))
        return F.linear(hidden, self.embedding.weight) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: "KVCache | None" = None) -> Tensor:
        """States (B, T, d) after the final norm, before the head.

        attention_mask (B, T): 1 = real token, right padding only (ValueError otherwise). It changes nothing: a causal
        model never looks to the right, so real tokens never see the padding. Leave it out to save the check.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("attention_mask has a 0 before a 1: the decoder takes right padding only")
        window = None if isinstance(self.config, GPT2Config) else self.config.sliding_window
        positions, mask = positions_and_mask(input_ids, cache, window)
        _check_positions(input_ids.shape[1], self.config)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            if cache is not None:
                k, v = cache.extend(layer, k, v)
            return attention(q, k, v, mask, dropout)

        return self.backbone(input_ids, positions, attend)

    def packed(self, input_ids: Tensor, lengths: list[int], wanted: list[int], shared: int = 0) -> Tensor:
        """States (M, d) of the last wanted[i] tokens of each row i, as `hidden` has them, without a token of padding.

        input_ids (shared + Σ lengths,): the first `shared` tokens, with which every row begins, then what else each row
        has, end to end; wanted[i] <= lengths[i], M = Σ wanted. A row sees only itself and what is shared, which is
        computed once: causal states do not depend on what follows. Nothing that is not wanted is computed: after the
        last layer's keys and values, that is every other token.
        """
        _check_positions(shared + max(lengths), self.config)
        window = None if isinstance(self.config, GPT2Config) else self.config.sliding_window
        tokens, parts = torch.arange(len(input_ids), device=input_ids.device), [shared, *lengths]
        start, *own = tokens.split(parts)
        positions = torch.cat([start, *(span - span[0] + shared for span in own)])
        last = torch.cat([span[len(span) - count :] for span, count in zip(own, wanted, strict=True)])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            counts = parts if q.shape[2] == k.shape[2] else [0, *wanted]
            return packed_attention(q.split(counts, 2), k.split(parts, 2), v.split(parts, 2), window, dropout)

        return self.backbone(input_ids[None], positions[None], attend, last)[0]

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The state (B, d) of each row's last real token: the only one that has seen the whole row."""
        states = self.hidden(input_ids, attention_mask)
        if attention_mask is None:
            return states[:, -1]
        last = attention_mask.sum(1).clamp_min(1) - 1
        return states[torch.arange(len(states), device=states.device), last]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Queries (B, heads, T, head_dim) on keys and values (B, kv_heads, S, head_dim) -> (B, heads, T, head_dim).

    mask: True = visible, broadcast to (B, heads, T, S); None: a whole text causally, or one query on everything.
    """
    if q.shape[2] == 1:
        # The queries that share a key stand in for positions, so that no key is copied: at 8 rows, 32 heads on 8 and
        # 600 tokens 6 ms a layer on one core; with repeated keys 112 ms, with SDPA's enable_gqa 10 ms.
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, dropout_p=dropout).reshape(q.shape)
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)


def packed_attention(
    q: tuple[Tensor, ...], k: tuple[Tensor, ...], v: tuple[Tensor, ...], window: int | None, dropout: float
) -> Tensor:
    """Each row's queries on its own keys: first the part that rows share, then a part (1, heads, T_i, head_dim) a row.

    -> (1, heads, Σ T_i, head_dim). A call a row, each causal and without a mask, takes Σ T_i² where one call with a
    block-diagonal mask takes (Σ T_i)²: of 4 rows of 230 tokens a quarter. Queries are a row's last where they are fewer
    than its keys, and then no queries are shared.
    """
    shared, found = q[0].shape[2], []
    for own in zip(q[1:], k[1:], v[1:], strict=True):
        row = [torch.cat([first[0], part], dim=2) for first, part in zip((q, k, v), own, strict=True)]
        y = attention(*row, last_queries_mask(*row[:2], window), dropout)
        found.append(y if not found else y[:, :, shared:])
    return torch.cat([y.transpose(1, 2) for y in found], dim=1).transpose(1, 2)


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """The tokens `wanted` (M,) of (..., T, d), all of them if None."""
    return x if wanted is None else x[..., wanted, :]


def last_queries_mask(q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """What the last q.shape[2] of k.shape[2] tokens may see, as `attention` takes it."""
    count, length = q.shape[2], k.shape[2]
    if count == length and (window is None or length <= window):
        return None
    positions = torch.arange(length, device=q.device)[None]
    return visible(positions[:, length - count :], positions, window)


def _check_positions(length: int, config: "DecoderConfig | GPT2Config") -> None:
    """GPT-2's positions are learned: beyond the last there is nothing, where rotary ones go on."""
    if isinstance(config, GPT2Config) and length > config.max_position_embeddings:
        raise ValueError(f"{length} tokens do not fit: the model has {config.max_position_embeddings} positions")


def positions_and_mask(input_ids: Tensor, cache: "KVCache | None", window: int | None) -> tuple[Tensor, Tensor | None]:
    """Positions (1, T) or (B, 1) of the tokens given, and which keys each may see, as `attention` takes it."""
    length = input_ids.shape[1]
    if cache is not None and cache.filled > 0:
        return cache.next_token(window)
    if cache is not None:
        cache.filled = length
    positions = torch.arange(length, device=input_ids.device)[None]
    # None is SDPA's own causal mask, its fast path.
    return positions, None if window is None or length <= window else visible(positions, positions, window)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys at positions (B, S) the queries at positions (B, T) may see: (B, 1, T, S), True = visible."""
    queries, keys = queries[:, None, :, None], keys[:, None, None, :]
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)


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
    """Keys and values of the tokens so far, in memory that is taken once, filled from the left and never moved.

    The prompts, padded on the right, fill the first slots; then every row's next token goes to the next slot. So a
    short prompt has padding between itself and its continuation. Positions are counted without it, and it is nowhere
    visible: a row sees what it would see alone.
    """

    def __init__(
        self,
        config: DecoderConfig | GPT2Config,
        lengths: list[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """lengths: tokens of each prompt; capacity: slots, the longest prompt plus what will be generated."""
        self.filled = 0  # slots; a number of Python's, so that no step waits for the GPU to say it
        self.is_padded = min(lengths) < max(lengths)
        shape = (config.num_hidden_layers, len(lengths), config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        width, limit, slots = max(lengths), config.max_position_embeddings, torch.arange(capacity)
        own = torch.tensor(lengths)[:, None]
        positions = torch.where(slots < width, slots, slots - (width - own))
        # A row at its last position has ended, but computes along with those that have not.
        positions = positions.clamp(max=limit - 1).masked_fill((own <= slots) & (slots < width), limit)
        self.positions = positions.to(device)  # (B, capacity), of each slot; padding is behind every query

    def next_token(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Take a slot for one more token a row: its positions (B, 1), and which slots it may see."""
        self.filled += 1
        positions = self.positions[:, self.filled - 1 : self.filled]
        if not self.is_padded and (window is None or self.filled <= window):
            return positions, None
        return positions, visible(positions, self.positions[:, : self.filled], window)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, kv_heads, T, head_dim) into the last T slots taken; the layer's filled part, a view."""
        new = slice(self.filled - k.shape[2], self.filled)
        self.keys[layer, :, :, new], self.values[layer, :, :, new] = k, v
        return self.keys[layer, :, :, : self.filled], self.values[layer, :, :, : self.filled]
