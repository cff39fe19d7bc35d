"""Make `tests/golden/spm/`: a small spm.model like DeBERTa-v3's, with transformers' ids of some texts.

Run `python tests/make_spm_golden.py` in an environment with sentencepiece, transformers and protobuf, which the package
itself never imports. The ids are those of DebertaV2Converter. Prints the texts for which SentencePiece, or the
DebertaV2Tokenizer of transformers 5, gives other ids.
"""

import io
import json
import random
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import DebertaV2Converter

FOLDER = Path(__file__).with_name("golden") / "spm"
# A few rules like those of nmt_nfkc, which has 240 kB: fullwidth A, dots, accented e, blanks, zero-width space.
RULES = "FF21\t41\n2026\t2E 2E 2E\n65 301\tE9\n9\t20\nA\t20\nD\t20\n3000\t20\n200B\t\n"
WORDS = "the cat two spaces and more nobody sold wide of in reflection café naïve answer its about reading was".split()
TEXTS = [
    ["The cat was reading about two mathematicians."],
    [""],
    [" "],
    ["  two  spaces   and more "],
    ["a\ttab and\na line\r\nend"],
    ["Nobody sold unknown Ωmega or 🤖🎉 to Zoë"],
    ["naïve café, cafe\u0301 \u00e9"],
    ["\uff21nna … and\u200bnothing\u3000wide"],
    ["日本語 と cat"],
    ["don't-stop:12,000.50%"],
    ["[CLS] the [MASK] and[SEP]or [PAD] [UNK]x <new>y [mask]"],
    ["▁the cat▁ ▁"],
    ["the cat", "its reflection"],
    ["", "nobody"],
    ["the cat ", " "],
    ["[SEP] a", "🤖 b  c"],
]
SETTINGS = [{"do_lower_case": False, "vocab_type": "spm"}, {"do_lower_case": True, "split_by_punct": True}]


def sentences() -> list[str]:
    """Return 500 sentences of WORDS and of invented words, whose syllables become pieces."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfklmnprstvz" for vowel in "aeiou"]
    invented = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(1500)]
    return [" ".join(draw.choices(WORDS * 10 + invented, k=8)) + draw.choice(",.?!%()'-0123456789") for _ in range(500)]


def train(**options) -> bytes:
    """Return a serialised model that has DeBERTa-v3's special tokens with their ids, and one user-defined token."""
    model = io.BytesIO()
    with TemporaryDirectory() as folder, chdir(folder):  # the model records the path of the rules: use a relative one
        Path("rules.tsv").write_text(RULES)
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()),
            model_writer=model,
            vocab_size=300,
            hard_vocab_limit=False,
            normalization_rule_tsv="rules.tsv",
            num_threads=1,
            minloglevel=1,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="[PAD]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_piece="[UNK]",
            user_defined_symbols=["<new>"],
            **options,
        )
    return model.getvalue()


def converted(settings: dict, piece_to_id) -> Tokenizer:
    """Return the tokenizer as transformers 4 made it: converted, then with the named special tokens added."""
    slow = SimpleNamespace(
        vocab_file=str(FOLDER / "spm.model"),
        do_lower_case=settings.get("do_lower_case", False),
        split_by_punct=settings.get("split_by_punct", False),
        convert_tokens_to_ids=piece_to_id,
    )
    tokenizer = DebertaV2Converter(slow).converted()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    return tokenizer


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "spm.model").write_bytes(train())
    for name, value in ("config", {"model_type": "deberta-v2", "pad_token_id": 0}), ("tokenizer_config", SETTINGS[0]):
        (FOLDER / f"{name}.json").write_text(json.dumps(value) + "\n")
    sentencepiece = SentencePieceProcessor(model_file=str(FOLDER / "spm.model"))
    transformers5 = AutoTokenizer.from_pretrained(FOLDER)
    rows = []
    for settings in SETTINGS:
        tokenizer = converted(settings, sentencepiece.piece_to_id)
        for text in TEXTS:
            encoding = tokenizer.encode(*text)
            row = {"settings": settings, "text": text, "ids": encoding.ids, "type_ids": encoding.type_ids}
            if settings is SETTINGS[0]:
                if encoding.ids != transformers5(*text).input_ids:
                    print("transformers 5 differs:", text)
                if len(text) == 1:
                    row["sentencepiece"] = sentencepiece.encode(text[0])
                    if encoding.ids[1:-1] != row["sentencepiece"]:
                        print("SentencePiece differs:", text)
            rows.append(row)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (FOLDER / "expected.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
