"""DeBERTa's spm.model gives the ids of transformers and SentencePiece; damaged files are refused."""

import json
import shutil

import pytest
from helpers import GOLDEN

import minibalora as mb
from minibalora.base.errors import InputError
from minibalora.checkpoints.sentencepiece import read_sentencepiece

FOLDER = GOLDEN / "spm"
CONTENT = (FOLDER / "spm.model").read_bytes()
ROWS = json.loads((FOLDER / "expected.json").read_text())  # made by make_spm_golden.py
SINGLE = [row for row in ROWS if "sentencepiece" in row]


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the golden folder that a test may damage."""
    return shutil.copytree(FOLDER, tmp_path / "deberta")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row["text"]))
def test_ids_and_token_types_equal_those_of_transformers(row):
    encoding = read_sentencepiece(FOLDER / "spm.model", row["settings"]).encode(*row["text"])
    assert (encoding.ids, encoding.type_ids) == (row["ids"], row["type_ids"])


@pytest.mark.parametrize("row", SINGLE, ids=lambda row: ascii(row["text"]))
def test_without_special_tokens_in_the_text_ids_equal_those_of_sentencepiece(row):
    """SentencePiece splits "[CLS]" like any text, and drops a "▁" at the end like a space; transformers keeps both."""
    assert (row["ids"][1:-1] == row["sentencepiece"]) == (not set("[▁") & set(row["text"][0]))


def test_the_folder_works_as_downloaded():
    tok = mb.load_tokenizer(FOLDER)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (None, None, 0)
    assert tok.encode("the cat") == [1, *tok.encode_responses(["the cat"])[0], 2]
    assert tok.encode("the cat", "nobody") == [*tok.encode("the cat"), *tok.encode("nobody")[1:]]
    assert tok.decode(tok.encode("  the cat, the  … café ")) == "the cat, the ... café"


def test_the_mask_token_follows_the_pieces():
    tokenizer = read_sentencepiece(FOLDER / "spm.model", {})
    assert tokenizer.token_to_id("[MASK]") == tokenizer.get_vocab_size() - 1 == 300


def test_tokenizer_json_takes_precedence(folder):
    tokenizer = read_sentencepiece(folder / "spm.model", {"do_lower_case": True})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "spm.model").write_bytes(b"broken")
    assert mb.load_tokenizer(folder).encode("THE") == tokenizer.encode("the").ids


@pytest.mark.parametrize("config", ["{}", '{"model_type": "llama"}', None])
def test_an_spm_model_of_another_family_is_not_read(folder, refuses, config):
    (folder / "config.json").unlink() if config is None else (folder / "config.json").write_text(config)
    refuses(lambda: mb.load_tokenizer(folder), folder / "tokenizer.json", "no such file", "save_pretrained")


def test_a_truncated_file_is_refused(folder, refuses):
    for length in [*range(40), *range(40, len(CONTENT), 17), len(CONTENT) - 1]:
        (folder / "spm.model").write_bytes(CONTENT[:length])
        refuses(lambda: mb.load_tokenizer(folder), folder / "spm.model", "save_pretrained")


def test_a_changed_byte_is_refused_or_read(folder):
    for place in range(0, len(CONTENT), 31):
        (folder / "spm.model").write_bytes(CONTENT[:place] + bytes([CONTENT[place] ^ 0xA5]) + CONTENT[place + 1 :])
        try:
            mb.load_tokenizer(folder)
        except InputError as error:
            assert len(str(error).splitlines()) == 1


# Fields as protobuf writes them: number << 3 | wire type, size, content. The trainer's field 3 is the type of model.
SPECIALS = b"".join(b"\x0a\x0c\x0a\x05%s\x15\x00\x00\x00\x00" % text for text in (b"[PAD]", b"[CLS]", b"[SEP]"))


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "IndexError"),
        (bytes(range(256)) * 9, ""),
        (b"\xff" * 99, "ten bytes"),
        (b"\x12\x02\x18\x02", "model type 2"),  # BPE
        (b"\x12\x02\x18\x04", "model type 4"),  # characters
        (b"\x12\x00\x1a\x00", "[CLS]"),
        (SPECIALS + b"\x12\x00\x1a\x00", "not in list"),  # no unknown piece
        (b'{"model": {"type": "Unigram"}}', ""),
    ],
)
def test_a_file_that_is_not_a_unigram_model_is_refused(folder, refuses, content, part):
    (folder / "spm.model").write_bytes(content)
    refuses(lambda: mb.load_tokenizer(folder), folder / "spm.model", part, "save_pretrained")


def test_a_git_lfs_pointer_is_refused_with_the_cure(folder, refuses):
    (folder / "spm.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2464616\n")
    refuses(lambda: mb.load_tokenizer(folder), folder / "spm.model", "git lfs pull")


def test_a_folder_called_spm_model_is_refused(folder, refuses):
    (folder / "spm.model").unlink()
    (folder / "spm.model").mkdir()
    refuses(lambda: mb.load_tokenizer(folder), folder / "spm.model", "directory")
