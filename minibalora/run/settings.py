"""The settings of a run, in groups. flags.py makes them from the command line; other programs can make them too."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from minibalora.objective import Objective


@dataclass(frozen=True)
class Adaptation:
    """The adapter: where it is, how large, and how it starts."""

    method: str  # see `methods.STARTS`
    rank: int
    alpha: float
    init: str  # see `lowrank.factors_of`
    targets: tuple[str, ...] | None = None  # None: every linear in attention and MLP
    quantize: str | None = None  # "nf4": frozen weights of adapted linears in four bits
    is_plain: bool = False  # the layer and the loss as the paper writes them, not their lean forms
    init_cache: Path | None = None  # folder of PiSSA's factors
    settings: dict = field(default_factory=dict)  # of the method, see `methods.SETTINGS`

    @property
    def rate_of_b(self) -> float:
        """LoRA+: the factor of B's learning rate; 1 for other methods."""
        return self.settings["ratio"] if self.method == "lora+" else 1.0


@dataclass(frozen=True)
class Optimisation:
    """The schedule of a run: learning rate, steps and batches."""

    lr: float  # peak
    schedule: str  # "cosine" or "linear"
    warmup_ratio: float
    grad_clip: float
    epochs: int
    max_steps: int | None
    batch_size: int  # rows per step
    micro_batch_size: int  # rows per forward pass
    seed: int

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches in a step."""
        return -(-self.batch_size // self.micro_batch_size)


@dataclass(frozen=True)
class Hardware:
    """The device, and the ways to save memory or time on it."""

    device: torch.device
    dtype: torch.dtype  # of weights and activations; A and B are float32
    tf32: bool = False
    grad_checkpoint: bool = False
    compile: bool = False
    fsdp: bool = False


@dataclass(frozen=True)
class Output:
    """The files that a run writes."""

    folder: Path  # --out
    save_every: int
    resume: bool
    adapter_rank: int | None = None
    teacher_cache: Path | None = None  # folder of the teacher's states
    features: Path | None = None  # file for a classifier's last hidden states, before and after


@dataclass(frozen=True)
class TextSource:
    """The model and the rows of train_nlg.py."""

    model: Path
    data: str | None  # None: the built-in problems
    eval: str | None
    eval_task: str | None
    prompt_field: str | None
    response_field: str | None
    input_field: str | None
    retain: list[str] | None  # texts or rows on which forgetting is measured
    retain_every: int | None  # steps between their measurements
    template: str | None  # "alpaca", "chat" or "raw"; None: by model and data
    max_rows: int | None
    max_length: int


@dataclass(frozen=True)
class ClassSource:
    """The model and the rows of train_nlu.py."""

    model: Path
    data: str | None  # None: the built-in reviews
    task: str | None  # a GLUE task, or "custom"
    eval: list[str] | None
    as_text: bool
    text_field: list[str] | None
    label_field: str | None
    max_rows: int | None
    max_length: int
    label_noise: float
    imbalance: float | None
    teacher: str | None  # "pretrained", or the folder of a fine-tuned model; None: no teacher


@dataclass(frozen=True)
class Settings:
    """All settings of a training script."""

    source: TextSource | ClassSource
    objective: Objective
    adaptation: Adaptation
    optimisation: Optimisation
    hardware: Hardware
    output: Output
    recorded: dict  # all flags by name, for run.json
