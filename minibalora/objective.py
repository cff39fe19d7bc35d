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
from minibalora.fused import FrozenHead, fused_objective

IGNORED = -100  # the label of what is never predicted: prompt and padding


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


def predicted_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of padded rows, as `data.collate` has them: position t predicts token t + 1. (Packed ones: `data.pack`.)

    hidden: (B, T, d) states (or logits); labels: (B, T), the input ids with IGNORED on prompt and padding.
    Returns (M, d) states whose *next* token is a response token, and those (M,) tokens.
    """
    is_next_response = labels[:, 1:] != IGNORED
    return hidden[:, :-1][is_next_response], labels[:, 1:][is_next_response]


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


def nlg_terms(
    student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, weights: dict[str, float]
) -> dict[str, Tensor]:
    """Every term whose weight is not 0, and the cross-entropy as "task"; each a mean over the M rows.

    student, teacher: (M, V) logits of predicted response tokens; targets: (M,) those tokens; teacher is None where
    `objective.needs_teacher` is false. The spectral term is not additive over rows: it is taken per micro-batch, as in
    the paper's code, and a step averages it weighted by rows. All others are the same however a step is cut.
    """
    formulas = {
        "consistency": lambda: R.consistency_kl(student, teacher, objective.temperature),
        "diversity": lambda: R.diversity_entropy(student, objective.top_k),
        "svd": lambda: R.svd_share(student, objective.svd_k, objective.svd_norm),
        "non_target_kl": lambda: R.non_target_kl(student, teacher, targets),
    }
    task = F.cross_entropy(student.to(torch.promote_types(student.dtype, torch.float32)), targets)
    return {"task": task} | {name: formula() for name, formula in formulas.items() if weights[name] != 0}


def head_of(model: nn.Module) -> FrozenHead | Callable[[Tensor], Tensor]:
    """What `nlg_loss` takes of a language model: its frozen head, or a function where there are whole logits to take,
    for the head is trained or caps them (Gemma 2), and then they are no product of states and weight."""
    if model.head_weight.requires_grad or model.config.logit_cap is not None:
        return model.head
    return FrozenHead(model.head_weight)


def nlg_loss(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    head: FrozenHead | Callable[[Tensor], Tensor],
    objective: Objective,
    weights: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """L and its terms, as `nlg_terms` has them, from final hidden states (M, d) of predicted response tokens.

    head: see `head_of`. With a FrozenHead no (M, V) logits ever exist (see `fused.py`, which gives the same numbers);
    of a function from states to logits the plain formulas are taken.
    """
    if not isinstance(head, FrozenHead):
        terms = nlg_terms(head(student), None if teacher is None else head(teacher), targets, objective, weights)
        return weighted_sum(terms, weights), terms
    return fused_objective(
        student,
        teacher,
        targets,
        head,
        lambda1=weights["consistency"],
        temperature=objective.temperature,
        lambda2=weights["diversity"],
        top_k=objective.top_k,
        lambda3=weights["svd"],
        svd_k=objective.svd_k,
        svd_norm=objective.svd_norm,
        non_target_kl=weights["non_target_kl"],
    )


def nlu_terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, weights: dict[str, float]
) -> dict[str, Tensor]:
    """Every term whose weight is not 0, and the task's loss as "task"; each a mean over the N examples.

    student, teacher: (N, D) logits of one micro-batch, one column a class; labels: (N,) classes. The covariance and the
    spectral term are not additive over examples: see `nlg_terms`. GLUE has D ≤ 3 classes and both recipes k = 5 > D, so
    iclr2026's spectral share is the constant −1 there, without a gradient; 2024's sum is not.

    D = 1 is regression (STS-B): labels are (N,) scores, the task is their mean squared error, and so is consistency,
    with the teacher's scores. One column has no covariance and a spectral share of 1: these terms are left out.

    What the teacher says of a base checkpoint: its classifier is new, so "the pre-trained model's logits" are a random
    projection of the pre-trained features. Consistency then means to stay near those features as seen through that
    projection, not to keep a prediction. That is what the paper does; `--teacher folder` takes a fine-tuned model.
    """
    if student.shape[1] == 1:
        consistency = {"consistency": lambda: F.mse_loss(student.float(), teacher.float())}
        task, formulas = F.mse_loss(student[:, 0].float(), labels.float()), consistency
    else:
        task = F.cross_entropy(student.float(), labels)
        is_kl, is_share = objective.consistency == "kl", objective.svd_norm is not None
        formulas = {
            "consistency": lambda: (
                R.consistency_kl(student, teacher, objective.temperature)
                if is_kl
                else R.consistency_mse(student, teacher)
            ),
            "diversity": lambda: R.diversity_covariance(student),
            "svd": lambda: (
                R.svd_share(student, objective.svd_k, objective.svd_norm)
                if is_share
                else R.svd_sum(student, objective.svd_k)
            ),
            "non_target_kl": lambda: R.non_target_kl(student, teacher, labels),
        }
    return {"task": task} | {name: formula() for name, formula in formulas.items() if weights[name] != 0}


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """L of the given terms; the task counts once."""
    return terms["task"] + sum(weights[name] * term for name, term in terms.items() if name != "task")


def entropy_share(logits: Tensor, temperature: float) -> Tensor:
    """H(softmax(z/T)) / ln V of each row, in [0, 1]: how unsure the teacher is. (M, V) -> (M,)."""
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])
