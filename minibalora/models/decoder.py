# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The parts that all causal language models share: the head, attention, packed rows without padding, and the KV cache.

A backbone is the module with one family's blocks (`llama.py`, `gpt2.py`, `mixture.py`). It takes token ids, their
positions and a function `attend`, and returns the states after the final norm. Every layer calls `attend` to let its
queries attend to the visible keys. The blocks therefore need no code for padding, packing or caches, and this file
needs no code for blocks.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = "Attend Decoder DecoderConfig KVCache attention last_states pick put to_device visible".split()

# (layer, q, k, v, dropout) -> the attention output of each query over its visible keys; shapes as in `attention`.
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class DecoderConfig(Protocol):
    """The fields that this file reads of a family's configuration. Names follow config.json where it has the field."""

    vocab_size: int
    hidden_size: int  # d
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than attention heads: grouped-query attention
    head_dim: int
    max_position_embeddings: int  # the context length, in tokens
    has_learned_positions: bool  # a limit on the length of a text; rotary positions continue beyond the context
    windows: tuple[int | None, ...]  # per layer: a token sees itself and window − 1 tokens before it; None: all before
    attention_cap: float | None  # scores and logits z become cap · tanh(z / cap); None: no cap
    logit_cap: float | None
    tie_word_embeddings: bool
    initializer_range: float  # standard deviation of a new head's weights


