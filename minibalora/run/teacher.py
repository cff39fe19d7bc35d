"""What the pre-trained model makes of a step's rows, on the student's own weights; kept on disk if wanted."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minibalora.base.errors import InputError
from minibalora.base.files import check_writable, nearest, save_cached, tensors_digest
from minibalora.data.batches import Packed, Row
from minibalora.lowrank import pretrained
from minibalora.models import LanguageModel

VERSION = 1  # raise it when the same weights and tokens give other states


def teacher_states(
    model: LanguageModel,
    batches: list[Packed],
    micro: list[list[Row]],
    cache: "TeacherCache | None" = None,
) -> list[Tensor]:
    """The pre-trained model's final hidden states (M, d) of each micro-batch; their logits would be V/d larger.

    batches: the rows of `micro`, packed. With a cache only those batches are computed of which it lacks a row, and then
    it has them.
    """
    known = [None if cache is None else cache.read(rows) for rows in micro]
    with pretrained(model):  # inference_mode would make what FSDP gathers of no use to the student
        states = [
            kept.to(batch.input_ids.device)
            if kept is not None
            else model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)
            for batch, kept in zip(batches, known, strict=True)
        ]
    if cache is not None:
        new = [index for index, kept in enumerate(known) if kept is None]
        rows = [row for index in new for row in micro[index]]
        parts = [part for index in new for part in states[index].split(batches[index].wanted)]
        cache.write(rows, parts)
    return states


class TeacherCache:
    """A teacher's states of response tokens in safetensors files, one a step, in a folder of its own below `folder`.

    `teacher` says all that the states depend on but the row; a row is known by the digest of its tokens. So what some
    other model or other rows left there is never met. What is damaged has not the digest in its file's header: the file
    is deleted, its rows are missing, and computed and written anew. A row is found whichever run met it, in whatever
    batch.
    """

    def __init__(self, folder: Path, teacher: str):
        self.folder = folder / hashlib.sha256(f"{VERSION} {teacher}".encode()).hexdigest()[:32]
        self.files = {}  # digest of a row -> its file, and the digest of its states
        self.seen = set()
        self.look()

    def look(self) -> None:
        """Take note of the files that are new in the folder, for instance from another rank."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.seen):
            self.seen.add(path)
            try:
                with safe_open(path, "pt") as file:
                    self.files |= {name: (path, digest) for name, digest in file.metadata().items() if len(name) == 64}
            except (SafetensorError, OSError, AttributeError):  # of no use: its rows will be written to another
                continue

    def missing(self, rows: list[Row]) -> list[Row]:
        """Those of which no file says that it has them."""
        return [row for row in rows if digest_of_row(row) not in self.files]

    def read(self, rows: list[Row]) -> Tensor | None:
        """The states of these rows, one after the other, (M, d); None unless all are there and undamaged."""
        if self.missing(rows):
            self.look()
        states = [self._states(row) for row in rows]
        return None if any(each is None for each in states) else torch.cat(states)

    def write(self, rows: list[Row], states: list[Tensor]) -> None:
        """Add those that are missing. InputError if the folder can't be written to; a full disk stays an OSError."""
        named = {digest_of_row(row): part for row, part in zip(rows, states, strict=True)}
        tensors = {name: part.cpu().contiguous() for name, part in named.items() if name not in self.files}
        if not tensors:
            return
        path = self.folder / f"{hashlib.sha256(''.join(sorted(tensors)).encode()).hexdigest()}.safetensors"
        digests = {name: digest_of_states(part) for name, part in tensors.items()}
        save_cached(path, tensors, digests, "--teacher-cache")
        self.files |= {name: (path, digest) for name, digest in digests.items()}
        self.seen.add(path)

    def _states(self, row: Row) -> Tensor | None:
        name = digest_of_row(row)
        if name not in self.files:
            return None
        path, digest = self.files[name]
        try:
            with safe_open(path, "pt") as file:
                states = file.get_tensor(name).clone()  # for what safetensors gives is a view of the file
            if digest_of_states(states) == digest:
                return states
        except (SafetensorError, OSError):
            pass  # as damaged as with a wrong digest
        self.files = {other: place for other, place in self.files.items() if place[0] != path}
        path.unlink(missing_ok=True)
        return None


def open_cache(folder: Path, teacher: str, rows: list[Row], bytes_of_token: int) -> TeacherCache:
    """InputError if the folder can't be written to, or what it lacks of `rows` has no room on its disk."""
    check_writable(folder, "--teacher-cache")
    cache = TeacherCache(folder, teacher)
    needed = bytes_of_token * sum(row.predicted for row in cache.missing(rows))
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        room = f"the teacher's states need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
        raise InputError(f"--teacher-cache {folder}: {room}: give another folder, or fewer rows with --max-rows")
    return cache


def digest_of_row(row: Row) -> str:
    """SHA-256, in hex, of a row's tokens and of which of them are its response."""
    return hashlib.sha256(json.dumps([row.prompt_length, row.ids.tolist()]).encode()).hexdigest()


def digest_of_states(states: Tensor) -> str:
    """SHA-256, in hex, of a row's states, their dtype and shape."""
    return tensors_digest(f"{states.dtype} {list(states.shape)}", states)
