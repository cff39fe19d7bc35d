"""What a run is set to, in the groups that travel together. flags.py makes them of the command line; a program of one's
own makes what it needs."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minibalora.objective import Objective


@dataclass(frozen=True)
class Adaptation:
    """How the model is adapted."""

    method: str  # "full", which adapts nothing, "lora", "pissa" or "ba-lora"
    rank: int
    alpha: float
    init: str  # see `lowrank.factors_of`
    targets: tuple[str, ...] | None = None  # None: every linear of attention and MLP
    quantize: str | None = None  # "nf4": what is frozen of the adapted linears in four bits
    is_plain: bool = False  # the layer and the loss as the paper writes them, in place of their lean forms
    init_cache: Path | None = None  # where PiSSA's factors are kept


@dataclass(frozen=True)
class Optimisation:
    lr: float  # peak
    schedule: str  # "cosine" or "linear"
    warmup_ratio: float
    grad_clip: float
    epochs: int
    max_steps: int | None
    batch_size: int  # rows a step
    micro_batch_size: int  # rows at a time
    seed: int

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches."""
        return self.batch_size > self.micro_batch_size


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    dtype: torch.dtype  # of weights and activations; A and B are float32
    tf32: bool = False
    grad_checkpoint: bool = False
    compile: bool = False
    fsdp: bool = False


@dataclass(frozen=True)
class Output:
    folder: Path  # --out
    save_every: int
    resume: bool
    adapter_rank: int | None = None
    teacher_cache: Path | None = None  # where the teacher's states are kept
    features: Path | None = None  # the file of a classifier's last hidden states, before and after


@dataclass(frozen=True)
class TextSource:
    """What train_nlg.py reads."""

    model: Path
    data: str | None  # None: the built-in problems
    eval: str | None
    eval_task: str | None
    prompt_field: str | None
    response_field: str | None
    input_field: str | None
    raw: bool  # prompts as they are, without a template
    max_rows: int | None
    max_length: int


@dataclass(frozen=True)
class ClassSource:
    """What train_nlu.py reads."""

    model: Path
    data: str | None  # None: the built-in reviews
    task: str | None  # a name of GLUE's, or "custom"
    eval: list[str] | None
    as_text: bool
    text_field: list[str] | None
    label_field: str | None
    max_rows: int | None
    max_length: int
    label_noise: float
    imbalance: float | None
    teacher: str | None  # "pretrained", or the folder of a fine-tuned model; None: nothing is compared with one


@dataclass(frozen=True)
class Settings:
    """All that a training script was asked for."""

    source: TextSource | ClassSource
    objective: Objective
    adaptation: Adaptation
    optimisation: Optimisation
    hardware: Hardware
    output: Output
    recorded: dict  # every flag by its name, as run.json keeps it
