# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""T5, T5 v1.1 and Flan-T5: an encoder reads the prompt, and a decoder that attends to its states writes the answer.

Pre-norm blocks without biases. Attention scores are not scaled; a learned bias for the distance of the two tokens is
added. On top is a language-model head or a classifier. Attribute names are the tensor names of Hugging Face
checkpoints.

T5: arXiv 1910.10683. v1.1's gated MLP: arXiv 2002.05202. Flan-T5: arXiv 2210.11416.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import add_filled, cut_padding, last_states, put, to_device
from .encoder import RobertaHead, key_mask, split_heads
from .llama import RMSNorm

__all__ = ["AsText", "T5", "T5Classifier", "T5Config", "t5"]

# (layer, q, k, v, dropout) -> attention outputs (B, heads, T, head_dim), shaped as q; k and v None: read a cache.
Attend = Callable[[int, Tensor, Tensor | None, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class T5Config:
    """Sizes and settings, named as in `DecoderConfig`, else as in config.json, which has d_model, d_kv and d_ff."""

    vocab_size: int
    hidden_size: int  # d
    intermediate_size: int
    num_layers: int  # of the encoder
    num_decoder_layers: int
    num_attention_heads: int
    head_dim: int  # num_attention_heads · head_dim may differ from d
    relative_attention_num_buckets: int
    relative_attention_max_distance: int  # all distances from here on share a bucket
    layer_norm_epsilon: float
    is_gated: bool  # True: v1.1's gated MLP; False: a plain MLP with ReLU
    dropout_rate: float
    classifier_dropout: float
    decoder_start_token_id: int
    tie_word_embeddings: bool  # True for v1.0, which divides the states by √d before the head
    initializer_range: float  # standard deviation of a new head's weights

    max_position_embeddings = None  # relative positions set no limit
    logit_cap = None

    @property
    def num_hidden_layers(self) -> int:
        return self.num_layers + self.num_decoder_layers


class Attention(nn.Module):
    can_compile = False  # every new row length would recompile it

    def __init__(self, config: T5Config, index: int, has_relative_bias: bool):
        super().__init__()
        d, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.head_dim, self.index, self.dropout = config.head_dim, index, config.dropout_rate
        self.q, self.k, self.v = (nn.Linear(d, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, d, bias=False)
        if has_relative_bias:
            shape = config.relative_attention_num_buckets, config.num_attention_heads
            self.relative_attention_bias = nn.Embedding(*shape)

    def forward(self, x: Tensor, memory: Tensor | None, attend: Attend) -> Tensor:
        """Let x (B, T, d) attend to memory (B, S, d); None: `attend` has its keys and values. Returns (B, T, d)."""
        q, k, v = (
            None if states is None else split_heads(projection(states), self.head_dim)  # (B, heads, T or S, head_dim)
            for projection, states in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        y = attend(self.index, q, k, v, self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """The MLP: wo(relu(wi(x))), or gated wo(gelu(wi_0(x)) · wi_1(x))."""

    def __init__(self, config: T5Config):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.is_gated = config.is_gated
        if self.is_gated:
            self.wi_0, self.wi_1 = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        else:
            self.wi = nn.Linear(d, f, bias=False)
        self.wo = nn.Linear(f, d, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.is_gated else F.relu(self.wi(x))
        return self.wo(self.dropout(y))


class Block(nn.Module):
    """x + f(norm(x)), where f is the self-attention, then a decoder's attention to the encoder, then the MLP."""

    def __init__(self, config: T5Config, index: int, is_decoder: bool):
        super().__init__()
        parts = {"SelfAttention": Attention(config, index, has_relative_bias=index == 0)}
        if is_decoder:
            parts["EncDecAttention"] = Attention(config, index, has_relative_bias=False)
        parts["DenseReluDense"] = FeedForward(config)
        self.layer = nn.ModuleList()
        for name, part in parts.items():
            norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, 0.0)
            self.layer.append(nn.ModuleDict({name: part, "layer_norm": norm}))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, attend: Attend, memory: Tensor | None = None, cross: Attend | None = None) -> Tensor:
        """Map x (B, T, d) to (B, T, d). memory (B, S, d): the encoder's states; None if `cross` has them in a cache."""
        self_attention, *cross_attention, mlp = self.layer
        y = self_attention["layer_norm"](x)
        x = x + self.dropout(self_attention["SelfAttention"](y, y, attend))
        for layer in cross_attention:
            x = x + self.dropout(layer["EncDecAttention"](layer["layer_norm"](x), memory, cross))
        return x + self.dropout(mlp["DenseReluDense"](mlp["layer_norm"](x)))


class Stack(nn.Module):
    """The encoder or the decoder, without the embedding."""

    def __init__(self, config: T5Config, layers: int, is_decoder: bool):
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        self.block = nn.ModuleList(Block(config, index, is_decoder) for index in range(layers))
        self.final_layer_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, 0.0)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, attend: Attend, memory: Tensor | None = None, cross: Attend | None = None) -> Tensor:
        """Map embeddings (B, T, d) to states (B, T, d); memory and cross as in `Block`."""
        x = self.dropout(x)
        for block in self.block:
            x = block(x, attend, memory, cross)
        return self.dropout(self.final_layer_norm(x))

    def bias(self, length: int, first: int = 0) -> Tensor:
        """Return the bias (1, heads, length − first, length) of the scores of queries first to length − 1.

        It is learned for each distance; in a decoder it is −inf for later keys. The first block has it for all blocks.
        """
        learned = self.block[0].layer[0]["SelfAttention"].relative_attention_bias
        positions = torch.arange(length, device=learned.weight.device)
        distance = positions - positions[first:, None]
        sizes = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        bias = learned(bucket(distance, not self.is_decoder, *sizes)).permute(2, 0, 1)[None]
        return bias.masked_fill(distance > 0, -torch.inf) if self.is_decoder else bias


def bucket(distance: Tensor, is_bidirectional: bool, buckets: int, furthest: int) -> Tensor:
    """Map distances (key's position − query's position) to buckets 0 to buckets − 1.

    Near distances have a bucket each; further ones are on a log scale that ends at `furthest`. If bidirectional, each
    direction has half of the buckets; else all keys to the right are in bucket 0. The float32 operations have the
    original's order, because rounding decides at the boundaries.
    """
    start = torch.zeros_like(distance)
    if is_bidirectional:
        buckets //= 2
        start = buckets * (distance > 0)
    distance = distance.abs() if is_bidirectional else (-distance).clamp_min(0)
    exact = buckets // 2
    far = torch.log(distance.clamp_min(exact).float() / exact) / math.log(furthest / exact) * (buckets - exact)
    return start + torch.where(distance < exact, distance, (exact + far.long()).clamp_max(buckets - 1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attend with unscaled scores. mask: added to the scores, or True = visible; broadcast to (B, heads, T, S)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)


def with_mask(mask: Tensor | None) -> Attend:
    """Return an `Attend` that uses this mask in every layer."""
    return lambda layer, q, k, v, dropout: attention(q, k, v, mask, dropout)


def row_by_row(queries: list[int], keys: list[int], bias: Tensor | None) -> Attend:
    """Return an `Attend` for rows laid end to end, with these numbers of queries and keys; it has no padding."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        rows = zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
        masks = (None if bias is None else bias[..., :count, :count] for count in queries)
        return torch.cat([attention(*row, mask, dropout) for row, mask in zip(rows, masks, strict=True)], dim=2)

    return attend


class Backbone(nn.Module):
    """Everything below a head: embedding, encoder and decoder."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config, config.num_layers, is_decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, is_decoder=True)

    @property
    def stacks(self) -> list[nn.ModuleList]:
        return [self.encoder.block, self.decoder.block]

    def states(self, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor) -> Tensor:
        """Return the decoder's states (B, T', d) at decoder_input_ids (B, T'), with input_ids (B, T) for the encoder.

        attention_mask (B, T): 1 = real token in input_ids. Padding on the right of decoder_input_ids needs no mask, as
        no token sees later tokens. Raises ValueError for a mask that `check_mask` refuses.
        """
        visible = key_mask(attention_mask, input_ids)
        memory = self.encode(input_ids, visible)
        attend = with_mask(self.decoder.bias(decoder_input_ids.shape[1]))
        return self.decoder(self.shared(decoder_input_ids), attend, memory, with_mask(visible))

    def encode(self, input_ids: Tensor, visible: Tensor | None) -> Tensor:
        """Return the encoder's states (B, T, d) of input_ids (B, T); visible (B, 1, 1, T): True = real token."""
        bias = self.encoder.bias(input_ids.shape[1])
        bias = bias if visible is None else bias.masked_fill(~visible, -torch.inf)
        return self.encoder(self.shared(input_ids), with_mask(bias))


class T5(Backbone):
    """Language model: input_ids (B, T) of prompts and decoder_input_ids (B, T') -> logits (B, T', V).

    v1.0 has a tied head and divides the states by √d before it. Here the states that methods return are already
    divided, so that logits = states · head_weightᵀ in all versions.
    """

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.num_labels = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def embedding(self) -> nn.Embedding:
        return self.shared

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, d) of the language-model head, which has no bias."""
        return self.shared.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor) -> Tensor:
        """Return logits; those at position t predict the token after decoder_input_ids[t]. Arguments as in `hidden`."""
        return self.head(self.hidden(input_ids, attention_mask, decoder_input_ids))

    def head(self, hidden: Tensor) -> Tensor:
        """Map states (..., d) from `hidden`, `packed` or `decode` to logits (..., V)."""
        return F.linear(hidden, self.shared.weight) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor) -> Tensor:
        """Return the states (B, T', d) for the head. Arguments as in `Backbone.states`."""
        return self._scaled(self.states(input_ids, attention_mask, decoder_input_ids))

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the decoder's first state (B, d), which predicts an answer's first token; attention_mask as above."""
        start = torch.full_like(input_ids[:, :1], self.config.decoder_start_token_id)
        return self.hidden(input_ids, attention_mask, start)[:, 0]

    def packed(self, input_ids: Tensor, lengths: list[int], wanted: list[int], shared: int = 0) -> Tensor:
        """Return the states (M, d) that predict the tokens after the last wanted[i] tokens of each row i, M = Σ wanted.

        Nothing is padded. Arguments as in `Decoder.packed`. In each row, the encoder reads the prompt, which ends with
        the first wanted token. The decoder reads its start token and the other wanted tokens. The encoder computes the
        shared tokens again for each row, because its states depend on later tokens.
        """
        common, *rows = input_ids.split([shared, *lengths])
        prompts, answers = [], []
        for row, count in zip(rows, wanted, strict=True):
            prompt, answer = row.tensor_split([len(row) - max(count - 1, 0)])
            prompts.append(torch.cat([common, prompt]))
            answers.append(F.pad(answer, (1, 0), value=self.config.decoder_start_token_id)[:count])  # none if count = 0
        prompt_lengths = [len(prompt) for prompt in prompts]
        attend = row_by_row(prompt_lengths, prompt_lengths, self.encoder.bias(max(prompt_lengths)))
        memory = self.encoder(self.shared(torch.cat(prompts))[None], attend)
        attend = row_by_row(wanted, wanted, self.decoder.bias(max(wanted)))
        x = self.shared(torch.cat(answers))[None]
        return self._scaled(self.decoder(x, attend, memory, row_by_row(wanted, prompt_lengths, None)))[0]

    def prefill(self, input_ids: Tensor, lengths: list[int], room: int) -> "tuple[Cache, Tensor]":
        """Compute the prompts (B, T), which are padded on the right.

        Returns a cache with room for `room` tokens of each answer, and the states (B, d) that predict the first one.
        Raises ValueError if lengths and input_ids do not fit together.
        """
        input_ids = cut_padding(input_ids, lengths)
        visible = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        visible = to_device(visible[:, None, None], input_ids.device)
        cache = Cache(self.config, visible, room, self.shared.weight.dtype)
        start = torch.full_like(input_ids[:, 0], self.config.decoder_start_token_id)
        return cache, self.decode(start, cache, self.encode(input_ids, visible))

    def decode(self, tokens: Tensor, cache: "Cache", memory: Tensor | None = None) -> Tensor:
        """Compute one more token (B,) of each row. Returns the states (B, d) that predict the next one.

        memory: the encoder's states, in the first step only; later steps read their keys and values from the cache.
        Raises ValueError if the cache is full.
        """
        cache.filled = add_filled(cache.filled, 1, cache.keys.shape[3])
        bias = self.decoder.bias(cache.filled, first=cache.filled - 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            return attention(q, *cache.extend(layer, k, v), bias, dropout)

        def cross(layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, dropout: float) -> Tensor:
            if k is not None:
                cache.memory.append((k, v))
            return attention(q, *cache.memory[layer], cache.visible, dropout)

        return self._scaled(self.decoder(self.shared(tokens)[:, None], attend, memory, cross))[:, 0]

    def _scaled(self, states: Tensor) -> Tensor:
        return states * self.config.hidden_size**-0.5 if self.config.tie_word_embeddings else states


class Cache:
    """Keys and values of the answers so far, in memory that is allocated once, and of the encoded prompts."""

    def __init__(self, config: T5Config, visible: Tensor, capacity: int, dtype: torch.dtype):
        """visible (B, 1, 1, T): True = token of a prompt; capacity: tokens of an answer, with the start token."""
        shape = (config.num_decoder_layers, len(visible), config.num_attention_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=visible.device)
        self.values = torch.empty_like(self.keys)
        self.filled, self.visible = 0, visible
        self.memory: list[tuple[Tensor, Tensor]] = []  # per layer: keys and values (B, heads, T, head_dim)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, heads, 1, head_dim) into the last filled slot. Returns views of all filled slots."""
        return put(self.keys[layer], k, self.filled), put(self.values[layer], v, self.filled)


class AsText(nn.Module):
    """A T5 language model with the interface of a classifier: input_ids (B, T) -> logits (B, D).

    The logits are the language model's for the first token of the answer, restricted to the D classes' tokens. There is
    no new head. Adapt, train and save `t5`; in this wrapper, the names of its tensors begin with "t5.".
    """

    def __init__(self, t5: T5, tokens: list[int]):
        """tokens: the first token of each class's answer."""
        super().__init__()
        self.config, self.num_labels = t5.config, len(tokens)
        self.t5, self.own_head = t5, []
        self.register_buffer("tokens", torch.tensor(tokens, device=t5.head_weight.device), persistent=False)

    @property
    def stacks(self) -> list[nn.ModuleList]:
        return self.t5.stacks

    @property
    def checkpoint(self) -> object:
        """The checkpoint that `t5` was loaded from, or None."""
        return getattr(self.t5, "checkpoint", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits. attention_mask (B, T): 1 = real token, right padding only."""
        return self.head(self.features(input_ids, attention_mask))

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the decoder's first state (B, d), see `T5.features`."""
        return self.t5.features(input_ids, attention_mask)

    def head(self, features: Tensor) -> Tensor:
        return F.linear(features, self.t5.head_weight[self.tokens])


class T5Classifier(nn.Module):
    """input_ids (B, T) -> logits (B, num_labels), as transformers' T5ForSequenceClassification.

    Encoder and decoder both read the text; the decoder reads its start token first. The head (dense, tanh, linear)
    reads the decoder's state at the text's EOS, which is the last token: T5's tokenizer ends every text with EOS.
    """

    def __init__(self, config: T5Config, num_labels: int):
        super().__init__()
        self.config, self.num_labels = config, num_labels
        self.transformer = Backbone(config)
        self.classification_head = RobertaHead(config, num_labels)  # T5's head has the same layers

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer.shared

    @property
    def stacks(self) -> list[nn.ModuleList]:
        return self.transformer.stacks

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits. attention_mask (B, T): 1 = real token, right padding only."""
        return self.head(self.features(input_ids, attention_mask))

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the decoder's state (B, d) at each row's last real token, which is its EOS.

        The decoder's input is shifted by one, so at this position it has read all tokens before the EOS.
        """
        shifted = F.pad(input_ids[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        states = self.transformer.states(input_ids, attention_mask, shifted)
        return last_states(states, None if attention_mask is None else attention_mask.long().sum(1))

    def head(self, features: Tensor) -> Tensor:
        return self.classification_head(features)


def t5(config: T5Config, num_labels: int | None = None) -> T5 | T5Classifier:
    return T5(config) if num_labels is None else T5Classifier(config, num_labels)
