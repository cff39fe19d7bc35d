"""PiSSA's factors on disk, so that the runs of a sweep compute them once."""

from pathlib import Path

from torch import Tensor

from minibalora.base.files import tensors_digest
from minibalora.lowrank import factors_of
from minibalora.run.cache import Cache, device_name

VERSION = 3  # raise it when an init gives other factors


def cached_factors(folder: Path, rank: int, scaling: float, init: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of `lowrank.factors_of`: read from `folder`, or computed and written to it.

    They need 4 r (m + n) bytes a layer. Raises what `Cache.write` raises.
    """
    settings = f"{VERSION} {list(weight.shape)} {weight.dtype} {rank} {scaling!r} {init} {device_name(weight.device)} "
    cache = Cache(folder, tensors_digest(settings, weight), "--init-cache")
    factors = cache.read(["A", "B"])
    if factors is None:
        factors = factors_of(init)(weight, rank, scaling)
        cache.write(dict(zip("AB", factors, strict=True)))
    A, B = (factor.to(weight.device) for factor in factors)
    return A, B
