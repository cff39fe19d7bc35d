"""A checkpoint's own tokenizer, from tokenizer.json, adding the special tokens that it adds by itself."""

import os
from pathlib import Path

from tokenizers import Tokenizer as Backend

from minibalora.errors import InputError
from minibalora.files import read_json_object


class Tokenizer:
    """encode(str) -> ids with BOS (and EOS) as the post-processor in tokenizer.json adds them; decode(ids) -> str.

    That file alone decides, as in transformers 5: `add_bos_token` in tokenizer_config.json is the slow tokenizers'.
    bos_id, eos_id: None if the model has none. pad_id: the model's, or EOS, or 0.
    """

    def __init__(self, backend: Backend, settings: dict, where: Path):
        self.backend = backend
        self.bos_id, self.eos_id = (self._special(settings, name, where) for name in ("bos_token", "eos_token"))
        pad_id = self._special(settings, "pad_token", where)
        self.pad_id = pad_id if pad_id is not None else self.eos_id or 0

    def _special(self, settings: dict, name: str, where: Path) -> int | None:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            return None
        token_id = self.backend.token_to_id(content) if isinstance(content, str) else None
        if token_id is None and name != "pad_token":  # nothing here depends on what pads
            raise InputError(f"{where}: {name} {content!r} is not in tokenizer.json: download both again")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text that starts a sequence."""
        return self.backend.encode(text).ids

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each, on all cores, but without the EOS that some tokenizers add: the response is to follow."""
        encoded = [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]
        return [ids[:-1] if self.eos_id is not None and ids[-1:] == [self.eos_id] else ids for ids in encoded]

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue a sequence: no special token."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the folder `path`; InputError if tokenizer.json is missing or broken.

    Special tokens are those of tokenizer_config.json, which Hugging Face writes beside it, or else of config.json.
    """
    folder = Path(path)
    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder: give the folder that holds tokenizer.json")
    if not file.exists():
        raise InputError(
            f"{file}: no such file: download it, or make it with transformers, "
            'AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained("new folder")'
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every kind of broken file
        raise InputError(f"{file}: not a readable tokenizer ({error}): download it again") from None
    backend.no_truncation()
    backend.no_padding()
    settings = read_json_object(settings_file) if settings_file.exists() else {}
    config = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    for name in ("bos_token", "eos_token"):
        token_id = config.get(f"{name}_id")
        if name not in settings and type(token_id) is int and token_id >= 0:
            settings[name] = backend.id_to_token(token_id)
    return Tokenizer(backend, settings, settings_file)
