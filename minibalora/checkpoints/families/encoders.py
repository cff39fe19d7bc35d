"""config.json and tensor names of BERT, RoBERTa, XLM-RoBERTa and DeBERTa-v3."""

from functools import partial

from minibalora.base.errors import InputError
from minibalora.checkpoints.config import INITIALIZER_RANGE, Family, Fields, Names, check_heads
from minibalora.models.encoder import EncoderClassifier, EncoderConfig

PLAIN = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
# The only implemented form of DeBERTa: v3, which is v2 without its convolution.
DEBERTA_V3 = {
    "relative_attention": True,
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pooler_hidden_act": "gelu",
    "type_vocab_size": 0,
    "conv_kernel_size": 0,
}


def read_bert(fields: Fields, is_roberta: bool) -> EncoderConfig:
    """Read the config of BERT, RoBERTa or XLM-RoBERTa."""
    fields.refuse("is_decoder", "a decoder with an encoder's blocks is")
    fields.expect(position_embedding_type="absolute")
    rows = fields.integer("max_position_embeddings")
    # RoBERTa counts positions from the padding index + 1 and does not use the rows of its table below that.
    padding = fields.raw["pad_token_id"] if is_roberta else -1
    if type(padding) is not int or not -1 <= padding < rows - 1:
        raise InputError(f"{fields.path}: pad_token_id is {padding!r}: it must be a position, below {rows - 1}")
    return EncoderConfig(
        **_encoder_settings(fields, "classifier_dropout"),
        pooler=None if is_roberta else "tanh",
        max_position_embeddings=rows - (padding + 1),
        type_vocab_size=fields.integer("type_vocab_size"),
        first_position=padding + 1,
    )


def read_deberta(fields: Fields) -> EncoderConfig:
    fields.expect(**DEBERTA_V3)
    kinds = fields.raw["pos_att_type"]
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or sorted(map(str, kinds)) != ["c2p", "p2c"]:
        raise InputError(f"{fields.path}: pos_att_type is {kinds!r}, but only c2p|p2c is implemented")
    settings = _encoder_settings(fields, "cls_dropout")
    for key in ("embedding_size", "pooler_hidden_size"):
        fields.expect(**{key: fields.raw.get(key) and settings["hidden_size"]})
    is_default = fields.raw.get("max_relative_positions", -1) == -1
    largest = fields.integer("max_position_embeddings" if is_default else "max_relative_positions")
    buckets = fields.integer("position_buckets")
    if not 1 <= buckets // 2 < largest - 1:
        raise InputError(f"{fields.path}: {buckets} position_buckets do not fit {largest} positions: download it again")
    return EncoderConfig(
        **settings,
        pooler="gelu",
        position_buckets=buckets,
        max_relative_positions=largest,
        pooler_dropout=fields.dropout("pooler_dropout"),
    )


def _encoder_settings(fields: Fields, classifier_dropout: str) -> dict:
    """Return the settings that all encoders have."""
    check_heads(fields, fields.integer("hidden_size"), fields.integer("num_attention_heads"))
    hidden_dropout = fields.dropout("hidden_dropout_prob")
    return {
        **fields.integers("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "activation": fields.activation("hidden_act", PLAIN),
        "layer_norm_eps": fields.number("layer_norm_eps"),
        "hidden_dropout": hidden_dropout,
        "attention_dropout": fields.dropout("attention_probs_dropout_prob"),
        "classifier_dropout": fields.dropout(classifier_dropout, hidden_dropout),
        "initializer_range": fields.number("initializer_range", INITIALIZER_RANGE),
    }


# Keys that a family's config.json may leave out, with the values of the family's own code.
BERT = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
}
# Keys by which a BERT is recognised if its config.json has no model_type.
BERT_KEYS = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "type_vocab_size"}
BERT_KEYS |= {"attention_probs_dropout_prob", "max_position_embeddings"}
DEBERTA = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-7,
    "type_vocab_size": 0,
    "relative_attention": False,
    "position_biased_input": True,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "pos_att_type": "",
    "conv_kernel_size": 0,
    "pooler_hidden_act": "gelu",
    "pooler_dropout": 0.0,
}
family = partial(Family, has_language_model=False)
roberta = partial(
    family,
    partial(read_bert, is_roberta=True),
    partial(EncoderClassifier, prefix="roberta"),
    Names(
        "roberta",
        "classifier",
        "classifier.out_proj.weight",
        ignored=r"lm_head\..*|qa_outputs\..*|.*\.position_ids|roberta\.pooler\..*",
    ),
    defaults=BERT | {"pad_token_id": 1},
)
FAMILIES = {
    "bert": family(
        partial(read_bert, is_roberta=False),
        partial(EncoderClassifier, prefix="bert"),
        Names(
            "bert", "classifier", "classifier.weight", "bert.pooler", ignored=r"cls\..*|qa_outputs\..*|.*\.position_ids"
        ),
        "Bert",
        BERT,
    ),
    "roberta": roberta("Roberta"),
    "xlm-roberta": roberta("XLMRoberta"),
    "deberta-v2": family(
        read_deberta,
        partial(EncoderClassifier, prefix="deberta"),
        Names(
            "deberta",
            "classifier",
            "classifier.weight",
            "pooler",
            ignored=r"(lm_predictions|mask_predictions|cls|qa_outputs)\..*|.*\.position_(ids|embeddings.*)",
        ),
        "DebertaV2",
        DEBERTA,
    ),
}
