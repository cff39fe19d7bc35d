# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""What every causal language model shares: a head on a backbone, attention, rows without padding, a cache.

A backbone is one family's blocks (`llama.py`, `gpt2.py`, `mixture.py`): a module that takes ids, their positions and a
function `attend`, by which a layer's queries find what they may see, and gives the states after the final norm. So the
blocks know nothing of padding, packing or caches, and this file nothing of blocks.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = "Attend Decoder DecoderConfig KVCache attention last_states pick put visible".split()

# (layer, q, k, v, dropout) -> what each query found among the keys that it may see; shapes as in `attention`.
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


class DecoderConfig(Protocol):
    """What this file must know of a family's configuration. Names are config.json's, where it has them."""

    vocab_size: int
    hidden_size: int  # d
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # fewer than attention heads: grouped-query attention
    head_dim: int
    max_position_embeddings: int  # tokens that it was trained to have in view, its context
    has_learned_positions: bool  # then there is no token beyond the context, where rotary positions go on
    windows: tuple[int | None, ...]  # a layer each: a token sees itself and the window − 1 before it; None: all before
    attention_cap: float | None  # scores and logits z become cap · tanh(z / cap); None: as they are
    logit_cap: float | None
    tie_word_embeddings: bool
    initializer_range: float  # standard deviation of a new head's weights


class Decoder(nn.Module):
    """input_ids (B, T) -> logits: (B, T, V) of a language model, (B, num_labels) of a classifier."""

    def __init__(self, config: DecoderConfig, backbone: nn.Module, prefix: str, num_labels: int | None = None):
        """backbone: (ids (B, T), positions (1 or B, T), attend, wanted) -> states, with an `embedding` and `blocks`;
        prefix: its name in checkpoints."""
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
        """The backbone's blocks, in one list."""
        return [self.backbone.blocks]

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
        logits = F.linear(hidden, self.embedding.weight) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return logits if self.config.logit_cap is None else capped(logits, self.config.logit_cap)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: "KVCache | None" = None) -> Tensor:
        """States (B, T, d) after the final norm, before the head.

        attention_mask (B, T): 1 = real token, right padding only (ValueError otherwise). It changes nothing: a causal
        model never looks to the right, so real tokens never see the padding. Leave it out to save the check.
        """
        check_right_padding(attention_mask)
        windows, length = self.config.windows, input_ids.shape[1]
        _check_positions(length, self.config)
        positions = torch.arange(length, device=input_ids.device)[None] if cache is None else cache.take(length)
        masks = {window: what_is_seen(positions, cache, window) for window in set(windows)}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            if cache is not None:
                k, v = cache.extend(layer, k, v)
            return attention(q, k, v, masks[windows[layer]], dropout, self.config.attention_cap)

        return self.backbone(input_ids, positions, attend)

    def packed(self, input_ids: Tensor, lengths: list[int], wanted: list[int], shared: int = 0) -> Tensor:
        """States (M, d) of the last wanted[i] tokens of each row i, as `hidden` has them, without a token of padding.

        input_ids (shared + Σ lengths,): the first `shared` tokens, with which every row begins, then what else each row
        has, end to end; wanted[i] <= lengths[i], M = Σ wanted. A row sees only itself and what is shared, which is
        computed once: causal states do not depend on what follows. Nothing that is not wanted is computed: after the
        last layer's keys and values, that is every other token.
        """
        _check_positions(shared + max(lengths), self.config)
        tokens, parts = torch.arange(len(input_ids), device=input_ids.device), [shared, *lengths]
        start, *own = tokens.split(parts)
        positions = torch.cat([start, *(span - span[0] + shared for span in own)])
        last = torch.cat([span[len(span) - count :] for span, count in zip(own, wanted, strict=True)])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            counts = parts if q.shape[2] == k.shape[2] else [0, *wanted]
            each = q.split(counts, 2), k.split(parts, 2), v.split(parts, 2)
            return packed_attention(*each, self.config.windows[layer], dropout, self.config.attention_cap)

        return self.backbone(input_ids[None], positions[None], attend, last)[0]

    def prefill(self, input_ids: Tensor, lengths: list[int], room: int) -> "tuple[KVCache, Tensor]":
        """A cache with prompts (B, T), padded on the right, and room for so many tokens more of each; the states (B, d)
        that predict the first of them."""
        weight = self.embedding.weight
        cache = KVCache(self.config, lengths, max(lengths) + room, weight.dtype, weight.device)
        return cache, last_states(self.hidden(input_ids, cache=cache), torch.tensor(lengths))

    def decode(self, tokens: Tensor, cache: "KVCache") -> Tensor:
        """One more token (B,) of each row -> the states (B, d) that predict the next."""
        return self.hidden(tokens[:, None], cache=cache)[:, 0]

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The state (B, d) of each row's last real token: the only one that has seen the whole row."""
        lengths = None if attention_mask is None else attention_mask.sum(1)
        return last_states(self.hidden(input_ids, attention_mask), lengths)


def check_right_padding(attention_mask: Tensor | None) -> None:
    """ValueError if a row of (B, T), 1 = real token, has padding before a token. None: nothing is padded."""
    if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("attention_mask has a 0 before a 1: the model takes right padding only")


