"""What the pre-trained model makes of a step's rows, on the student's own weights; kept on disk if wanted."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from minibalora.base import distributed
from minibalora.base.errors import InputError
from minibalora.base.files import check_writable, nearest
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.weights import weights_digest
from minibalora.data.batches import Packed, Row
from minibalora.lowrank import pretrained
from minibalora.models import LanguageModel
from minibalora.run.cache import Cache
from minibalora.run.settings import Adaptation, Hardware

VERSION = 2  # raise it when the same weights and tokens give other states


def teacher_states(
    model: LanguageModel, batches: list[Packed], micro: list[list[Row]], cache: Cache | None = None
) -> list[Tensor]:
    """The pre-trained model's final hidden states (M, d) of each micro-batch; their logits would be V/d larger.

    batches: the rows of `micro`, packed. With a cache, only batches of which it lacks a row are computed, and then it
    gets them.
    """
    names = [[row_digest(row) for row in rows] for rows in micro] if cache else []
    known = [cache.read(each) for each in names] if cache else [None] * len(micro)
    with pretrained(model):  # inference_mode would make what FSDP gathers of no use to the student
        states = [
            torch.cat(kept).to(batch.input_ids.device) if kept is not None else batch.states(model)
            for batch, kept in zip(batches, known, strict=True)
        ]
    if cache:
        new = [index for index, kept in enumerate(known) if kept is None]
        of_rows = ((names[index], states[index].split([row.predicted for row in micro[index]])) for index in new)
        cache.write({name: part for each, parts in of_rows for name, part in zip(each, parts, strict=True)})
    return states


def run_cache(
    folder: Path, checkpoint: str, rows: list[Row], adaptation: Adaptation, hardware: Hardware, seed: int
) -> Cache:
    """The cache of --teacher-cache for a run's teacher: of quantised weights, what was quantised counts, too."""
    teacher = [weights_digest(checkpoint, every_byte=True), str(hardware.dtype), hardware.tf32]
    if adaptation.quantize:
        teacher += [adaptation.quantize, adaptation.init, adaptation.rank, adaptation.alpha, adaptation.targets, seed]
        teacher += [distributed.is_torchrun()]  # where pissa_niter_N draws otherwise
    width = read_config(Path(checkpoint)).hidden_size
    return open_cache(folder, json.dumps(teacher), rows, width * hardware.dtype.itemsize)


def open_cache(folder: Path, teacher: str, rows: list[Row], bytes_of_token: int) -> Cache:
    """The cache below `folder` of a teacher's states. A row is known by its tokens, whichever run met it, in whatever
    batch; `teacher` says all else that the states depend on.

    InputError if the folder can't be written to, or if its disk has no room for what the cache lacks of `rows`.
    """
    check_writable(folder, "--teacher-cache")
    cache = Cache(folder, f"{VERSION} {teacher}", "--teacher-cache")
    predicted = {row_digest(row): row.predicted for row in rows}
    needed = bytes_of_token * sum(predicted[name] for name in cache.missing(list(predicted)))
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        room = f"the teacher's states need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
        raise InputError(f"--teacher-cache {folder}: {room}: give another folder, or fewer rows with --max-rows")
    return cache


def row_digest(row: Row) -> str:
    """SHA-256, in hex, of a row's tokens and of which of them are learned."""
    learned = [] if row.learned is None else [row.learned.tolist()]
    return hashlib.sha256(json.dumps([row.prompt_length, row.ids.tolist(), *learned]).encode()).hexdigest()
