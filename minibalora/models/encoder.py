# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Bidirectional transformers as classifiers: BERT, RoBERTa and DeBERTa-v2/v3.

All have post-norm blocks, x = LayerNorm(x + f(x)), with full self-attention and an MLP. BERT adds learned positions and
token types to the word embeddings. RoBERTa is a BERT whose positions start after the padding index. DeBERTa uses
relative positions, in the attention only. Attribute names are the tensor names of Hugging Face checkpoints; the heads
are those of transformers' ForSequenceClassification classes.

BERT: arXiv 1810.04805. RoBERTa: arXiv 1907.11692. DeBERTa: arXiv 2006.03654 (v2 and v3: 2111.09543).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import check_mask, check_setting, to_device

__all__ = "Bert EncoderClassifier EncoderConfig RobertaHead key_mask split_heads".split()


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and settings. Names follow config.json where it has the field."""

    vocab_size: int
    hidden_size: int  # d
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    activation: str  # of the MLP: "gelu", "gelu_tanh" or "relu"
    layer_norm_eps: float
    hidden_dropout: float
    attention_dropout: float
    classifier_dropout: float
    initializer_range: float  # standard deviation of a new head's weights
    pooler: str | None  # activation after the dense layer on [CLS]: "tanh" (BERT), "gelu" (DeBERTa); None: no pooler
    # BERT and RoBERTa
    max_position_embeddings: int | None = None  # longest text, in tokens; None: no limit
    type_vocab_size: int = 0
    first_position: int = 0  # RoBERTa: the padding index + 1
    # DeBERTa
    position_buckets: int = 0  # distances fall into 2 · position_buckets buckets; far distances share a bucket
    max_relative_positions: int = 0  # the distance at which the last bucket begins
    pooler_dropout: float = 0.0

    def __post_init__(self):
        check_setting("activation", self.activation, "gelu", "gelu_tanh", "relu")
        check_setting("pooler", self.pooler, "tanh", "gelu", None)


class Residual(nn.Module):
    """The end of both halves of a block: LayerNorm(x + dropout(y W + b))."""

    def __init__(self, config: EncoderConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class Layer(nn.Module):
    """One block; the families differ only in its `attention`."""

    def __init__(self, config: EncoderConfig, attention: nn.Module):
        super().__init__()
        self.attention = nn.ModuleDict({"self": attention, "output": Residual(config, config.hidden_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Residual(config, config.intermediate_size)
        self.activation = config.activation

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, *context), x)
        return self.output(activate(self.intermediate["dense"](x), self.activation), x)


def activate(x: Tensor, name: str) -> Tensor:
    return F.relu(x) if name == "relu" else F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def key_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Return the mask (B, 1, 1, T), True = visible, that lets every token see every real token; on input_ids' device.

    attention_mask (B, T): 1 = real token; best on the CPU. Raises ValueError for a mask that `check_mask` refuses.
    """
    check_mask(attention_mask, input_ids)
    return None if attention_mask is None else to_device(attention_mask, input_ids.device)[:, None, None, :].bool()


# BERT and RoBERTa


class SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        d = config.hidden_size
        self.head_dim, self.dropout = d // config.num_attention_heads, config.attention_dropout
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (split_heads(part(x), self.head_dim) for part in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).flatten(-2)  # (B, T, d)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshape x (..., T, d) to (..., heads, T, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        d, self.first_position = config.hidden_size, config.first_position
        self.word_embeddings = nn.Embedding(config.vocab_size, d)
        self.position_embeddings = nn.Embedding(config.first_position + config.max_position_embeddings, d)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, d)
        self.LayerNorm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor, token_types: Tensor | None) -> Tensor:
        length, limit = input_ids.shape[1], self.position_embeddings.num_embeddings - self.first_position
        if length > limit:
            raise ValueError(f"{length} tokens do not fit: the model has {limit} positions")
        positions = self.first_position + torch.arange(length, device=input_ids.device)
        types = torch.zeros_like(input_ids) if token_types is None else token_types
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions) + self.token_type_embeddings(types)
        return self.dropout(self.LayerNorm(x))


class Bert(nn.Module):
    """BERT or RoBERTa without a head: input_ids (B, T) -> states (B, T, d)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = [Layer(config, SelfAttention(config)) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        if config.pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder["layer"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None) -> Tensor:
        mask = key_mask(attention_mask, input_ids)
        x = self.embeddings(input_ids, token_types)
        for layer in self.blocks:
            x = layer(x, mask)
        return x


# DeBERTa


class DisentangledAttention(nn.Module):
    """softmax((Q Kᵀ + Q K_rᵀ + K Q_rᵀ) / √(3 head_dim)) V: attention to content and to relative positions.

    The terms are content to content, content to position and position to content (arXiv 2006.03654, equation 4). Q_r
    and K_r are projections of the embedding of the distance i − j. As in v3, they share the projections of Q and K.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        d = config.hidden_size
        self.head_dim, self.dropout = d // config.num_attention_heads, config.attention_dropout
        self.query_proj, self.key_proj, self.value_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.pos_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, mask: Tensor | None, relative: Tensor, which: Tensor) -> Tensor:
        """relative: embeddings (R, d) of the distances that occur; which (T, T): the row of `relative` for i − j."""
        q, k, v = (split_heads(part(x), self.head_dim) for part in (self.query_proj, self.key_proj, self.value_proj))
        relative = self.pos_dropout(relative)
        q_r, k_r = (split_heads(part(relative), self.head_dim) for part in (self.query_proj, self.key_proj))
        which = which.expand(*q.shape[:2], -1, -1)  # (B, heads, T, T)
        to_position = (q @ k_r.mT).gather(-1, which)  # (B, heads, T, R) -> (B, heads, i, j)
        from_position = (k @ q_r.mT).gather(-1, which.mT).mT  # (B, heads, j, i), transposed
        scale = (3 * self.head_dim) ** -0.5
        bias = scale * (to_position + from_position)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
        return y.transpose(1, 2).flatten(-2)  # (B, T, d)


