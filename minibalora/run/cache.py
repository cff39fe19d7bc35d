"""Tensors on disk, each with a checksum, for `--teacher-cache` and `--init-cache`."""

import hashlib
import json
from glob import glob
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minibalora.base.errors import InputError, is_failed_write
from minibalora.base.files import replacing, tensors_digest


def device_name(device: torch.device) -> str:
    """Return a name for a key: random numbers and an SVD's rounding depend on the device, and on the model of GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Cache:
    """Named tensors in safetensors files, in a subfolder of `folder`. Several processes may use it at once.

    `key` says everything that the tensors depend on, apart from their names. Its digest names the subfolder, so tensors
    with another key are never read. The header of a file has a digest of each tensor. A file with a tensor that does
    not match its digest is deleted, and its tensors count as missing.
    """

    def __init__(self, folder: Path, key: str, flag: str):
        """flag: the flag that named `folder`, for error messages."""
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()
        self.flag = flag
        self.places = {}  # name of a tensor -> its file and its digest
        self.seen = set()  # files whose headers have been read
        self._look()

    def missing(self, names: list[str]) -> list[str]:
        """Return the names that are in no file's header."""
        return [name for name in names if name not in self.places]

    def read(self, names: list[str]) -> list[Tensor] | None:
        """Return these tensors, on the CPU; None if one of them is missing or damaged."""
        if self.missing(names):
            self._look()
        tensors = [self._read(name) for name in names]
        return None if any(tensor is None for tensor in tensors) else tensors

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Add the missing ones of these tensors, in one file.

        Raises InputError if the folder can't be written to. A full disk stays an OSError or SafetensorError.
        """
        new = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if name not in self.places}
        if not new:
            return
        path = self.folder / f"{hashlib.sha256(' '.join(sorted(new)).encode()).hexdigest()}.safetensors"
        digests = {name: self._digest(name, tensor) for name, tensor in new.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, is_shared=True) as temporary:
                save_file(new, temporary, metadata={"digests": json.dumps(digests)})
        except (OSError, SafetensorError) as error:
            if is_failed_write(error):
                raise
            raise InputError(f"{path}: can't write it ({error}): give another {self.flag}") from None
        self._note(path, digests)

    def _look(self) -> None:
        """Read the headers of files that are new in the folder, for instance from another process."""
        names = glob("*.safetensors", root_dir=self.folder)  # none if the folder does not exist
        for path in sorted({self.folder / name for name in names} - self.seen):
            try:
                with safe_open(path, "pt") as file:
                    self._note(path, json.loads(file.metadata()["digests"]))
            except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError):
                self.seen.add(path)  # not readable, and perhaps not ours: leave it alone

    def _note(self, path: Path, digests: dict[str, str]) -> None:
        self.places |= {name: (path, digest) for name, digest in digests.items()}
        self.seen.add(path)

    def _read(self, name: str) -> Tensor | None:
        path, digest = self.places.get(name, (None, None))
        if path is None:
            return None
        try:
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name).clone()  # safetensors returns a view of the file
            if self._digest(name, tensor) == digest:
                return tensor
        except (SafetensorError, OSError):
            pass  # damaged, too
        self.places = {other: place for other, place in self.places.items() if place[0] != path}
        self.seen.discard(path)
        path.unlink(missing_ok=True)
        return None

    def _digest(self, name: str, tensor: Tensor) -> str:
        return tensors_digest(f"{self.folder.name} {name} {tensor.dtype} {list(tensor.shape)}", tensor)
