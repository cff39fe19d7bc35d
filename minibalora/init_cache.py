"""PiSSA's factors on disk, so that the runs of a sweep, which share them, compute them once.

A file a layer, named by a SHA-256 of all that its factors depend on; it holds A and B, 4 r (m + n) bytes.
"""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minibalora.errors import InputError
from minibalora.files import is_full_disk, replacing
from minibalora.lowrank import pissa_factors

VERSION = 1  # raise it when pissa_factors gives other factors


def cached_factors(folder: Path, rank: int, scaling: float, init: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """lowrank.pissa_factors, from `folder` if they are there, else computed and put there.

    A file that is damaged or of something else is replaced. InputError if the folder can't be written to; a full disk
    stays an OSError or SafetensorError.
    """
    n, m = weight.shape
    settings = f"{VERSION} {n} {m} {weight.dtype} {rank} {scaling!r} {init} "
    key = _sha256(settings, weight)
    path = folder / f"{key}.safetensors"
    stored = _read(path, key, (m, rank), (rank, n))
    if stored is not None:
        return stored[0].to(weight.device), stored[1].to(weight.device)
    A, B = pissa_factors(weight, rank, scaling, init)
    _write(path, key, A.cpu(), B.cpu())
    return A, B


def _read(path: Path, key: str, *shapes: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """A and B, None unless the file is whole and was written for this key."""
    try:
        with safe_open(path, "pt") as file:
            # Cloned, for a tensor of safetensors is a view of its file, which another run may replace.
            A, B, digest = file.get_tensor("A").clone(), file.get_tensor("B").clone(), file.metadata()["digest"]
    except (SafetensorError, OSError, KeyError, TypeError):
        return None
    is_whole = digest == _sha256(key, A, B) and all(factor.isfinite().all() for factor in (A, B))
    return (A, B) if is_whole and (A.shape, B.shape) == shapes and A.dtype == B.dtype == torch.float32 else None


def _write(path: Path, key: str, A: Tensor, B: Tensor) -> None:
    own = path.with_name(f"{key}.{os.getpid()}")  # runs of a sweep may write the same file at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(own) as temporary:
            save_file({"A": A, "B": B}, temporary, metadata={"digest": _sha256(key, A, B)})
        try:
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        if is_full_disk(error):
            raise
        raise InputError(f"{path}: can't write it ({error}): give another --init-cache") from None


def _sha256(text: str, *tensors: Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
