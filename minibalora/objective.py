"""What BA-LoRA minimises: L = L_task + λ1·L_CR + λ2·L_DR + λ3·L_SVDR (+ λ·non-target KL).

This file chooses the terms, their weights and how the weights move over a run; `regularizers.py` has the formulas.
"2024" is arXiv 2408.04556 v1 to v5, "iclr2026" the ICLR 2026 version, "Mask the Target" arXiv 2605.29498.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibalora import regularizers as R
from minibalora.fused import FrozenHead, fused_objective, mean_entropy


@dataclass(frozen=True)
class Objective:
    """The settings of L. A term whose λ is 0 is neither computed nor logged."""

    lambda1: float = 0.0  # consistency
    lambda2: float = 0.0  # diversity
    lambda3: float = 0.0  # leading singular values
    non_target_kl: float = 0.0
    router_aux: float = 0.0  # of a mixture of experts: `mixture.load_balance`, which needs no logits
    consistency: str = "kl"  # or "mse", of rows of length 1
    temperature: float = 1.0  # of the KL
    top_k: int | None = None  # of the entropy (generation only); None = the whole vocabulary
    svd_k: int = 10
    svd_norm: str | None = "nuclear"  # what the leading values are a share of; None: no share, their sum over N
    moving_lambdas: bool = False  # the schedule of `lambdas`
    adaptive_lambda1: bool = False

    @property
    def needs_teacher(self) -> bool:
        return self.lambda1 > 0 or self.non_target_kl > 0


NLG_RECIPES = {
    "2024": Objective(1e-4, 3e-4, 1e-4),
    "iclr2026": Objective(0.025, 0.005, 0.005, temperature=2.0, top_k=20, svd_norm="frobenius", moving_lambdas=True),
}
NLU_RECIPES = {
    "2024": Objective(1e-4, 4e-4, 1e-4, consistency="mse", svd_k=5, svd_norm=None),
    "iclr2026": Objective(0.15, 0.03, 0.03, svd_k=5),
}


def lambdas(objective: Objective, step: int, steps: int, teacher_share: float | None = None) -> dict[str, float]:
    """The weight of each regularizer at `step` of `steps` (counted from 0), by the name of its term.

    iclr2026: λ1 falls along a cosine from 1 to 0.1 of its value; λ2 and λ3 are 0 for the first 20 % of the steps and
    rise linearly over the next 5 %. 2024: constant. With adaptive λ1 the cosine gives way to
    λ1_min + (λ1_max − λ1_min)·(1 − H̄/ln V), λ1_max = λ1, λ1_min = 0.1·λ1; teacher_share is H̄/ln V of this step.
    """
    falling = rising = 1.0
    if objective.moving_lambdas:
        progress = step / steps
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        rising = min(max((progress - 0.2) / 0.05, 0.0), 1.0)
    if objective.adaptive_lambda1:
        falling = 0.1 + 0.9 * (1 - teacher_share)
    return {
        "consistency": objective.lambda1 * falling,
        "diversity": objective.lambda2 * rising,
        "svd": objective.lambda3 * rising,
        "non_target_kl": objective.non_target_kl,
    }


def nlg_loss(
    student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, weights: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """L of text, and its terms by name, without those whose weight is 0; each a mean over the M rows.

    student, teacher: (M, V) logits of predicted response tokens; targets: (M,) those tokens; teacher is None where
    `objective.needs_teacher` is false. The spectral term is not additive over rows: it is taken per micro-batch, as in
    the paper's code, and a step averages it weighted by rows. All others are the same however a step is cut.
    """
    λ1, λ2, λ3, λ = (weights[name] for name in ("consistency", "diversity", "svd", "non_target_kl"))
    task = F.cross_entropy(student.to(torch.promote_types(student.dtype, torch.float32)), targets)
    consistency = R.consistency_kl(student, teacher, objective.temperature) if λ1 else 0.0
    diversity = R.diversity_entropy(student, objective.top_k) if λ2 else 0.0
    svd = R.svd_share(student, objective.svd_k, objective.svd_norm) if λ3 else 0.0
    non_target_kl = R.non_target_kl(student, teacher, targets) if λ else 0.0
    loss = task + λ1 * consistency + λ2 * diversity + λ3 * svd + λ * non_target_kl
    return loss, _present(task, consistency, diversity, svd, non_target_kl)


def nlu_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, weights: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """L of classes, and its terms by name, without those whose weight is 0; each a mean over the N examples.

    student, teacher: (N, D) logits of one micro-batch, one column a class; labels: (N,) classes. The covariance and the
    spectral term are not additive over examples: see `nlg_loss`. GLUE has D ≤ 3 classes and both recipes k = 5 > D, so
    iclr2026's spectral share is the constant −1 there, without a gradient; 2024's sum is not.

    What the teacher says of a base checkpoint: its classifier is new, so "the pre-trained model's logits" are a random
    projection of the pre-trained features. Consistency then means to stay near those features as seen through that
    projection, not to keep a prediction. That is what the paper does; `--teacher folder` takes a fine-tuned model.
    """
    if student.shape[1] == 1:
        return _regression_loss(student, teacher, labels, weights["consistency"])
    λ1, λ2, λ3, λ = (weights[name] for name in ("consistency", "diversity", "svd", "non_target_kl"))
    task = F.cross_entropy(student.float(), labels)
    consistency = svd = 0.0
    if λ1:
        is_kl = objective.consistency == "kl"
        consistency = (
            R.consistency_kl(student, teacher, objective.temperature) if is_kl else R.consistency_mse(student, teacher)
        )
    if λ3:
        k, norm = objective.svd_k, objective.svd_norm
        svd = R.svd_sum(student, k) if norm is None else R.svd_share(student, k, norm)
    diversity = R.diversity_covariance(student) if λ2 else 0.0
    non_target_kl = R.non_target_kl(student, teacher, labels) if λ else 0.0
    loss = task + λ1 * consistency + λ2 * diversity + λ3 * svd + λ * non_target_kl
    return loss, _present(task, consistency, diversity, svd, non_target_kl)


def _regression_loss(
    student: Tensor, teacher: Tensor | None, scores: Tensor, λ1: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """D = 1 (STS-B): the task is the mean squared error to the scores (N,), and consistency that to the teacher's.

    One column has no covariance and a spectral share of 1: these terms are left out.
    """
    task = F.mse_loss(student[:, 0].float(), scores.float())
    consistency = F.mse_loss(student.float(), teacher.float()) if λ1 else 0.0
    return task + λ1 * consistency, _present(task, consistency)


def _present(*terms: Tensor | float) -> dict[str, Tensor]:
    """Name -> term, of those that were computed, in the order of L."""
    names = ("task", "consistency", "diversity", "svd", "non_target_kl")
    return {name: term for name, term in zip(names, terms, strict=False) if isinstance(term, Tensor)}


class WholeLogits:
    """L of text in the plain form: (M, V) logits, and the formulas on them. `head`: states (M, d) -> logits (M, V)."""

    is_whole = True

    def __init__(self, head: Callable[[Tensor], Tensor]):
        self.head = head

    def loss(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, weights: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L and its terms, as `nlg_loss` has them, from final states (M, d) of predicted response tokens."""
        teacher = None if teacher is None else self.head(teacher)
        return nlg_loss(self.head(student), teacher, targets, objective, weights)

    def entropy_share(self, teacher: Tensor, temperature: float) -> Tensor:
        """The mean over the teacher's states (M, d) of H(softmax(z/T)) / ln V, in [0, 1]."""
        return entropy_share(self.head(teacher), temperature).mean()


