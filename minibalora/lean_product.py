# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The product of `LowRankLinear` in less memory and time; `use_lean_product(model)` puts it into every adapted layer.

The numbers are the same up to rounding. The layer saves X, which all layers that read X share, and what it multiplies X
by; it recomputes the other intermediates in the backward pass. Autograd would save X A₀ and X (A − A₀) too. With
D = s dY:

    dX = dY Wᵀ + D (A B − A₀ B₀)ᵀ,    dA = Xᵀ (D Bᵀ),    dB = (X A)ᵀ D

If X is float32 and has so many rows that computing ΔW costs less than X ΔW, the product is X (W + ΔW).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .lowrank import LowRankLinear, adapted_layers

__all__ = ["LeanLowRankLinear", "factors_kept", "use_lean_product"]


class Kept(NamedTuple):
    """The factors of a layer, and what they were computed from."""

    key: list  # their dtype, and where each of A, B, A₀, B₀ is and its version
    sources: list[Tensor]  # aliases of these, so that no other tensor gets their memory, and with it the same key
    factors: tuple[Tensor, Tensor, Tensor]


KEPT: dict[LowRankLinear, Kept | None] = {}  # the layers inside `factors_kept`


def use_lean_product(model: nn.Module) -> None:
    """Make every LowRankLinear of `model` a LeanLowRankLinear, in place. Raises ValueError for one of variants.py."""
    for name, layer in adapted_layers(model):
        if hasattr(layer, "extras"):
            raise ValueError(f"{name} is a {type(layer).__name__}, which has no lean product: leave it plain")
        layer.__class__ = LeanLowRankLinear


@contextmanager
def factors_kept(model: nn.Module) -> Iterator[None]:
    """Inside, compute the factors of each lean layer once, not in each forward pass: for training and for decoding.

    They take r (3m + 2n) numbers of a PiSSA layer in the dtype of X, until an optimizer's step or the end. They are
    computed again after a step of any torch optimizer (a fused one leaves no trace in the tensors), an assignment, or
    an in-place operation that autograd sees. Do not write into `A.data` or `B.data` inside: nothing shows that.
    """
    layers = [layer for _, layer in adapted_layers(model) if layer not in KEPT]
    forget = partial(KEPT.update, dict.fromkeys(layers))
    forget()
    hook = register_optimizer_step_post_hook(lambda *_: forget())
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            del KEPT[layer]


class LeanLowRankLinear(LowRankLinear):
    """A LowRankLinear with the lean product. It uses the plain form if W, the bias, A₀ or B₀ is trained. Raises
    RuntimeError for a second derivative, or if `scaling` changes before the backward pass. torch.jit.trace and
    torch.func can't see through the lean product: for these, leave the layers plain."""

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.W, self.bias, self.A0, self.B0
        is_trained = any(isinstance(p, Tensor) and p.requires_grad for p in frozen)
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
        left, right, A = _factors(layer, x.dtype)
        ctx.save_for_backward(x, left, right, A)
        ctx.layer, ctx.scaling = layer, layer.scaling
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        y = F.linear(x, _weight(x, layer, left, right), bias)
        return y if _is_folded(x, layer) else y.addmm_(x @ left, right, alpha=layer.scaling)

    @staticmethod
    def backward(ctx, dy: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("the lean product can't be differentiated twice: use the plain LowRankLinear")
        x, left, right, A = ctx.saved_tensors
        layer, rank = ctx.layer, A.shape[1]
        if layer.scaling != ctx.scaling:
            raise RuntimeError(f"scaling changed from {ctx.scaling} to {layer.scaling} in a step: set it before")
        is_folded = _is_folded(x, layer)
        inner = dy @ (right[:rank] if is_folded else right).T  # right begins with B
        dA = _scaled(x.T @ inner[:, :rank], layer)
        dB = _scaled((x @ A).T @ dy, layer)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _weight(x, layer, left, right)
            dx = dx if is_folded else dx.addmm_(inner, left.T, alpha=layer.scaling)
        return dx, dA, dB, None


def _factors(layer: LowRankLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return left (m, R) and right (R, n) of `layer.update()`, and A (m, r), in `dtype`."""
    sources = [t for t in (layer.A, layer.B, layer.A0, layer.B0) if t is not None]
    if torch.compiler.is_compiling() or layer not in KEPT or any(t.is_inference() for t in sources):
        return _computed_factors(layer, dtype)
    key = [dtype, *((t.untyped_storage()._cdata, t.storage_offset(), t.stride(), t._version) for t in sources)]
    kept = KEPT[layer]
    if kept is None or kept.key != key:
        with torch.inference_mode(False), torch.no_grad():  # training cannot use an inference tensor
            factors = _computed_factors(layer, dtype)
        kept = KEPT[layer] = Kept(key, [t.detach() for t in sources], factors)
    return kept.factors


def _computed_factors(layer: LowRankLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    left, right = (factor.to(dtype) for factor in layer.update())
    return left, right, left if layer.A0 is None else layer.A.to(dtype)


def _is_folded(x: Tensor, layer: LowRankLinear) -> bool:
    """Whether X (T, m) is multiplied by W + ΔW. Never in bfloat16, where rounding would erase a small change."""
    m, n = layer.in_features, layer.out_features
    return x.dtype.itemsize >= 4 and len(x) * (m + n) > m * n


def _weight(x: Tensor, layer: LowRankLinear, left: Tensor, right: Tensor) -> Tensor:
    """Return W (n, m), or W + ΔW if it is folded, in the dtype of x (T, m)."""
    W = layer.pretrained_weight(x.dtype)
    return torch.addmm(W, right.T, left.T, alpha=layer.scaling) if _is_folded(x, layer) else W


def _scaled(gradient: Tensor, layer: LowRankLinear) -> Tensor:
    """Return s · gradient in the dtype of A and B."""
    gradient = gradient.to(layer.A.dtype)
    return gradient if layer.scaling == 1 else gradient.mul_(layer.scaling)
