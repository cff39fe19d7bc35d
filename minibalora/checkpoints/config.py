"""The values of a config.json, checked; and what the package must know of a family of models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from minibalora.base.errors import InputError

LARGEST = {int: 1 << 20, float: 1e30}  # of any number in config.json: products of three sizes still fit 64 bits
INITIALIZER_RANGE = 0.02  # the default of all these families


@dataclass(frozen=True)
class Names:
    """How a family's files name what is not simply named as in our model."""

    backbone: str  # of everything below the head, the prefix of its tensors
    head: str  # the classifier's own module
    classes: str  # of its parameters the one with a row for each class
    pooler: str | None = None  # a module between backbone and head, which a file may lack as it may lack the head
    ignored: str = "$^"  # regular expression: buffers, and heads of other tasks
    transposed: str = "$^"  # stored as (in, out)
    copies: str = "$^"  # that repeat the embedding


@dataclass(frozen=True)
class Family:
    """What the package must know of a model_type; nothing else in it goes by the family's name."""

    read: Callable[["Fields"], object]  # config.json -> configuration
    build: Callable[[object, int | None], nn.Module]  # configuration, number of classes (None: language model) -> model
    names: Names
    transformers: str  # how its classes begin there, as in LlamaForSequenceClassification
    defaults: dict = field(default_factory=dict)  # what config.json may leave out, as the family's own code fills it in
    has_language_model: bool = True
    peft_task: str = "CAUSAL_LM"  # what PEFT calls that of its language model


class Fields:
    """The values of a config.json, each checked when it is asked for; null counts as absent."""

    def __init__(self, raw: dict, path: Path):
        self.path, self.raw = path, {key: value for key, value in raw.items() if value is not None}

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._present(key, default)
        fits = type(value) is int and least <= value <= LARGEST[int]
        return self._checked(key, value, fits, f"an integer from {least} to {LARGEST[int]}")

    def integers(self, *keys: str) -> dict[str, int]:
        """Those that are called in a configuration as they are in config.json."""
        return {key: self.integer(key) for key in keys}

    def number(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        return float(self._checked(key, value, is_positive(value), "a positive number"))

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._present(key, default)
        return self._checked(key, value, type(value) is bool, "true or false")

    def dropout(self, key: str, default: float | None = None) -> float:
        value = self._present(key, default)
        return float(self._checked(key, value, type(value) in (int, float) and 0 <= value < 1, "a number in [0, 1)"))

    def activation(self, key: str, known: dict[str, str]) -> str:
        name = self.raw.get(key)
        if not isinstance(name, str) or name not in known:
            raise InputError(f"{self.path}: activation {name!r} is not implemented: there are {', '.join(known)}")
        return known[name]

    def refuse(self, key: str, what: str) -> None:
        if self.raw.get(key):
            raise InputError(
                f"{self.path}: {key} is {self.raw[key]!r}, but {what} not implemented: use a checkpoint without"
            )

    def expect(self, **values: object) -> None:
        """Refuse a feature that is implemented in one form only."""
        for key, value in values.items():
            if self.raw.get(key) != value:
                raise InputError(f"{self.path}: {key} is {self.raw.get(key)!r}, but only {value!r} is implemented")

    def _present(self, key: str, default: object) -> object:
        value = self.raw.get(key, default)
        if value is None:
            raise InputError(f"{self.path}: the key {key} is missing or null: download the file again")
        return value

    def _checked(self, key: str, value, fits: bool, expected: str):
        if not fits:
            raise InputError(f"{self.path}: {key} is {value!r}: it must be {expected}")
        return value


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST[float]


def check_heads(fields: Fields, hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        shape = f"a hidden size of {hidden_size} and {heads} heads"
        raise InputError(f"{fields.path}: {shape} do not fit together: download it again")
