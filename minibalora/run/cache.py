"""Tensors on disk, each with a checksum: what `--teacher-cache` and `--init-cache` keep."""

import hashlib
import json
from glob import glob
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minibalora.base.errors import InputError, is_failed_write
from minibalora.base.files import replacing, tensors_digest


class Cache:
    """Named tensors in safetensors files, in a folder of their own below `folder`. Other processes may use it, too.

    `key` says all that the tensors depend on beside their names, and names the folder: tensors of something else are
    never met. A file's header has a digest of every tensor in it. Where a tensor does not have its digest, the file is
    damaged: it is deleted, and its tensors are missing.
    """

    def __init__(self, folder: Path, key: str, flag: str):
        """flag: the one that gave `folder`, for messages."""
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()
        self.flag = flag
        self.places = {}  # name of a tensor -> its file and its digest
        self.seen = set()
        self._look()

    def missing(self, names: list[str]) -> list[str]:
        """Those of which no file says that it has them."""
        return [name for name in names if name not in self.places]

    def read(self, names: list[str]) -> list[Tensor] | None:
        """These tensors, on the CPU; None unless all are there and undamaged."""
        if self.missing(names):
            self._look()
        tensors = [self._read(name) for name in names]
        return None if any(tensor is None for tensor in tensors) else tensors

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Add those that are missing, in one file.

        InputError if the folder can't be written to; a full disk stays an OSError or SafetensorError.
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
        """Take note of files that are new in the folder, for instance from another process."""
        names = glob("*.safetensors", root_dir=self.folder)  # none where there is no such folder
        for path in sorted({self.folder / name for name in names} - self.seen):
            try:
                with safe_open(path, "pt") as file:
                    self._note(path, json.loads(file.metadata()["digests"]))
            except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError):
                self.seen.add(path)  # of no use, and perhaps not ours: what is missing goes to a file of its own

    def _note(self, path: Path, digests: dict[str, str]) -> None:
        self.places |= {name: (path, digest) for name, digest in digests.items()}
        self.seen.add(path)

    def _read(self, name: str) -> Tensor | None:
        path, digest = self.places.get(name, (None, None))
        if path is None:
            return None
        try:
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name).clone()  # what safetensors gives is a view of the file
            if self._digest(name, tensor) == digest:
                return tensor
        except (SafetensorError, OSError):
            pass  # as damaged as with another digest
        self.places = {other: place for other, place in self.places.items() if place[0] != path}
        self.seen.discard(path)
        path.unlink(missing_ok=True)
        return None

    def _digest(self, name: str, tensor: Tensor) -> str:
        return tensors_digest(f"{self.folder.name} {name} {tensor.dtype} {list(tensor.shape)}", tensor)
