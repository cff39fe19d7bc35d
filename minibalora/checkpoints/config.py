"""Check the values of a config.json, and describe a family of models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from minibalora.base.errors import InputError

LARGEST = {int: 1 << 20, float: 1e30}  # for any number in config.json, so that a product of three sizes fits 64 bits
LONGEST = 1 << 30  # a context may be longer: where positions are rotary, nothing has its size
INITIALIZER_RANGE = 0.02  # every family's default


@dataclass(frozen=True)
class Names:
    """Names in a family's files; tensors that match none are named as in our model. The last three are regular
    expressions."""

    backbone: str  # prefix of all tensors below the head
    head: str  # the classifier's own module
    classes: str  # the head's parameter that has a row for each class
    pooler: str | None = None  # a module between backbone and head; a file may lack it, as it may lack the head
    ignored: str = "$^"  # buffers, and heads of other tasks
    transposed: str = "$^"  # tensors that are stored as (in, out)
    copies: str = "$^"  # tensors that repeat the embedding


@dataclass(frozen=True)
class Family:
    """All that is specific to a model_type: nothing else in the package depends on the family's name."""

    read: Callable[["Fields"], object]  # config.json -> configuration
    build: Callable[[object, int | None], nn.Module]  # configuration, number of classes (None: language model) -> model
    names: Names
    transformers: str  # how the names of its classes begin in transformers, as in LlamaForSequenceClassification
    defaults: dict = field(default_factory=dict)  # keys that config.json may leave out, with transformers' defaults
    has_language_model: bool = True
    peft_task: str = "CAUSAL_LM"  # PEFT's task_type for its language model


class Fields:
    """The values of a config.json. Each is checked when it is read; null counts as absent."""

    def __init__(self, raw: dict, path: Path):
        self.path, self.raw = path, {key: value for key, value in raw.items() if value is not None}

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST[int]) -> int:
        value = self._present(key, default)
        fits = type(value) is int and least <= value <= most
        return self._checked(key, value, fits, f"an integer from {least} to {most}")

    def integers(self, *keys: str) -> dict[str, int]:
        """Return the integers whose keys are also the names of a configuration's fields."""
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

    def activation(self, key: str, ours: dict[str, str]) -> str:
        """Return our name of an activation; `ours` maps config.json's names to it."""
        name = self.raw.get(key)
        if not isinstance(name, str) or name not in ours:
            raise InputError(f"{self.path}: activation {name!r} is not implemented: there are {', '.join(ours)}")
        return ours[name]

    def refuse(self, key: str, feature: str) -> None:
        """Raise InputError if the key is set. `feature` is the subject of the message, with its verb."""
        if self.raw.get(key):
            raise InputError(
                f"{self.path}: {key} is {self.raw[key]!r}, but {feature} not implemented: use a checkpoint without it"
            )

    def expect(self, **values: object) -> None:
        """Raise InputError unless each key has the only value that is implemented."""
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


def refuse_adapter(folder: Path) -> None:
    """Raise InputError if a model's folder holds an adapter: the model alone would be another than the folder's."""
    if not (folder / "adapter_config.json").exists():
        return
    if (folder / "config.json").exists():
        cure = "move adapter_config.json and its weights to a folder of their own, and merge them with export"
        raise InputError(f"{folder}: holds an adapter, which would be left out: {cure}, or remove adapter_config.json")
    cure = "give the model it was trained on, with this folder as --adapter, or merge the two with export"
    raise InputError(f"{folder}: holds an adapter, not a model: {cure}")


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= LARGEST[float]


def check_heads(fields: Fields, hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        shape = f"a hidden size of {hidden_size} and {heads} heads"
        raise InputError(f"{fields.path}: {shape} do not fit together: download it again")