class LogitsInBlocks(FrozenHead):
    """The same numbers and their gradient without ever holding the (M, V) logits, see fused.py."""

    is_whole = False

    def loss(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, weights: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return fused_objective(
            student,
            teacher,
            targets,
            self,
            lambda1=weights["consistency"],
            temperature=objective.temperature,
            lambda2=weights["diversity"],
            top_k=objective.top_k,
            lambda3=weights["svd"],
            svd_k=objective.svd_k,
            svd_norm=objective.svd_norm,
            non_target_kl=weights["non_target_kl"],
        )

    def entropy_share(self, teacher: Tensor, temperature: float) -> Tensor:
        return mean_entropy(teacher, self, temperature) / math.log(len(self.weight))


def head_of(model: nn.Module, is_plain: bool = False) -> WholeLogits | LogitsInBlocks:
    """What computes L of a language model: in blocks, unless the plain form is asked for, or the head is trained or
    caps its logits (Gemma 2), so that they are not the product of states and a frozen weight."""
    if is_plain or model.head_weight.requires_grad or model.config.logit_cap is not None:
        return WholeLogits(model.head)
    return LogitsInBlocks(model.head_weight)


def entropy_share(logits: Tensor, temperature: float) -> Tensor:
    """H(softmax(z/T)) / ln V of each row, in [0, 1]: how unsure the teacher is. (M, V) -> (M,)."""
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])
