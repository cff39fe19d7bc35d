"""The teacher's states: those of the pre-trained model, computed with the student's weights or read from a cache."""

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
from minibalora.models.decoder import to_device
from minibalora.run.cache import Cache, device_name
from minibalora.run.settings import Adaptation, Hardware

VERSION = 2  # raise it when the same weights and tokens give other states


def teacher_states(
    model: LanguageModel, batches: list[Packed], micro: list[list[Row]], cache: Cache | None = None
) -> list[Tensor]:
    """Return the pre-trained model's final hidden states (M, d) of each micro-batch. Its logits would be V/d larger.

    batches: the rows of `micro`, packed. Computes the batches that the cache is missing and adds them.
    """
    digests = [[row_digest(row) for row in rows] for rows in micro] if cache else []
    cached = [cache.read(names) for names in digests] if cache else [None] * len(micro)
    with pretrained(model):  # not inference_mode: the student could not use the weights that FSDP gathers in it
        states = [
            batch.states(model) if tensors is None else to_device(torch.cat(tensors), batch.input_ids.device)
            for batch, tensors in zip(batches, cached, strict=True)
        ]
    new = [index for index, tensors in enumerate(cached) if tensors is None]
    if cache and new:
        names = [name for index in new for name in digests[index]]
        on_cpu = torch.cat([states[index] for index in new]).cpu()  # waits for a GPU once
        parts = on_cpu.split([row.predicted for index in new for row in micro[index]])
        cache.write(dict(zip(names, parts, strict=True)))
    return states


def run_cache(
    folder: Path, checkpoint: str, rows: list[Row], adaptation: Adaptation, hardware: Hardware, seed: int
) -> Cache:
    """Open --teacher-cache for a run. The key has all that the teacher depends on; if quantised, also the residual."""
    teacher = [weights_digest(checkpoint, every_byte=True), str(hardware.dtype), hardware.tf32]
    if adaptation.quantize:
        teacher += [adaptation.quantize, adaptation.init, adaptation.rank, adaptation.alpha, adaptation.targets, seed]
        teacher += [distributed.is_torchrun()]  # pissa_niter_N draws other numbers there
        teacher += [device_name(hardware.device)] if adaptation.init != "lora" else []  # its rounding decides on codes
    width = read_config(Path(checkpoint)).hidden_size
    return open_cache(folder, json.dumps(teacher), rows, width * hardware.dtype.itemsize)


def open_cache(folder: Path, teacher: str, rows: list[Row], bytes_of_token: int) -> Cache:
    """Open the cache of a teacher's states in `folder`. A row's tokens name its states, whatever the run and the batch;
    `teacher` says everything else that the states depend on.

    Raises InputError if the folder can't be written to, or if its disk has no room for the missing states of `rows`.
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
    """Return the SHA-256, in hex, of a row's tokens and of which of them are learned."""
    learned = [] if row.learned is None else [row.learned.tolist()]
    return hashlib.sha256(json.dumps([row.prompt_length, row.ids.tolist(), *learned]).encode()).hexdigest()
