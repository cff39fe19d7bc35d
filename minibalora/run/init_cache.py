"""PiSSA's factors on disk, so that the runs of a sweep, which share them, compute them once.

A file a layer, named by a SHA-256 of all that its factors depend on; it holds A and B, 4 r (m + n) bytes.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minibalora.base.files import save_cached, tensors_digest
from minibalora.lowrank import pissa_factors

VERSION = 1  # raise it when pissa_factors gives other factors


def cached_factors(folder: Path, rank: int, scaling: float, init: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """lowrank.pissa_factors, from `folder` if they are there, else computed and put there.

    A file that is damaged or of something else is replaced. InputError if the folder can't be written to; a full disk
    stays an OSError or SafetensorError.
    """
    n, m = weight.shape
    settings = f"{VERSION} {n} {m} {weight.dtype} {rank} {scaling!r} {init} "
    key = tensors_digest(settings, weight)
    path = folder / f"{key}.safetensors"
    stored = _read(path, key, (m, rank), (rank, n))
    if stored is not None:
        return stored[0].to(weight.device), stored[1].to(weight.device)
    A, B = pissa_factors(weight, rank, scaling, init)
    save_cached(path, {"A": A.cpu(), "B": B.cpu()}, {"digest": tensors_digest(key, A, B)}, "--init-cache")
    return A, B


def _read(path: Path, key: str, *shapes: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """A and B, None unless the file is whole and was written for this key."""
    try:
        with safe_open(path, "pt") as file:
            # Cloned, for a tensor of safetensors is a view of its file, which another run may replace.
            A, B, digest = file.get_tensor("A").clone(), file.get_tensor("B").clone(), file.metadata()["digest"]
    except (SafetensorError, OSError, KeyError, TypeError):
        return None
    is_whole = digest == tensors_digest(key, A, B) and all(factor.isfinite().all() for factor in (A, B))
    return (A, B) if is_whole and (A.shape, B.shape) == shapes and A.dtype == B.dtype == torch.float32 else None
