# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The product of `LowRankLinear` in less memory and time. `use_lean_product(model)` puts it into every adapted layer.

It gives the same numbers to rounding. For the backward pass it keeps X alone, which all layers that read X share, where
autograd keeps X A₀ and X (A − A₀) too, and it computes nothing for A₀ and B₀. With D = s dY:

    dX = dY Wᵀ + D (A B − A₀ B₀)ᵀ,    dA = Xᵀ (D Bᵀ),    dB = (X A)ᵀ D

Where X is float32 and has so many rows that ΔW costs less than X ΔW, the product is X (W + ΔW).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibalora.lowrank import LowRankLinear, adapted_layers

__all__ = ["LeanLowRankLinear", "use_lean_product"]


def use_lean_product(model: nn.Module) -> None:
    """Let every LowRankLinear of `model` compute its product as this file does, in place."""
    for _, layer in adapted_layers(model):
        layer.__class__ = LeanLowRankLinear


class LeanLowRankLinear(LowRankLinear):
    """Can't be differentiated twice: RuntimeError. Where W or the bias is trained, the plain form computes."""

    def forward(self, x: Tensor) -> Tensor:
        is_trained = any(isinstance(p, Tensor) and p.requires_grad for p in (self.W, self.bias))
        if self.is_teacher or is_trained:
            return super().forward(x)
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, x.shape[-1])
        return _Product.apply(rows, self.A, self.B, self).view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, layer: LowRankLinear) -> Tensor:
        """x (T, m) -> (T, n)."""
        ctx.save_for_backward(x, A, B)
        ctx.layer = layer
        W, left, right = _acting(x, layer)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        y = F.linear(x, W, bias)
        return y if left is None else y.addmm_(x @ left, right, alpha=layer.scaling)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("the lean product can't be differentiated twice: use the plain LowRankLinear")
        x, A, B = ctx.saved_tensors
        s = ctx.layer.scaling
        dA = s * (x.T @ (dy @ B.T.to(x.dtype))).to(A.dtype)
        dB = s * ((x @ A.to(x.dtype)).T @ dy).to(B.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            W, left, right = _acting(x, ctx.layer)
            dx = dy @ W
            dx = dx if left is None else dx.addmm_(dy @ right.T, left.T, alpha=s)
        return dx, dA, dB, None


def _acting(x: Tensor, layer: LowRankLinear) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What x (T, m) is multiplied by: W (n, m), and `left` (m, R) and `right` (R, n) of the change beside it.

    left and right are None where the change is in W already. In bfloat16 it never is: rounding would swallow it.
    """
    W = layer.pretrained_weight(x.dtype)
    left, right = (factor.to(x.dtype) for factor in layer.update())
    n, m = W.shape
    if x.dtype.itemsize >= 4 and len(x) * (m + n) > m * n:
        return torch.addmm(W, right.T, left.T, alpha=layer.scaling), None, None
    return W, left, right