def last_states(states: Tensor, lengths: Tensor | None) -> Tensor:
    """The state (B, d) of the last real token of rows (B, T, d), padded on the right; lengths (B,), None: all real."""
    if lengths is None:
        return states[:, -1]
    return states[torch.arange(len(states), device=lengths.device), lengths.clamp_min(1) - 1]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, cap: float | None = None
) -> Tensor:
    """Queries (B, heads, T, head_dim) on keys and values (B, kv_heads, S, head_dim) -> (B, heads, T, head_dim).

    mask: True = visible, broadcast to (B, heads, T, S); None: a whole text causally, or one query on everything.
    """
    if cap is not None:
        return capped_attention(q, k, v, mask, dropout, cap)
    if q.shape[2] == 1:
        # The queries that share a key stand in for positions, so that no key is copied: at 8 rows, 32 heads on 8 and
        # 600 tokens 6 ms a layer on one core; with repeated keys 112 ms, with SDPA's enable_gqa 10 ms.
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, dropout_p=dropout).reshape(q.shape)
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, cap: float) -> Tensor:
    """`attention` with capped scores (Gemma 2, arXiv 2408.00118, section 2), which SDPA does not have."""
    B, heads, T, head_dim = q.shape
    grouped = q.reshape(B, k.shape[1], -1, T, head_dim)  # the queries that share a key, next to each other
    scores = capped((grouped @ k[:, :, None].mT).float() * head_dim**-0.5, cap)  # (B, kv_heads, group, T, S)
    if mask is None:
        positions = torch.arange(k.shape[2], device=q.device)[None]
        mask = visible(positions[:, -T:], positions, None)
    shares = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).to(v.dtype)
    return (F.dropout(shares, dropout) @ v[:, :, None]).reshape(q.shape)


def capped(x: Tensor, cap: float) -> Tensor:
    """Within ±cap, and x where it is small."""
    return cap * torch.tanh(x / cap)


def packed_attention(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: tuple[Tensor, ...],
    window: int | None,
    dropout: float,
    cap: float | None = None,
) -> Tensor:
    """Each row's queries on its own keys: first the part that rows share, then a part (1, heads, T_i, head_dim) a row.

    -> (1, heads, Σ T_i, head_dim). Queries are a row's last where they are fewer than its keys, and then no queries are
    shared. A call a row, each causal and without a mask: forward and backward took 47 ms on one CPU core for 4 rows of
    150 to 430 tokens and 8 heads of 64, against 144 for one call with a block-diagonal mask and 102 for padded rows.
    """
    shared, found = q[0].shape[2], []
    for own in zip(q[1:], k[1:], v[1:], strict=True):
        row = [torch.cat([first[0], part], dim=2) for first, part in zip((q, k, v), own, strict=True)]
        y = attention(*row, last_queries_mask(*row[:2], window), dropout, cap)
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


def _check_positions(length: int, config: DecoderConfig) -> None:
    if config.has_learned_positions and length > config.max_position_embeddings:
        raise ValueError(f"{length} tokens do not fit: the model has {config.max_position_embeddings} positions")


def what_is_seen(positions: Tensor, cache: "KVCache | None", window: int | None) -> Tensor | None:
    """Which keys the tokens at these positions (1 or B, T) may see, themselves included, as `attention` takes it."""
    length = positions.shape[1]
    if cache is not None and cache.filled > length:
        return cache.seen_by(positions, window)
    # None is SDPA's own causal mask, its fast path.
    return None if window is None or length <= window else visible(positions, positions, window)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys at positions (B, S) the queries at positions (B, T) may see: (B, 1, T, S), True = visible."""
    queries, keys = queries[:, None, :, None], keys[:, None, None, :]
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)


class KVCache:
    """Keys and values of the tokens so far, in memory that is taken once, filled from the left and never moved.

    The prompts, padded on the right, fill the first slots; then every row's next token goes to the next slot. So a
    short prompt has padding between itself and its continuation. Positions are counted without it, and it is nowhere
    visible: a row sees what it would see alone.
    """

    def __init__(
        self,
        config: DecoderConfig,
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

    def take(self, count: int) -> Tensor:
        """Take the next slots, first those of the prompts, then one for a token more a row: their positions."""
        self.filled += count
        if self.filled == count:
            return torch.arange(count, device=self.positions.device)[None]
        return self.positions[:, self.filled - count : self.filled]

    def seen_by(self, positions: Tensor, window: int | None) -> Tensor | None:
        """Which of the slots taken the rows' last tokens, at these positions (B, 1), may see."""
        if not self.is_padded and (window is None or self.filled <= window):
            return None
        return visible(positions, self.positions[:, : self.filled], window)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, kv_heads, T, head_dim) into the last T slots taken; the layer's filled part, a view."""
        return put(self.keys[layer], k, self.filled), put(self.values[layer], v, self.filled)


def put(slots: Tensor, new: Tensor, filled: int) -> Tensor:
    """Write `new` (B, heads, T, head_dim) at the end of the `filled` first slots (B, heads, :, head_dim); a view."""
    slots[:, :, filled - new.shape[2] : filled] = new
    return slots[:, :, :filled]
