"""Read DeBERTa's spm.model, a SentencePiece unigram model, as a `tokenizers.Tokenizer`.

microsoft/deberta-v3-base has spm.model but no tokenizer.json. With this file the official tokenizer works as
downloaded: there is no need to convert it with transformers or to install sentencepiece.

The steps are those of DebertaV2Converter in transformers. For ordinary text they give SentencePiece's own ids, which
the models were trained with. (DebertaV2Tokenizer in transformers 5 leaves the character map out.)
"""

import struct
from collections import defaultdict
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minibalora.base.errors import InputError
from minibalora.base.files import refuse_pointer

# Field numbers and enumeration values in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, TYPE, NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 1, 2, 3, 4  # fields of a piece, and its types
MODEL_TYPE, UNIGRAM, CHARACTER_MAP = 3, 1, 2  # the trainer's field and value, the normalizer's field
MEND = "download it again, or make tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at` and the position after it.

    Each byte holds seven bits, lowest first; the eighth bit is set in all bytes but the last.
    """
    number = 0
    for shift in range(0, 70, 7):
        byte, at = message[at], at + 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise ValueError("a number of more than ten bytes")


def _fields(message: bytes) -> dict[int, list]:
    """Parse protobuf's wire format. Returns field number -> values: int for wire type 0, bytes for types 1, 2 and 5."""
    fields, at = defaultdict(list), 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        fields[key >> 3].append(value)
    if at > len(message):
        raise ValueError("the file is cut off")
    return fields


def _build(model: dict[int, list], settings: dict) -> Tokenizer:
    model_type = (_fields(model[TRAINER][0])[MODEL_TYPE] or [UNIGRAM])[0]
    if model_type != UNIGRAM:
        raise ValueError(f"model type {model_type}; only type 1, unigram, is implemented")
    pieces = [_fields(piece) for piece in model[PIECES]]
    vocab = [(piece[TEXT][0].decode(), *struct.unpack("<f", piece[SCORE][0])) for piece in pieces]
    types = [(piece[TYPE] or [NORMAL])[0] for piece in pieces]
    if missing := {"[PAD]", "[CLS]", "[SEP]"} - dict(vocab).keys():
        raise ValueError(f"lacks {sorted(missing)}, so it is not DeBERTa's")
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=types.index(UNKNOWN)))

    steps = [normalizers.Lowercase()] if settings.get("do_lower_case") else []
    steps += [normalizers.Strip(), *map(normalizers.Precompiled, _fields(model[NORMALIZER][0])[CHARACTER_MAP])]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    punctuation = [pre_tokenizers.Punctuation("isolated")] if settings.get("split_by_punct") else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*punctuation, pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()

    for (text, _), kind in zip(vocab, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL)])
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])  # only [MASK] is new, so it comes last
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def read_sentencepiece(path: Path, settings: dict) -> Tokenizer:
    """Return the tokenizer in an spm.model. settings: the contents of tokenizer_config.json.

    Raises InputError if the file is broken or its model is not unigram.
    """
    try:
        return _build(_fields(path.read_bytes()), settings)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a file that is not protobuf can fail anywhere, and tokenizers raises plain Exception
        refuse_pointer(path)
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a readable SentencePiece model ({cause}): {MEND}") from None
