# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""Reduce the rank of a trained adapter: a PiSSA adapter has twice the rank that was trained."""

import torch
from torch import Tensor, nn

from .lowrank import adapted_layers

__all__ = ["best_factors", "truncate"]


@torch.no_grad()
def truncate(model: nn.Module, rank: int) -> float:
    """Replace every ΔW in place by its best approximation of at most this rank (Eckart and Young).

    Returns the loss over all layers, ‖ΔW − ΔW_rank‖ / ‖ΔW‖ (Frobenius norm); 0 if nothing was learned. The teacher
    stays the pre-trained model. Raises ValueError if the rank is not an integer of at least 1, if nothing is adapted,
    if the model is quantised, because A₀ and B₀ are then a part of the pre-trained model, or for a variant of LoRA.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers:
        raise ValueError("nothing to truncate: the model has no adapted layer")
    if any(not isinstance(layer.W, Tensor) for layer in layers):
        raise ValueError("a quantised model can't be truncated: save its adapter and truncate that")
    if any(hasattr(layer, "extras") for layer in layers):
        raise ValueError("a variant of LoRA can't be truncated: make it a plain LoRA first, with variants.fold")
    lost = total = 0.0
    for layer in layers:
        left, right, S = best_factors(*layer.update(), rank)
        layer.A, layer.B, layer.A0, layer.B0 = nn.Parameter(left), nn.Parameter(right), None, None
        energy = (layer.scaling * S).square()
        lost, total = lost + energy[rank:].sum().item(), total + energy.sum().item()
    return (lost / total) ** 0.5 if total > 0 else 0.0


def best_factors(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best approximation of left @ right (m, R), (R, n) of at most `rank`, without forming the product.

    Returns factors (m, r) and (r, n) in float32, r = min(rank, R, m, n), and all singular values of the product; those
    after the first r are lost. After a QR of both factors, the SVD is one of an R x R matrix. Raises ValueError if the
    rank is not an integer of at least 1.
    """
    if not (hasattr(rank, "__index__") and rank >= 1):
        raise ValueError(f"rank is {rank!r}: give an integer from 1 up")
    device = left.device
    place = "cpu" if device.type in ("mps", "xpu") else device  # these have no float64, or no QR
    left, right = left.to(place).double(), right.to(place).double()
    (Q_left, R_left), (Q_right, R_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    root = S[:rank].sqrt()
    left, right = Q_left @ (U[:, :rank] * root), root[:, None] * Vh[:rank] @ Q_right.T
    return left.float().to(device), right.float().to(device), S
