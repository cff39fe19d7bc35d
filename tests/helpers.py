"""What several tests, and the program that makes the golden values, share."""

from pathlib import Path

import torch
from torch import nn

from minibalora.lowrank import adapted_layers

GOLDEN = Path(__file__).with_name("golden")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


@torch.no_grad()
def stretch(model: nn.Module) -> None:
    """A made-up training result that does not depend on the signs of the singular vectors."""
    for index, (_, layer) in enumerate(adapted_layers(model)):
        m, n = layer.A.shape[0], layer.B.shape[1]
        layer.A *= 1 + 0.2 * torch.sin(torch.arange(m) + index)[:, None]
        layer.B *= 1 + 0.2 * torch.cos(torch.arange(n) + index)