class Decoder(nn.Module):
    """A backbone with a head: input_ids (B, T) -> logits (B, T, V), or (B, num_labels) of a classifier."""

    def __init__(self, config: DecoderConfig, backbone: nn.Module, prefix: str, num_labels: int | None = None):
        """Put a head on a backbone.

        backbone: (ids (B, T), positions (1 or B, T), attend, wanted) -> states; it has `embedding` and `blocks`.
        prefix: the backbone's name in checkpoints.
        """
        super().__init__()
        self.config, self.prefix, self.num_labels = config, prefix, num_labels
        self.add_module(prefix, backbone)
        if num_labels is not None:
            self.score = nn.Linear(config.hidden_size, num_labels, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.prefix)

    @property
    def embedding(self) -> nn.Embedding:
        return self.backbone.embedding

    @property
    def stacks(self) -> list[nn.ModuleList]:
        """The model's lists of blocks: one."""
        return [self.backbone.blocks]

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, d) of the language-model head, which has no bias."""
        return self.embedding.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits; those of a language model at position t predict token t + 1. Arguments as in `hidden`."""
        if self.num_labels is None:
            return self.head(self.hidden(input_ids, attention_mask))
        return self.head(self.features(input_ids, attention_mask))

    def head(self, hidden: Tensor) -> Tensor:
        """Map states (..., d) after the final norm to logits (..., V) or (..., num_labels)."""
        if self.num_labels is not None:
            return self.score(hidden.to(self.score.weight.dtype))
        logits = F.linear(hidden, self.embedding.weight) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return logits if self.config.logit_cap is None else capped(logits, self.config.logit_cap)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: "KVCache | None" = None) -> Tensor:
        """Return the states (B, T, d) between the final norm and the head.

        attention_mask (B, T): 1 = real token. The mask is only checked and may be left out: in a causal model, real
        tokens never see padding on their right. Raises ValueError for a mask that `check_mask` refuses, and if learned
        positions or the cache have no room for T tokens.
        """
        check_mask(attention_mask, input_ids)
        windows, length = self.config.windows, input_ids.shape[1]
        _check_positions(length, self.config)
        positions = torch.arange(length, device=input_ids.device)[None] if cache is None else cache.take(length)
        masks = {window: causal_mask(positions, cache, window) for window in set(windows)}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            if cache is not None:
                k, v = cache.extend(layer, k, v)
            return attention(q, k, v, masks[windows[layer]], dropout, self.config.attention_cap)

        return self.backbone(input_ids, positions, attend)

    def packed(self, input_ids: Tensor, lengths: list[int], wanted: list[int], shared: int = 0) -> Tensor:
        """Return the states (M, d) of the last wanted[i] tokens of each row i, computed without padding.

        The states equal those of `hidden` on each row alone. input_ids (shared + Σ lengths,) holds the `shared` tokens
        that all rows begin with, then the other lengths[i] tokens of each row, end to end; wanted[i] <= lengths[i],
        M = Σ wanted. A row sees only itself and the shared tokens. The shared tokens are computed once, because causal
        states do not depend on later tokens. The last layer computes keys and values for all tokens, and everything
        else only for the wanted ones.
        """
        _check_positions(shared + max(lengths), self.config)
        tokens, parts = torch.arange(len(input_ids), device=input_ids.device), [shared, *lengths]
        start, *rows = tokens.split(parts)
        positions = torch.cat([start, *(row - row[0] + shared for row in rows)])
        last = torch.cat([row[len(row) - count :] for row, count in zip(rows, wanted, strict=True)])
        keys = [shared + length for length in lengths]
        first = [keys[0], *lengths[1:]]  # the queries of the shared tokens go with the first row
        starts = [row_starts(counts, input_ids.device) for counts in (first, wanted, keys)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            is_last, window, cap = q.shape[2] < k.shape[2], self.config.windows[layer], self.config.attention_cap
            if can_use_varlen(q, dropout, cap):
                longest = max(wanted if is_last else first), max(keys)
                if shared:
                    k, v = (with_shared(t.split(parts, 2)) for t in (k, v))
                return varlen_attention(q, k, v, (starts[is_last], starts[2]), longest, window)
            counts = [0, *wanted] if is_last else parts
            return packed_attention(q.split(counts, 2), k.split(parts, 2), v.split(parts, 2), window, dropout, cap)

        return self.backbone(input_ids[None], positions[None], attend, last)[0]

    def prefill(self, input_ids: Tensor, lengths: list[int], room: int) -> "tuple[KVCache, Tensor]":
        """Compute the prompts (B, T), which are padded on the right.

        Returns a cache with room for `room` more tokens in each row, and the states (B, d) that predict the first one.
        Raises ValueError if lengths and input_ids do not fit together.
        """
        input_ids, weight = cut_padding(input_ids, lengths), self.embedding.weight
        cache = KVCache(self.config, lengths, max(lengths) + room, weight.dtype, weight.device)
        return cache, last_states(self.hidden(input_ids, cache=cache), torch.tensor(lengths))

    def decode(self, tokens: Tensor, cache: "KVCache") -> Tensor:
        """Compute one more token (B,) of each row. Returns the states (B, d) that predict the next one.

        Raises ValueError if the cache is full.
        """
        return self.hidden(tokens[:, None], cache=cache)[:, 0]

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the state (B, d) of each row's last real token, the only token that has seen the whole row."""
        lengths = None if attention_mask is None else attention_mask.long().sum(1)
        return last_states(self.hidden(input_ids, attention_mask), lengths)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, cap: float | None = None
) -> Tensor:
    """Let queries (B, heads, T, head_dim) attend to keys and values (B, kv_heads, S, head_dim).

    mask: True = visible, broadcast to (B, heads, T, S). None: causal if T = S; everything is visible if T = 1.
    Returns (B, heads, T, head_dim).
    """
    if cap is not None:
        return capped_attention(q, k, v, mask, dropout, cap)
    if q.shape[2] == 1:
        # Treat the queries that share a key as positions, so that no key is copied. Time of a layer on one core for 8
        # rows, 32 heads, 8 kv_heads, 600 tokens: 6 ms; with repeated keys 112 ms; with SDPA's enable_gqa 10 ms.
        grouped = q.squeeze(2).unflatten(1, (k.shape[1], -1))  # (B, kv_heads, group, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, dropout_p=dropout).reshape(q.shape)
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, cap: float) -> Tensor:
    """Compute `attention` with capped scores (Gemma 2, arXiv 2408.00118, section 2), which SDPA does not support."""
    T, head_dim = q.shape[2:]
    grouped = q.unflatten(1, (k.shape[1], -1))  # queries that share a key are in one group
    scores = capped((grouped @ k[:, :, None].mT).float() * head_dim**-0.5, cap)  # (B, kv_heads, group, T, S)
    if mask is None:
        positions = torch.arange(k.shape[2], device=q.device)[None]
        mask = visible(positions[:, -T:], positions, None)
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(v.dtype)
    return (F.dropout(weights, dropout) @ v[:, :, None]).reshape(q.shape)


def capped(x: Tensor, cap: float) -> Tensor:
    """Limit x smoothly to ±cap: cap · tanh(x / cap), which is close to x if |x| is small."""
    return cap * torch.tanh(x / cap)


