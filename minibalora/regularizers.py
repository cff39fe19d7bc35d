# SPDX-License-Identifier: MIT; from minibalora, see LICENSE there
"""The regularizers of BA-LoRA and of non-target KL, one function each, as the papers write them.

This file needs only torch. Every function takes logits with a row for each example or predicted token (N or M rows)
and a column for each class or vocabulary entry (D or V columns), computes in float32 (float64 stays float64) and
returns the scalar that is *minimised*, sign included. The teacher is the pre-trained model; it gets no gradient.

A logit of −∞ is a masked entry: KL and entropy leave it out (0 log 0 = 0). The functions raise ValueError for settings
out of range and for logits that are not two-dimensional, have no row, or differ in shape from the teacher's. On a CPU,
outside torch.compile and vmap, they also refuse targets that no column has, and masked entries in other terms.

BA-LoRA: arXiv 2408.04556; "2024" means versions 1 to 5, "iclr2026" the ICLR 2026 version.
Non-target KL: arXiv 2605.29498.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["consistency_kl", "consistency_mse", "diversity_covariance", "diversity_entropy", "non_target_kl"]
__all__ += ["svd_share", "svd_sum"]


def consistency_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """L_CR, NLU 2024:  1/(N D) · Σ (z_F/‖z_F‖ − z_P/‖z_P‖)²  over L2-normalised rows. (N, D) twice -> [0, 4/D].

    Scaling a row changes nothing. A row of zeros has no direction and stays zero.
    """
    student, teacher = _pair(student, teacher)
    return (_unit_rows(student) - _unit_rows(teacher)).square().mean()


def consistency_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """L_CR, NLG and NLU iclr2026:  T² · KL(softmax(Z_P/T) ‖ softmax(Z_F/T)),  mean over rows. (M, V) twice -> [0, ∞).

    0 < T < ∞. T² makes the size of the gradient independent of T (Hinton et al., arXiv 1503.02531).
    """
    check_settings(temperature=temperature)
    student, teacher = _pair(student, teacher)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_f = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * _kl(log_p, log_f).mean()


def diversity_covariance(logits: Tensor) -> Tensor:
    """L_DR, NLU:  1/D · Σ_{i≠j} C_ij²,  C = Z̄ᵀ Z̄ / (N − 1),  Z̄ with centred columns. (N, D) -> [0, ∞).

    Adding one vector to every row changes nothing. A single row has no covariance: 0.
    """
    Z = rows(logits, may_mask=False)
    N, D = Z.shape
    Z = Z - Z.mean(0)
    with torch.autocast("cpu" if Z.is_meta else Z.device.type, enabled=False):  # it would multiply in bfloat16
        C = Z.T @ Z / max(N - 1, 1)
    return (C - C.diag().diag()).square().sum() / D


def diversity_entropy(logits: Tensor, top_k: int | None = None) -> Tensor:
    """L_DR, NLG:  −H(softmax(z)),  mean over rows; iclr2026: of the K largest logits only. (M, V) -> [−ln K, 0].

    top_k: None (2024) means the whole vocabulary; otherwise the K ≥ 1 largest are renormalised among themselves.
    """
    Z = rows(logits)
    if top_k is not None:
        check_settings(top_k)
        Z = Z.topk(min(top_k, Z.shape[-1]), dim=-1).values
    log_f = F.log_softmax(Z, dim=-1)
    return (log_f.exp() * log_f.clamp_min(torch.finfo(Z.dtype).min)).sum(-1).mean()  # 0 log 0 = 0


def svd_sum(logits: Tensor, k: int) -> Tensor:
    """L_SVDR, NLU 2024:  −1/N · Σ_{i≤k} σ_i(Z). (N, D) -> (−∞, 0]. k ≥ 1; a k above min(N, D) means all."""
    check_settings(k)
    return -_singular_values(logits)[:k].sum() / logits.shape[0]


def svd_share(logits: Tensor, k: int, norm: str = "nuclear") -> Tensor:
    """L_SVDR:  −Σ_{i≤k} σ_i / ‖Z‖, k ≥ 1, the leading singular values' share of the spectrum. (M, V) -> [−√k, 0].

    norm "nuclear", ‖Z‖ = Σ_j σ_j (NLU iclr2026, NLG 2024): in [−1, −k/min(M, V)] for k ≤ min(M, V).
    norm "frobenius", ‖Z‖ = √Σ_j σ_j² (NLG iclr2026): in [−√k, 0), so not strictly a share.
    The value is not additive over rows: it depends on how a batch is cut. A matrix of zeros gives 0.
    """
    check_settings(k)
    if norm not in ("nuclear", "frobenius"):
        raise ValueError(f"unknown norm {norm!r}: give nuclear or frobenius")
    sigma = _singular_values(logits)
    total = sigma.sum() if norm == "nuclear" else torch.linalg.vector_norm(sigma)
    return -sigma[:k].sum() / torch.where(total > 0, total, 1.0)


def non_target_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """KL(P̃ ‖ F̃), mean over rows; P̃ and F̃ drop the ground-truth entry and renormalise the other V − 1. -> [0, ∞).

    student, teacher: (M, V), V ≥ 2; targets: (M,) integers in [0, V). The gradient with respect to a row's
    ground-truth logit is exactly 0, so the term never opposes the cross-entropy ("Mask the Target", arXiv 2605.29498).
    A row where both mask all other entries adds 0.
    """
    student, teacher = _pair(student, teacher)
    check_targets(student, targets)
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, targets[:, None].long(), True)
    student, teacher = (Z.masked_fill(is_target, -torch.inf) for Z in (student, teacher))
    is_empty = torch.maximum(student, teacher).isneginf().all(-1, keepdim=True)
    log_p, log_f = (F.log_softmax(Z.masked_fill(is_empty, 0.0), dim=-1) for Z in (teacher, student))
    return _kl(log_p, log_f).mean()


def check_settings(k: int = 1, temperature: float = 1.0) -> None:
    """Raise ValueError unless k (or top_k) is an integer of at least 1, and the temperature positive and finite."""
    if not (hasattr(k, "__index__") and k >= 1 and 0 < temperature < torch.inf):
        raise ValueError(f"k is {k}, temperature is {temperature}: give an integer from 1 up, a finite positive number")


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless targets (M,) has a column of the logits (M, V) for each row."""
    if targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype} of shape {list(targets.shape)}: give a class for each row")
    if _is_seen(((targets < 0) | (targets >= logits.shape[-1])).any()):  # a GPU's scatter checks it too
        raise ValueError(f"a target lies outside 0 to {logits.shape[-1] - 1}: leave out rows without a target")


