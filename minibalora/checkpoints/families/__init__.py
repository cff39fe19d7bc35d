"""The implemented families of models. A file here reads a family's config.json; a file in `models/` has its blocks.

A setting that would change the results and is not implemented is refused by name; nothing is approximated silently.
"""

import os
import re
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object
from minibalora.checkpoints.config import Family, Fields, refuse_adapter
from minibalora.checkpoints.families import encoders, gpt2, llama, mixture, t5

MODULES = (llama, mixture, gpt2, t5, encoders)
FAMILIES = {model_type: family for module in MODULES for model_type, family in module.FAMILIES.items()}


def read_family(folder: Path) -> tuple[Family, object]:
    """Return the family that config.json names, and its configuration.

    Raises InputError for anything wrong or not implemented.
    """
    path = folder / "config.json"
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder: give the folder that holds config.json")
    refuse_adapter(folder)
    raw = read_json_object(path)
    name = raw.get("model_type") or _type_of_old_file(raw)
    if name is None:
        raise InputError(f"{path}: has no model_type: add it, one of {', '.join(FAMILIES)}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"{path}: model_type {name!r} is not implemented: there are {', '.join(FAMILIES)}")
    fields = Fields({"is_causal": True} | FAMILIES[name].defaults | raw, path)
    fields.refuse("quantization_config", "quantised weights are")
    if FAMILIES[name].has_language_model:
        fields.expect(is_causal=True)  # LLM2Vec's models say false
    return FAMILIES[name], FAMILIES[name].read(fields)


def _type_of_old_file(raw: dict) -> str | None:
    """Return the model_type of a config.json from before there was one: by its architectures, or BERT by its keys."""
    architectures = raw.get("architectures")
    for architecture in architectures if isinstance(architectures, list) else ():
        for name, family in FAMILIES.items():
            if isinstance(architecture, str) and re.fullmatch(rf"{family.transformers}(For\w+|Model)", architecture):
                return name
    return "bert" if not architectures and raw.keys() >= encoders.BERT_KEYS else None


def read_config(folder: Path) -> object:
    return read_family(folder)[1]