def bucket(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Map distances to buckets: up to buckets/2 unchanged, then on a log scale that reaches `buckets` at `furthest`.

    The float32 operations have the original's order, because rounding decides at the boundaries.
    """
    middle = buckets // 2
    far = distance.abs().clamp_min(middle) / middle
    steps = torch.ceil(torch.log(far) / torch.log(torch.tensor((furthest - 1) / middle)) * (middle - 1))
    return torch.where(distance.abs() <= middle, distance, (steps.long() + middle) * distance.sign())


class DebertaEmbeddings(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids)))


class DebertaEncoder(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.buckets, self.furthest = config.position_buckets, config.max_relative_positions
        layers = [Layer(config, DisentangledAttention(config)) for _ in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList(layers)
        self.rel_embeddings = nn.Embedding(2 * config.position_buckets, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        relative, which = self.relative_embeddings(x.shape[1], x.device)
        for layer in self.layer:
            x = layer(x, mask, relative, which)
        return x

    def relative_embeddings(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the embeddings (R, d), R ≤ 2T − 1, of the buckets that T tokens need, and the row (T, T) for i − j.

        R depends on the data, so the CPU computes it: a GPU would make the host wait.
        """
        buckets = bucket(torch.arange(1 - length, length), self.buckets, self.furthest) + self.buckets  # of i − j
        used, rows = buckets.clamp(0, 2 * self.buckets - 1).unique(return_inverse=True)
        positions = torch.arange(length, device=device)
        which = to_device(rows, device)[positions[:, None] - positions + length - 1]
        return self.LayerNorm(self.rel_embeddings(to_device(used, device))), which


class Deberta(nn.Module):
    """DeBERTa without a head: input_ids (B, T) -> states (B, T, d). Token types are ignored."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.embeddings = DebertaEmbeddings(config)
        self.encoder = DebertaEncoder(config)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None) -> Tensor:
        return self.encoder(self.embeddings(input_ids), key_mask(attention_mask, input_ids))


# Classifiers


class RobertaHead(nn.Module):
    """Dropout, dense, tanh, dropout, linear. Reads only hidden_size and classifier_dropout of the configuration."""

    def __init__(self, config: EncoderConfig, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(in_dtype_of(self.dense, self.dropout(x)))
        return self.out_proj(self.dropout(x))


class EncoderClassifier(nn.Module):
    """input_ids (B, T) -> logits (B, num_labels), from the state of the first token, [CLS] or <s>.

    BERT's head is its pooler (dense, tanh) and a linear. DeBERTa's has GELU instead of tanh. RoBERTa has `RobertaHead`.
    """

    def __init__(self, config: EncoderConfig, num_labels: int, prefix: str):
        """Build backbone and head; prefix: the backbone's name in checkpoints."""
        super().__init__()
        self.config, self.num_labels, self.prefix = config, num_labels, prefix
        self.add_module(prefix, Deberta(config) if config.position_buckets else Bert(config))
        if config.pooler == "gelu":
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.pooler_dropout, self.dropout = nn.Dropout(config.pooler_dropout), nn.Dropout(config.classifier_dropout)
        is_linear = config.pooler is not None
        self.classifier = nn.Linear(config.hidden_size, num_labels) if is_linear else RobertaHead(config, num_labels)

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.prefix)

    @property
    def stacks(self) -> list[nn.ModuleList]:
        return [self.backbone.blocks]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Return logits. attention_mask (B, T): 1 = real token, right padding only. token_types (B, T): 1 in the second
        text of a pair, else 0; only BERT uses them."""
        return self.head(self.features(input_ids, attention_mask, token_types))

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Return the last hidden state (B, d) of the first token, which the head reads."""
        return self.backbone(input_ids, attention_mask, token_types)[:, 0]

    def head(self, features: Tensor) -> Tensor:
        if self.config.pooler is None:
            return self.classifier(features)
        pooler = self.pooler if self.config.pooler == "gelu" else self.backbone.pooler
        x = in_dtype_of(pooler["dense"], self.pooler_dropout(features))
        x = F.gelu(x) if self.config.pooler == "gelu" else torch.tanh(x)
        return in_dtype_of(self.classifier, self.dropout(x))


def in_dtype_of(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return linear(x) in the linear's dtype: a trained head is float32 on top of a bfloat16 model."""
    return linear(x.to(linear.weight.dtype))
