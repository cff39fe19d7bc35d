"""config.json and tensor names of GPT-2."""

from minibalora.checkpoints.config import INITIALIZER_RANGE, Family, Fields, Names, check_heads
from minibalora.models.gpt2 import GPT2Config, gpt2

NAMES = Names(
    "transformer",
    "score",
    "score.weight",
    ignored=r".*\.attn\.(masked_)?bias|lm_head\.weight",
    transposed=r".*\.(c_attn|c_fc|c_proj)\.weight",
)
DEFAULTS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}


def read_gpt2(fields: Fields) -> GPT2Config:
    fields.refuse("scale_attn_by_inverse_layer_idx", "scaling attention by the layer's index is")
    fields.refuse("add_cross_attention", "cross attention is")
    fields.expect(scale_attn_weights=True)
    fields.activation("activation_function", {"gelu_new": "gelu_tanh"})
    d, heads = fields.integer("n_embd"), fields.integer("n_head")
    check_heads(fields, d, heads)
    return GPT2Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=d,
        intermediate_size=fields.integer("n_inner", 4 * d),
        num_hidden_layers=fields.integer("n_layer"),
        num_attention_heads=heads,
        max_position_embeddings=fields.integer("n_positions"),
        layer_norm_eps=fields.number("layer_norm_epsilon"),
        embedding_dropout=fields.dropout("embd_pdrop"),
        attention_dropout=fields.dropout("attn_pdrop"),
        residual_dropout=fields.dropout("resid_pdrop"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        initializer_range=fields.number("initializer_range", INITIALIZER_RANGE),
    )


FAMILIES = {"gpt2": Family(read_gpt2, gpt2, NAMES, "GPT2", DEFAULTS)}
