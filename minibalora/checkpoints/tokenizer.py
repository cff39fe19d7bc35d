"""Load the tokenizer of a checkpoint, with the special tokens that its files add."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Encoding, normalizers, processors
from tokenizers import Tokenizer as Backend

from minibalora.base.errors import InputError
from minibalora.base.files import refuse_pointer
from minibalora.checkpoints.chat_template import ChatTemplate, read_if_there, special_tokens
from minibalora.checkpoints.config import refuse_adapter
from minibalora.checkpoints.sentencepiece import read_sentencepiece

CHUNK = 1000  # texts that are tokenised at a time
OLD_FILES = ("added_tokens.json", "special_tokens_map.json")
# Tokenizer classes, without "Fast", that take all from tokenizer.json; and those that set add_prefix_space themselves,
# with the model types that have one of these if no class is named.
GENERAL = {"PreTrainedTokenizer", "TokenizersBackend"}
WITH_PREFIX = {"GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer", "gpt2", "qwen2", "qwen3", "roberta"}


class Tokenizer:
    """encode(str) -> ids, with the BOS, EOS, CLS and SEP that tokenizer.json's post-processor adds; decode(ids) -> str.

    As in transformers 5, only that file adds them, with one exception (see `_with_bos`): `add_bos_token` in
    tokenizer_config.json is for slow tokenizers. Its settings that transformers would put in place of tokenizer.json's
    are refused where they differ (see `_refuse_other_settings`).
    bos_id, eos_id: None if the model has none. pad_id: the model's, or EOS, or 0.
    eos_ids: all tokens that end a text. A response is trained to end with eos_id.
    is_encoder_decoder: the model reads a prompt as a complete text, with EOS, and writes its response as another text.
    is_chat: a chat template writes the prompts, with all special tokens, so none is added.
    """

    def __init__(self, backend: Backend, settings: dict, where: Path, is_encoder_decoder: bool = False):
        self.backend, self.is_encoder_decoder, self.is_chat = backend, is_encoder_decoder, False
        self.bos_id, self.eos_id = (self._special(settings, name, where) for name in ("bos_token", "eos_token"))
        self.eos_ids = frozenset() if self.eos_id is None else frozenset([self.eos_id])
        pad_id = self._special(settings, "pad_token", where)
        self.pad_id = pad_id if pad_id is not None else self.eos_id or 0

    def _special(self, settings: dict, name: str, where: Path) -> int | None:
        content = _content(settings, name)
        if content is None:
            return None
        token_id = self.backend.token_to_id(content) if isinstance(content, str) else None
        if token_id is None and name != "pad_token":  # no result depends on the padding token
            raise InputError(f"{where}: {name} {content!r} is not in the tokenizer: download both again")
        return token_id

    def encode(self, text: str, pair: str | None = None) -> list[int]:
        """Return the ids of a text that starts a sequence, or of a pair of texts."""
        return self.backend.encode(text, pair).ids

    def encode_labelled(
        self, texts: list[tuple[str, ...]], max_length: int
    ) -> tuple[list[tuple[list[int], list[int]]], int]:
        """Return (ids, token types) of each tuple of one or two texts, and the number that were cut to `max_length`.

        Special tokens count and are kept. The longer text of a pair is cut first, as transformers does by default.
        """
        specials = self.backend.num_special_tokens_to_add(any(len(text) == 2 for text in texts))
        if max_length <= specials:  # the tokenizers library would not cut at all
            room = f"has no room for text beside {specials} special tokens"
            raise InputError(f"a length of {max_length} {room}: raise it")
        self.backend.enable_truncation(max_length, strategy="longest_first")
        try:
            encoded = self.backend.encode_batch_fast([text[0] if len(text) == 1 else text for text in texts])
        finally:
            self.backend.no_truncation()
        cut = sum(bool(encoding.overflowing) for encoding in encoded)
        return [(encoding.ids, encoding.type_ids) for encoding in encoded], cut

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each prompt. A final EOS, which some tokenizers add, is removed if a response follows; one
        that the text itself ends with is kept."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=not self.is_chat)
        if self.is_encoder_decoder or self.is_chat:
            return [encoding.ids for encoding in encoded]
        return [self._without_added_eos(encoding) for encoding in encoded]

    def _without_added_eos(self, encoding: Encoding) -> list[int]:
        ids, is_added = encoding.ids, encoding.special_tokens_mask[-1:] == [1]  # [0] if the text itself ends with it
        return ids[:-1] if is_added and ids[-1:] == [self.eos_id] else ids

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts that continue a sequence, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_spans(
        self, texts: list[str], spans: list[Sequence[tuple[int, int]]]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the ids of each text that a chat template wrote, and a mask of the tokens in its spans of characters.

        A token is in a span if one of its characters is.
        """
        for first in range(0, len(texts), CHUNK):  # the offsets take 200 bytes per token
            chunk = slice(first, first + CHUNK)
            encoded = self.backend.encode_batch(texts[chunk], add_special_tokens=False)
            for encoding, parts in zip(encoded, spans[chunk], strict=True):
                starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
                inside = np.zeros(len(starts), dtype=bool)
                for start, end in parts:
                    inside |= (ends > start) & (starts < end)
                yield encoding.ids, inside

    def decode_after(self, before: list[int], ids: list[int]) -> str:
        """Return the text that `ids` add after `before`. Decoded alone, they could lose the space in front: tokenizers
        that mark the start of a word drop it, and with it the indentation of a Python function."""
        if before and before[-1] in self.eos_ids:
            return self.decode(ids)  # a new text begins
        context = before[-8:]  # enough for the last character to be whole
        return self.decode(context + ids)[len(self.decode(context)) :]

    def decode(self, ids: list[int]) -> str:
        """Return the text without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(path: str | Path, chat: ChatTemplate | None = None) -> Tokenizer:
    """Load the tokenizer in the folder `path`, from tokenizer.json or DeBERTa's spm.model.

    Special tokens come from tokenizer_config.json, else special_tokens_map.json, generation_config.json or config.json.
    A text ends at any EOS that one of these names, and, with the template `chat`, at the end of a turn.
    Raises InputError if a file is missing or broken.
    """
    folder = Path(path)
    file, spm_file, settings_file, config_file = (
        folder / name for name in ("tokenizer.json", "spm.model", "tokenizer_config.json", "config.json")
    )
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder: give the folder that holds tokenizer.json")
    special = special_tokens(folder)
    settings = read_if_there(settings_file) | special
    config = read_if_there(config_file)
    if file.exists():
        backend = _read_tokenizer_json(file)
        _refuse_other_settings(backend, settings, settings_file, config.get("model_type"))
        _add_tokens(backend, settings, set(special.values()), folder)
        backend = _with_bos(backend, settings)
    elif spm_file.exists() and config.get("model_type") == "deberta-v2":  # DeBERTa-v3's model_type is v2, too
        backend = read_sentencepiece(spm_file, settings)
    else:
        refuse_adapter(folder)
        raise InputError(
            f"{file}: no such file: download it, or make it with transformers, "
            'AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained("new folder")'
        )
    generation_file = folder / "generation_config.json"
    generation = read_if_there(generation_file)
    for source, file_of_ids in ((generation, generation_file), (config, config_file)):
        for name in ("bos_token", "eos_token", "pad_token"):
            ids = _ids(source, f"{name}_id", file_of_ids)
            # null in tokenizer_config.json counts: Qwen 2.5 has no BOS, although config.json gives it a number.
            if ids and (name not in settings or name == "eos_token" and _content(settings, name) is None):
                settings[name] = backend.id_to_token(ids[0])
    tok = Tokenizer(backend, settings, settings_file, config.get("is_encoder_decoder") is True)
    tok.eos_ids |= {*_ids(generation, "eos_token_id", generation_file), *_ids(config, "eos_token_id", config_file)}
    if chat is not None:
        if tok.is_encoder_decoder:
            raise InputError(f"{folder}: a T5 takes no conversations: leave --template chat out")
        tok.is_chat = True
        end_id = backend.token_to_id(chat.end_of_turn or "")
        if chat.end_of_turn is not None and end_id is None:
            reason = f"ends a reply with {chat.end_of_turn!r}, which is not in the tokenizer"
            raise InputError(f"{chat.source}: {reason}: download both again")
        tok.eos_ids |= {end_id} - {None}
    if tok.is_encoder_decoder and (tok.eos_id is None or tok.encode("")[-1:] != [tok.eos_id]):
        raise InputError(f"{file}: does not end a text with EOS, as the model expects: download it again")
    return tok


def _ids(source: dict, name: str, file: Path) -> list[int]:
    """Return the id or ids under a name in a configuration, [] without it. Raises InputError for other values."""
    value = source.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise InputError(f"{file}: {name} is {value!r}, not the number of a token or a list of them: download it again")
    return [token_id for token_id in ids if token_id >= 0]  # some files write -1 for none


def _content(settings: dict, name: str) -> object:
    token = settings.get(name)
    return token.get("content") if isinstance(token, dict) else token


def _add_tokens(backend: Backend, settings: dict, special: set[str], folder: Path) -> None:
    """Add the tokens that other files name and tokenizer.json lacks: it would cut them into pieces.

    As in transformers, added_tokens_decoder takes precedence over tokenizer.json, and the files that it replaced are
    not read beside it. Raises InputError if the files give such a token no id, or another one than it would get.
    """
    is_new = "added_tokens_decoder" in settings
    old, mapped = ({} if is_new else read_if_there(folder / name) for name in OLD_FILES)
    keys = ("additional_special_tokens", "extra_special_tokens")
    lists = [source.get(key) or [] for source in (settings, mapped) for key in keys]
    try:
        extra = [token for tokens in lists for token in (tokens.values() if isinstance(tokens, dict) else tokens)]
        extra = [AddedToken(token["content"] if isinstance(token, dict) else token).content for token in extra]
        special = special.union(extra)
        by_id = {index: {"content": text, "special": text in special} for text, index in old.items()}
        by_id = {
            int(index): AddedToken(**token) for index, token in settings.get("added_tokens_decoder", by_id).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        files = "tokenizer_config.json and added_tokens.json"
        raise InputError(f"{folder}: the added tokens in {files} can't be read: download both again") from None
    for token in by_id.values():
        token.special = token.special or token.content in special
    form = repr if is_new else str  # repr has what tells two tokens of the same text apart, such as lstrip
    known = {form(token) for token in backend.get_added_tokens_decoder().values()}
    missing = {by_id[index].content: index for index in sorted(by_id) if form(by_id[index]) not in known}
    backend.add_tokens([by_id[index] for index in missing.values()])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([text for text in sorted(special - known) if backend.token_to_id(text) is not None])
    for text, index in (dict.fromkeys(extra) | missing).items():
        if (actual := backend.token_to_id(text)) is None or index not in (None, actual):
            place = "without an id" if index is None else f"with id {index}"
            reason = f"lacks {text!r}, which another file names {place}: add it to added_tokens with its id"
            raise InputError(f"{folder / 'tokenizer.json'}: {reason}")


def _refuse_other_settings(backend: Backend, settings: dict, file: Path, model_type: object) -> None:
    """Raise InputError if transformers would read a text otherwise than tokenizer.json, by a setting in `file`.

    For BERT, GPT-2, RoBERTa and Qwen it builds normalizer and pre-tokenizer anew, unless the class is a general one.
    """
    if settings.get("split_special_tokens"):
        raise InputError(f"{file}: split_special_tokens is true, which is not implemented: set it to false")
    kind = str(settings.get("tokenizer_class") or model_type).removesuffix("Fast")
    stored, null, normalizer = {}, False, backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer) and kind not in GENERAL:
        null = normalizer.lowercase  # what null means for strip_accents
        stored |= {"do_lower_case": normalizer.lowercase, "strip_accents": normalizer.strip_accents}
        stored["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
    if backend.pre_tokenizer is not None and kind in WITH_PREFIX:
        state = json.loads(backend.pre_tokenizer.__getstate__())
        for step in state.get("pretokenizers", [state]):
            if step["type"] == "ByteLevel":
                stored["add_prefix_space"] = step["add_prefix_space"]
    for key, value in stored.items():
        asked, value = (null if flag is None else flag for flag in (settings.get(key, value), value))
        if asked != value:
            raise InputError(f"{file}: {key} is {settings[key]!r}, but {value} in tokenizer.json: make them agree")


def _with_bos(backend: Backend, settings: dict) -> Backend:
    """Return the backend, with BOS before a text if it is a LlamaTokenizerFast and tokenizer_config.json asks for it.

    transformers 4 did so whatever tokenizer.json says, and DeepSeek-MoE was trained that way. transformers 5 omits BOS.
    """
    bos = _content(settings, "bos_token")
    bos_id = backend.token_to_id(bos) if isinstance(bos, str) else None
    is_asked = settings.get("tokenizer_class") == "LlamaTokenizerFast" and settings.get("add_bos_token") is True
    if is_asked and bos_id is not None and bos_id not in backend.encode("").ids:
        before = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
        own = backend.post_processor
        backend.post_processor = before if own is None else processors.Sequence([own, before])
    return backend


def _read_tokenizer_json(file: Path) -> Backend:
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises Exception for every kind of broken file
        refuse_pointer(file)
        raise InputError(f"{file}: not a readable tokenizer ({error}): download it again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend
