# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The product of `LowRankLinear` in less memory and time; `use_lean_product(model)` puts it into every adapted layer.

The numbers are the same up to rounding. The layer saves only X, which all layers that read X share, and recomputes the
other intermediates in the backward pass; autograd would save X A₀ and X (A − A₀) too. With D = s dY:

    dX = dY Wᵀ + D (A B − A₀ B₀)ᵀ,    dA = Xᵀ (D Bᵀ),    dB = (X A)ᵀ D

If X is float32 and has so many rows that computing ΔW costs less than X ΔW, the product is X (W + ΔW).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibalora.lowrank import LowRankLinear, adapted_layers

__all__ = ["LeanLowRankLinear", "use_lean_product"]


def use_lean_product(model: nn.Module) -> None:
    """Make every LowRankLinear of `model` a LeanLowRankLinear, in place. Raises ValueError for one of variants.py."""
    for name, layer in adapted_layers(model):
        if hasattr(layer, "extras"):
            raise ValueError(f"{name} is a {type(layer).__name__}, which has no lean product: leave it plain")
        layer.__class__ = LeanLowRankLinear


class LeanLowRankLinear(LowRankLinear):
    """A LowRankLinear with the lean product. It uses the plain form if W or the bias is trained. Raises RuntimeError
    for a second derivative."""

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
    """Return the factors of x (T, m): W (n, m), and ΔW as `left` (m, R) and `right` (R, n).

    left and right are None if ΔW is folded into W. It is never folded in bfloat16, where rounding would erase a small
    change.
    """
    W = layer.pretrained_weight(x.dtype)
    left, right = (factor.to(x.dtype) for factor in layer.update())
    n, m = W.shape
    if x.dtype.itemsize >= 4 and len(x) * (m + n) > m * n:
        return torch.addmm(W, right.T, left.T, alpha=layer.scaling), None, None
    return W, left, right
