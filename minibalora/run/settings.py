"""What a run is set to, in the groups that travel together. flags.py makes them of the command line; a program of one's
own makes what it needs."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Adaptation:
    """How the model is adapted."""

    method: str  # "full", which adapts nothing, "lora", "pissa" or "ba-lora"
    rank: int
    alpha: float
    init: str  # see `lowrank.adapt`
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
