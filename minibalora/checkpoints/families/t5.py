"""config.json and tensor names of T5, T5 v1.1 and Flan-T5."""

from minibalora.base.errors import InputError
from minibalora.checkpoints.config import Family, Fields, Names
from minibalora.models.t5 import T5Config, t5

COPIES = r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight"
NAMES = Names(
    "transformer",
    "classification_head",
    "classification_head.out_proj.weight",
    # Old files have a position bias in the attention to the encoder, where it was never used.
    ignored=rf"{COPIES}|(transformer\.)?lm_head\.weight|.*\.EncDecAttention\.relative_attention_bias\.weight",
    copies=COPIES,
)
DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "dropout_rate": 0.1,
    "classifier_dropout": 0.0,
    "initializer_factor": 1.0,
    "tie_word_embeddings": True,
}


def read_t5(fields: Fields) -> T5Config:
    fields.refuse("is_decoder", "a decoder without its encoder is")
    fields.expect(is_encoder_decoder=True)
    kind = fields.activation("feed_forward_proj", {"relu": "relu", "gated-gelu": "gated-gelu"})
    buckets, largest = map(fields.integer, ("relative_attention_num_buckets", "relative_attention_max_distance"))
    if buckets < 4 or largest <= buckets // 2:
        raise InputError(f"{fields.path}: {buckets} buckets do not fit distances up to {largest}: download it again")
    vocabulary, start = fields.integer("vocab_size"), fields.integer("decoder_start_token_id", least=0)
    if start >= vocabulary:
        raise InputError(
            f"{fields.path}: decoder_start_token_id is {start}, but vocab_size {vocabulary}: download it again"
        )
    d, layers = fields.integer("d_model"), fields.integer("num_layers")
    return T5Config(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=fields.integer("d_ff"),
        num_layers=layers,
        num_decoder_layers=fields.integer("num_decoder_layers", layers),
        num_attention_heads=fields.integer("num_heads"),
        head_dim=fields.integer("d_kv"),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=largest,
        layer_norm_epsilon=fields.number("layer_norm_epsilon"),
        is_gated=kind == "gated-gelu",
        dropout_rate=fields.dropout("dropout_rate"),
        classifier_dropout=fields.dropout("classifier_dropout"),
        decoder_start_token_id=start,
        tie_word_embeddings=_is_tied(fields),
        initializer_range=fields.number("initializer_factor") * d**-0.5,
    )


def _is_tied(fields: Fields) -> bool:
    """Return whether head and embedding are tied. Transformers 5 writes tie_word_embeddings: true for every T5, and
    scale_decoder_outputs: false for v1.1, which is not tied."""
    return fields.flag("scale_decoder_outputs", True) and fields.flag("tie_word_embeddings")


FAMILIES = {"t5": Family(read_t5, t5, NAMES, "T5", DEFAULTS, peft_task="SEQ_2_SEQ_LM")}