def packed_attention(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    window: int | None,
    dropout: float,
    cap: float | None = None,
) -> Tensor:
    """Let each row's queries attend to the keys of the same row.

    Each tuple has the part that all rows share, then one part (1, heads, T_i, head_dim) for each row. A row may have
    queries for its last tokens only; the shared part then has no queries.
    Returns (1, heads, Σ T_i, head_dim).

    There is one causal call for each row. Forward and backward took 47 ms on one CPU core for 4 rows of 150 to 430
    tokens and 8 heads of 64; one call with a block-diagonal mask took 144 ms, padded rows took 102 ms.
    """
    shared, outputs = q[0].shape[2], []
    for parts in zip(q[1:], k[1:], v[1:], strict=True):
        row = [torch.cat([whole[0], part], dim=2) for whole, part in zip((q, k, v), parts, strict=True)]
        y = attention(*row, last_queries_mask(*row[:2], window), dropout, cap)
        outputs.append(y if not outputs else y[:, :, shared:])
    return torch.cat([y.transpose(1, 2) for y in outputs], dim=1).transpose(1, 2)


def can_use_varlen(q: Tensor, dropout: float, cap: float | None) -> bool:
    """Whether torch's varlen_attn, which is flash attention, computes these queries on their GPU."""
    has_kernel = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and has_varlen()
    fits = not dropout and cap is None and q.shape[3] % 8 == 0 and q.shape[3] <= 192  # wider: no gradient on some GPUs
    return has_kernel and fits and torch.cuda.is_bf16_supported(including_emulation=False)  # flash needs Ampere, too


@cache
def has_varlen() -> bool:
    """Whether this torch has varlen_attn. Asked on a GPU only: importing it takes a second."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "enable_gqa" in signature(varlen_attn).parameters


def row_starts(counts: list[int], device: torch.device) -> Tensor:
    """Return where rows of these lengths start when laid end to end, and their end: (rows + 1,) int32."""
    return to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device)


def with_shared(parts: tuple[Tensor, ...]) -> Tensor:
    """Put the part that all rows share, which comes first, before the part (1, heads, T_i, head_dim) of each row."""
    shared, *rows = parts
    return torch.cat([part for row in rows for part in (shared, row)], dim=2)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int], window: int | None
) -> Tensor:
    """Compute `packed_attention` in one call, on a GPU. Rows are end to end in q, k and v (1, heads, T, head_dim).

    A row's keys begin with the shared tokens; its queries are its last tokens. starts: `row_starts` of queries and
    keys; longest: the most queries and keys of a row. Returns the shape of q.
    """
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None or longest[1] <= window else window - 1
    tokens = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))  # (T, heads, head_dim)
    is_grouped = q.shape[1] != k.shape[1]
    y = varlen_attn(*tokens, *starts, *longest, window_size=(left, 0), enable_gqa=is_grouped)
    return y.transpose(0, 1).unsqueeze(0)


def causal_mask(positions: Tensor, cache: "KVCache | None", window: int | None) -> Tensor | None:
    """Return the mask for `attention` that says which keys the tokens at `positions` (1 or B, T) see."""
    length = positions.shape[1]
    if cache is not None and cache.filled > length:
        return cache.mask_for(positions, window)
    # None selects SDPA's own causal mask, which is its fast path.
    return None if window is None or length <= window else visible(positions, positions, window)


def last_queries_mask(q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """Return the mask for `attention` of the queries q of a row's last tokens and the keys k of all its tokens."""
    count, length = q.shape[2], k.shape[2]
    if count == length and (window is None or length <= window):
        return None
    positions = torch.arange(length, device=q.device)[None]
    return visible(positions[:, length - count :], positions, window)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return the mask (B, 1, T, S), True = visible, of queries at positions (B, T) and keys at positions (B, S)."""
    queries, keys = queries[:, None, :, None], keys[:, None, None, :]
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor to a device; if it goes to a GPU, from pinned memory, so that the host does not wait."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_mask(attention_mask: Tensor | None, input_ids: Tensor) -> None:
    """Raise ValueError unless the mask is of the shape (B, T) of input_ids, and each row has ones, then zeros.

    1 = real token, 0 = padding, in any dtype; None: no padding. The host waits for a mask on a GPU, but not for a mask
    on the CPU, which all models here accept beside ids on a GPU. While torch compiles or exports, and for tensors
    without values (meta, fake), only the shape is checked.
    """
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(attention_mask.shape)}, input_ids is {list(input_ids.shape)}"
        raise ValueError(f"attention_mask is {shapes}: give both the same shape")
    is_fake = attention_mask.is_meta or type(attention_mask) is not Tensor  # the class of fake tensors is private
    if is_fake or torch.compiler.is_compiling():
        return
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask has other values than 1 (real token) and 0 (padding): it must not be additive")
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("attention_mask has a 0 before a 1: the model takes right padding only")
    if not attention_mask[:, :1].all():  # an additive mask without padding is all zeros
        raise ValueError("attention_mask has a row without a 1, which means a real token")


def check_setting(name: str, value: object, *allowed: object) -> None:
    """Raise ValueError unless a setting has an allowed value."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not implemented: there are {', '.join(map(repr, allowed))}")


