"""The regularizers of BA-LoRA and of non-target KL, one function each, as the papers write them.

This file needs only torch. Every function takes logits with one row an example or a predicted token (N or M rows) and
one column a class or a vocabulary entry (D or V columns), computes in float32 (float64 stays float64) and returns the
scalar that is *minimised*, sign included. The teacher is the pre-trained model; no gradient flows into it.

BA-LoRA: arXiv 2408.04556; "2024" is its versions 1 to 5, "iclr2026" the ICLR 2026 one. Non-target KL: arXiv 2605.29498.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def consistency_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """L_CR, NLU 2024:  1/(N D) · Σ (z_F/‖z_F‖ − z_P/‖z_P‖)²  over L2-normalised rows. (N, D) twice -> [0, 4/D].

    Unchanged when a row is scaled. A row of zeros has no direction and stays zero.
    """
    return (_unit_rows(student) - _unit_rows(teacher.detach())).square().mean()


def consistency_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """L_CR, NLG and NLU iclr2026:  T² · KL(softmax(Z_P/T) ‖ softmax(Z_F/T)),  mean over rows. (M, V) twice -> [0, ∞).

    T² keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531).
    """
    log_p = F.log_softmax(_wide(teacher.detach()) / temperature, dim=-1)
    log_f = F.log_softmax(_wide(student) / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_f)).sum(-1).mean()


def diversity_covariance(logits: Tensor) -> Tensor:
    """L_DR, NLU:  1/D · Σ_{i≠j} C_ij²,  C = Z̄ᵀ Z̄ / (N − 1),  Z̄ with centred columns. (N, D) -> [0, ∞).

    Unchanged when one vector is added to every row. One row has no covariance: 0.
    """
    Z = _wide(logits)
    N, D = Z.shape
    Z = Z - Z.mean(0)
    C = Z.T @ Z / max(N - 1, 1)
    return (C - C.diag().diag()).square().sum() / D


def diversity_entropy(logits: Tensor, top_k: int | None = None) -> Tensor:
    """L_DR, NLG:  −H(softmax(z)),  mean over rows; iclr2026 keeps the K largest logits only. (M, V) -> [−ln K, 0].

    top_k: None (2024) takes the whole vocabulary; otherwise the K largest are renormalised among themselves.
    """
    Z = _wide(logits)
    if top_k is not None:
        Z = Z.topk(min(top_k, Z.shape[-1]), dim=-1).values
    log_f = F.log_softmax(Z, dim=-1)
    return (log_f.exp() * log_f).sum(-1).mean()


def svd_sum(logits: Tensor, k: int) -> Tensor:
    """L_SVDR, NLU 2024:  −1/N · Σ_{i≤k} σ_i(Z). (N, D) -> (−∞, 0]; k beyond min(N, D) takes all there are."""
    return -_singular_values(logits)[:k].sum() / logits.shape[0]


def svd_share(logits: Tensor, k: int, norm: str = "nuclear") -> Tensor:
    """L_SVDR:  −Σ_{i≤k} σ_i / ‖Z‖, the leading singular values' share of the spectrum. (M, V) -> a negative number.

    norm "nuclear", ‖Z‖ = Σ_j σ_j (NLU iclr2026, NLG 2024): in [−1, −k/min(M, V)] for k ≤ min(M, V).
    norm "frobenius", ‖Z‖ = √Σ_j σ_j² (NLG iclr2026): in [−√k, 0), so not a share in the strict sense.
    Not additive over rows: the value depends on how a batch is cut. An all-zero matrix has no spectrum: 0.
    """
    sigma = _singular_values(logits)
    if norm not in ("nuclear", "frobenius"):
        raise ValueError(f"unknown norm {norm!r}: give nuclear or frobenius")
    total = sigma.sum() if norm == "nuclear" else torch.linalg.vector_norm(sigma)
    return -sigma[:k].sum() / torch.where(total > 0, total, 1.0)


def non_target_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """KL(P̃ ‖ F̃), mean over rows; P̃ and F̃ drop the ground-truth entry and renormalise the other V − 1. -> [0, ∞).

    student, teacher: (M, V), V ≥ 2; targets: (M,) integers in [0, V). The gradient with respect to a row's
    ground-truth logit is exactly 0, so the term never opposes the cross-entropy ("Mask the Target", arXiv 2605.29498).
    """
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, targets[:, None], True)
    log_p = F.log_softmax(_wide(teacher.detach()).masked_fill(is_target, -torch.inf), dim=-1)
    log_f = F.log_softmax(_wide(student).masked_fill(is_target, -torch.inf), dim=-1)
    log_ratio = (log_p - log_f).masked_fill(is_target, 0.0)  # −∞ − (−∞) where both are left out
    return (log_p.exp() * log_ratio).sum(-1).mean()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _unit_rows(logits: Tensor) -> Tensor:
    Z = _wide(logits)
    length = torch.linalg.vector_norm(Z, dim=-1, keepdim=True)
    return Z / torch.where(length > 0, length, 1.0)


def _singular_values(logits: Tensor) -> Tensor:
    """σ_1 ≥ σ_2 ≥ ...; the gradient U Vᵀ has no division by gaps, so equal or zero singular values are harmless.

    NaN or infinity in, NaN out, as in every other term: svdvals itself would raise, and hide which rows it was.
    """
    Z = _wide(logits)
    return torch.linalg.svdvals(Z) if Z.isfinite().all() else Z.sum() * Z.new_full((min(Z.shape),), torch.nan)
