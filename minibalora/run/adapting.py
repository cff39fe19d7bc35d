"""Adapting a model as `settings.Adaptation` says."""

import torch
from torch import Tensor


def empty_factors(weight: Tensor, rank: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Zeros in place of A (m, r) and B (r, n) of a weight (n, m)."""
    n, m = weight.shape
    return torch.zeros(m, rank, device=device), torch.zeros(rank, n, device=device)