def _is_seen(condition: Tensor) -> bool:
    """Whether a condition holds; False if the host cannot see that, or would have to wait for a GPU."""
    try:
        return condition.device.type in ("cpu", "mps") and not torch.compiler.is_compiling() and bool(condition)
    except RuntimeError:  # inside torch.vmap
        return False


def _kl(log_p: Tensor, log_f: Tensor) -> Tensor:
    """Return Σ p (log p − log f) for each row. An entry with p = 0 adds 0, even if f is 0 too."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_f)).sum(-1)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rows` of both, the teacher without gradient. Raises ValueError if it is missing or has another shape."""
    if teacher is None or student.shape != teacher.shape:
        shape = None if teacher is None else list(teacher.shape)
        raise ValueError(f"student of shape {list(student.shape)}, teacher of shape {shape}: give the same rows")
    return rows(student), rows(teacher.detach())


def rows(logits: Tensor, may_mask: bool = True) -> Tensor:
    """Return logits (rows, columns) in float32 or wider. Raises ValueError for other shapes, or forbidden masks."""
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"logits of shape {list(logits.shape)}: give (rows, columns), a row for each example or token")
    Z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not may_mask and _is_seen(Z.detach().amin() <= -1e30):  # the square overflows, and beside it all others vanish
        raise ValueError("logits of −inf, or below −1e30, cannot be compared as numbers: leave out the masked columns")
    return Z


def _unit_rows(logits: Tensor) -> Tensor:
    Z = rows(logits, may_mask=False)
    length = torch.linalg.vector_norm(Z, dim=-1, keepdim=True)
    return Z / torch.where(length > 0, length, 1.0)


def _singular_values(logits: Tensor) -> Tensor:
    """Return σ_1 ≥ σ_2 ≥ .... The gradient U Vᵀ divides by no gap, so equal or zero singular values are harmless.

    NaN or +∞ in the logits gives NaN, as in every other term: svdvals would raise, and hide which rows caused it.
    """
    Z = rows(logits, may_mask=False)
    is_finite = Z.isfinite().all()  # not a Python bool, for which the host would wait for a GPU
    return torch.linalg.svdvals(torch.where(is_finite, Z, 0.0)) + torch.where(is_finite, 0.0, torch.nan)