def cut_padding(input_ids: Tensor, lengths: list[int]) -> Tensor:
    """Return input_ids (B, T) without the columns that have only padding; lengths: the number of tokens of each row.

    Raises ValueError unless there are B lengths, all from 1 to T.
    """
    rows, width = input_ids.shape
    if len(lengths) != rows or not 0 < min(lengths) <= max(lengths) <= width:
        raise ValueError(f"lengths are {lengths}, input_ids is {[rows, width]}: give a length from 1 to T for each row")
    return input_ids[:, : max(lengths)]


def _check_positions(length: int, config: DecoderConfig) -> None:
    if config.has_learned_positions and length > config.max_position_embeddings:
        raise ValueError(f"{length} tokens do not fit: the model has {config.max_position_embeddings} positions")


def last_states(states: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the state (B, d) of the last real token of each right-padded row (B, T, d).

    lengths (B,): the number of real tokens of each row, on any device; None: all tokens are real.
    """
    if lengths is None:
        return states[:, -1]
    rows, last = torch.arange(len(states), device=states.device), lengths.clamp_min(1) - 1
    return states[rows, to_device(last, states.device)]


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """Return the tokens with indices `wanted` (M,) of x (..., T, d), or all tokens if `wanted` is None."""
    return x if wanted is None else x[..., wanted, :]


class KVCache:
    """Keys and values of all tokens so far, in memory that is allocated once and filled from the left.

    The right-padded prompts fill the first slots; each further token of all rows fills one more slot. A short prompt
    therefore has padding between itself and its continuation. Positions do not count this padding, and no query sees
    it, so each row sees what it would see alone. Prompts and continuations may come in several parts.
    """

    def __init__(
        self,
        config: DecoderConfig,
        lengths: list[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Allocate memory for prompts of these lengths; capacity: slots for the longest prompt and a continuation."""
        self.filled = 0  # number of filled slots; a Python int, so that no step waits for the GPU
        self.is_padded = min(lengths) < max(lengths)
        shape = (config.num_hidden_layers, len(lengths), config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        width, slots, row_lengths = max(lengths), torch.arange(capacity), torch.tensor(lengths)[:, None]
        positions = torch.where(slots < width, slots, slots - (width - row_lengths))
        positions = positions.masked_fill((row_lengths <= slots) & (slots < width), capacity)
        self.positions = to_device(positions, device)  # (B, capacity); padding is at `capacity`, after every query
        self.last_position = config.max_position_embeddings - 1 if config.has_learned_positions else capacity

    def take(self, count: int) -> Tensor:
        """Reserve `count` more slots. Returns their positions (1 or B, count). Raises ValueError if there are fewer."""
        first, self.filled = self.filled, add_filled(self.filled, count, self.positions.shape[1])
        if first == 0:
            return torch.arange(count, device=self.positions.device)[None]
        # Clamp: a row that has reached the last learned position has ended, but its batch may go on.
        return self.positions[:, first : self.filled].clamp(max=self.last_position)

    def mask_for(self, positions: Tensor, window: int | None) -> Tensor | None:
        """Return the mask of the filled slots that the rows' last tokens, at these positions (B, T), see."""
        sees_all = not self.is_padded and (window is None or self.filled <= window)
        if sees_all and positions.shape[1] == 1:
            return None
        return visible(positions, self.positions[:, : self.filled], window)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, kv_heads, T, head_dim) into the last T reserved slots. Returns views of all filled ones."""
        return put(self.keys[layer], k, self.filled), put(self.values[layer], v, self.filled)


def add_filled(filled: int, count: int, capacity: int) -> int:
    """Return filled + count, the number of filled slots of a cache. Raises ValueError if that exceeds its capacity."""
    if filled + count > capacity:
        raise ValueError(f"the cache has room for {capacity} tokens, not for {filled + count}: make it larger")
    return filled + count


def put(slots: Tensor, new: Tensor, filled: int) -> Tensor:
    """Write `new` (B, heads, T, head_dim) at the end of the first `filled` slots. Returns a view of these slots."""
    slots[:, :, filled - new.shape[2] : filled] = new
    return slots[:, :, :filled]
