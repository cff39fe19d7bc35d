# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""GPT-2: learned positions and pre-norm blocks with LayerNorm and a plain MLP. Checkpoints store linears transposed.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Attend, Decoder, pick

__all__ = ["GPT2Config", "gpt2"]


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and settings, with the names of `DecoderConfig`; config.json has other names (n_embd, n_layer, ...)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float
    tie_word_embeddings: bool
    initializer_range: float

    has_learned_positions = True
    attention_cap = logit_cap = None

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> tuple[None, ...]:
        return (None,) * self.num_hidden_layers


class Attention(nn.Module):
    can_compile = False  # every new row length would recompile it

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


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config, index)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        x = pick(x, wanted) + self.attn(self.ln_1(x), attend, wanted)
        return x + self.mlp(self.ln_2(x))


class Backbone(nn.Module):
    """Everything below the head: ids -> states after the final norm."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embedding_dropout)
        self.h = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def embedding(self) -> nn.Embedding:
        return self.wte

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        for block in self.h[:-1]:
            x = block(x, attend)
        return self.ln_f(self.h[-1](x, attend, wanted))


def gpt2(config: GPT2Config, num_labels: int | None = None) -> Decoder:
    return Decoder(config, Backbone(config), "transformer", num_labels)
