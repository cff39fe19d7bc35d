"""The objective of BA-LoRA: L = L_task + λ1·L_CR + λ2·L_DR + λ3·L_SVDR (+ λ·non-target KL).

This file chooses the terms, their weights and how the weights change over a run; `regularizers.py` has the formulas.
"2024" is arXiv 2408.04556 v1 to v5, "iclr2026" the ICLR 2026 version, "Mask the Target" arXiv 2605.29498.

For generation, the 2024 papers and the authors' first code differ. Rows are predicted response tokens:

| term | the papers | the authors' first code | --recipe 2024 |
|---|---|---|---|
| KL | mean over rows | sum over all positions, with prompts and padding, divided by the batch | as the papers |
| entropy | of the rows | masked with labels that are not shifted: one position too late | as the papers |
| σ | of the rows, over Σ σ | if V > 4096, by randomised SVD (k + 5 columns, 2 iterations); over ‖Z‖_F | as the papers |

So in that code λ1 = 1e-4 weighs as much as 1e-4 · T here, if rows have T positions each, of similar KL. The
flags that come nearest to it, for T = 512: `--recipe 2024 --lambda1 0.05`. The norm ‖Z‖_F and the moving weights
have no flags: they are parts of iclr2026, as are the KL's T = 2 (`--temperature`) and the entropy's K = 20 (`--top-k`).
`--recipe 2024` and `--recipe iclr2026` follow the papers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibalora import fused
from minibalora import regularizers as R
from minibalora.fused import FrozenHead, fused_objective, mean_entropy


@dataclass(frozen=True)
class Objective:
    """The settings of L. A term whose λ is 0 is neither computed nor logged."""

    lambda1: float = 0.0  # consistency
    lambda2: float = 0.0  # diversity
    lambda3: float = 0.0  # leading singular values
    non_target_kl: float = 0.0
    router_aux: float = 0.0  # load balance of a mixture of experts, see `mixture.load_balance`; needs no logits
    consistency: str = "kl"  # or "mse" between L2-normalised rows
    temperature: float = 1.0  # of the KL
    top_k: int | None = None  # logits in the entropy (generation only); None, or 0 as in --top-k: the whole vocabulary
    svd_k: int = 10  # leading singular values in the spectral term
    svd_norm: str | None = "nuclear"  # or "frobenius": the norm that divides their sum; None: divide by N instead
    moving_lambdas: bool = False  # whether λ1, λ2 and λ3 follow the schedule in `lambdas`
    adaptive_lambda1: bool = False

    def __post_init__(self):
        if self.consistency not in ("kl", "mse") or self.svd_norm not in ("nuclear", "frobenius", None):
            raise ValueError(f"consistency {self.consistency!r} is kl or mse, svd_norm {self.svd_norm!r} is nuclear, "
                             "frobenius or None: give one of these")  # fmt: skip
        for name in ("lambda1", "lambda2", "lambda3", "non_target_kl", "router_aux"):
            if not (isinstance(λ := getattr(self, name), (int, float)) and 0 <= λ < math.inf):
                raise ValueError(f"{name} is {λ!r}: give a finite number, 0 or more")
        R.check_settings(self.svd_k, self.temperature)
        R.check_settings(self.top_k or 1)

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
    """Return the weight of each regularizer at `step` (from 0) of `steps`, by the name of its term.

    iclr2026 for generation: λ1 falls along a cosine from 1 to 0.1 of its value; λ2 and λ3 are 0 for the first 20 % of
    the steps and rise linearly over the next 5 %. Otherwise all are constant. Adaptive λ1 replaces the cosine by
    λ1_min + (λ1_max − λ1_min)·(1 − H̄/ln V), λ1_max = λ1, λ1_min = 0.1·λ1; teacher_share is H̄/ln V of this step.
    Beyond the last step, the weights stay. Raises ValueError for steps < 1 and a share outside [0, 1].
    """
    if steps < 1:
        raise ValueError(f"a run of {steps} steps: give 1 or more")
    falling = rising = 1.0
    if objective.moving_lambdas:
        progress = min(max(step / steps, 0.0), 1.0)
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        rising = min(max((progress - 0.2) / 0.05, 0.0), 1.0)
    if objective.adaptive_lambda1:
        if teacher_share is None or teacher_share < -1e-3 or teacher_share > 1 + 1e-3:  # 0 and 1 may be rounded
            raise ValueError(f"adaptive_lambda1 needs teacher_share, the mean of entropy_share, not {teacher_share}")
        falling = 0.1 + 0.9 * (1 - teacher_share)
    return {
        "consistency": objective.lambda1 * falling,
        "diversity": objective.lambda2 * rising,
        "svd": objective.lambda3 * rising,
        "non_target_kl": objective.non_target_kl,
    }


def nlg_loss(
    student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, weights: dict[str, float],
    svd_share: Callable[[Tensor, int, str], Tensor] = R.svd_share,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return L of generation and its terms by name, each a mean over the M rows. A term of weight 0 is left out.

    student, teacher: (M, V) logits of predicted response tokens; targets: (M,) these tokens. teacher may be None if
    `objective.needs_teacher` is false. The spectral term is not additive over rows: as in the paper's code, it is
    computed for each micro-batch and averaged over the step, weighted by rows. Cutting a step into other micro-batches
    changes no other term. Raises ValueError for a row without a target, for a teacher that is missing or of another
    shape, or for a consistency of unit rows.
    """
    _check_kl(objective)
    R.check_targets(student, targets)
    λ1, λ2, λ3, λ = (weights[name] for name in ("consistency", "diversity", "svd", "non_target_kl"))
    task = F.cross_entropy(student.to(torch.promote_types(student.dtype, torch.float32)), targets)
    consistency = R.consistency_kl(student, teacher, objective.temperature) if λ1 else 0.0
    diversity = R.diversity_entropy(student, objective.top_k or None) if λ2 else 0.0
    svd = svd_share(student, objective.svd_k, objective.svd_norm) if λ3 else 0.0
    non_target_kl = R.non_target_kl(student, teacher, targets) if λ else 0.0
    loss = task + λ1 * consistency + λ2 * diversity + λ3 * svd + λ * non_target_kl
    return loss, _present(task, consistency, diversity, svd, non_target_kl)


def _check_kl(objective: Objective) -> None:
    if objective.consistency != "kl":
        raise ValueError(f"consistency {objective.consistency!r} is for classes: give kl")


def nlu_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, weights: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L of classification and its terms by name, each a mean over the N examples, without terms of weight 0.

    student, teacher: (N, D) logits of one micro-batch, a column for each class; labels: (N,) classes. The covariance
    and the spectral term are not additive over examples: see `nlg_loss`. GLUE has D ≤ 3 classes and both recipes have
    k = 5 > D, so there the spectral share of iclr2026 is the constant −1, without gradient; the sum of 2024 is not.

    A base checkpoint has no classifier, so a new one is drawn and "the pre-trained model's logits" are a random
    projection of the pre-trained features. Consistency then keeps the student near these features as seen through the
    projection, not near a prediction: drawn with std 0.02, these logits are small (softmax of the built-in BERT's has
    0.999 of the largest entropy), so the KL mostly asks for even answers. The paper does the same; `--teacher folder`
    takes a fine-tuned model instead. `run/term_warnings.py` has the warnings of a run's plan. Raises ValueError for a
    label that is not a column, and for a teacher that is missing or of another shape.
    """
    if student.shape[1] == 1:
        return _regression_loss(student, teacher, labels, weights["consistency"])
    R.check_targets(student, labels)
    λ1, λ2, λ3, λ = (weights[name] for name in ("consistency", "diversity", "svd", "non_target_kl"))
    task = F.cross_entropy(student.to(torch.promote_types(student.dtype, torch.float32)), labels)
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
    """Return L for D = 1 (STS-B): mean squared error to the scores (N,), and to the teacher's scores as consistency.

    One column has no covariance, and its spectral share is always 1: these terms are left out. Raises ValueError if
    scores or teacher have another shape.
    """
    if scores.shape != student.shape[:1] or (λ1 and (teacher is None or teacher.shape != student.shape)):
        shape = None if teacher is None else list(teacher.shape)
        raise ValueError(f"student of shape {list(student.shape)}, teacher of shape {shape}, scores of shape "
                         f"{list(scores.shape)}: give the same rows")  # fmt: skip
    task = F.mse_loss(student[:, 0].float(), scores.float())
    consistency = F.mse_loss(student.float(), teacher.detach().float()) if λ1 else 0.0
    return task + λ1 * consistency, _present(task, consistency)


def _present(*terms: Tensor | float) -> dict[str, Tensor]:
    """Return name -> term in the order of L, without the terms that were not computed."""
    names = ("task", "consistency", "diversity", "svd", "non_target_kl")
    return {name: term for name, term in zip(names, terms, strict=False) if isinstance(term, Tensor)}


def lean_svd_share(logits: Tensor, k: int, norm: str) -> Tensor:
    """Return `regularizers.svd_share` of logits Z (M, V) from Z Zᵀ. An SVD of Z takes 7 times as long, for
    M = 100 and V = 64,000."""
    Z = R.rows(logits.detach(), may_mask=False)
    with torch.no_grad(), torch.autocast(Z.device.type, enabled=False):
        parts = (part.to(*fused.spectral_place(Z.device)) for part in Z.split(fused.ROOT_ROWS, dim=1))
        S = sum(part @ part.T for part in parts)
        share, gradient = fused.spectral_share(S, Z, k, norm, S.is_cpu)
    return fused.WithGradient.apply(logits, share.to(Z), gradient)


class WholeLogits:
    """The head for L on whole logits: `nlg_loss`. `head` maps states (M, d) to logits (M, V). It uses the paper's
    formulas alone if `is_plain`; otherwise the spectral term is `lean_svd_share`."""

    is_whole = True

    def __init__(self, head: Callable[[Tensor], Tensor], is_plain: bool = True):
        self.head = head
        self.svd_share = R.svd_share if is_plain else lean_svd_share

    def loss(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, weights: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `nlg_loss` returns. student, teacher: final states (M, d) of predicted response tokens."""
        teacher = None if teacher is None else self.head(teacher)
        return nlg_loss(self.head(student), teacher, targets, objective, weights, self.svd_share)

    def entropy_share(self, teacher: Tensor, temperature: float) -> Tensor:
        """Return the mean of H(softmax(z/T)) / ln V over the teacher's states (M, d), in [0, 1]."""
        return entropy_share(self.head(teacher), temperature).mean()


class LogitsInBlocks(FrozenHead):
    """The head for the lean form: the same numbers and gradients without the whole (M, V) logits, see fused.py."""

    is_whole = False

    def loss(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective, weights: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _check_kl(objective)
        return fused_objective(
            student, teacher, targets, self, lambda1=weights["consistency"], temperature=objective.temperature,
            lambda2=weights["diversity"], top_k=objective.top_k or None, lambda3=weights["svd"], svd_k=objective.svd_k,
            svd_norm=objective.svd_norm, non_target_kl=weights["non_target_kl"],
        )  # fmt: skip

    def entropy_share(self, teacher: Tensor, temperature: float) -> Tensor:
        return mean_entropy(teacher, self, temperature) / math.log(len(self.weight))


def head_of(model: nn.Module, is_plain: bool = False) -> WholeLogits | LogitsInBlocks:
    """Return the head that computes L of a language model. It takes whole logits if `is_plain`, if the head is trained,
    or if it caps its logits (Gemma 2): the lean form needs logits that are states times a frozen weight."""
    if is_plain or model.head_weight.requires_grad or model.config.logit_cap is not None:
        return WholeLogits(model.head, is_plain)
    return LogitsInBlocks(model.head_weight)


def entropy_share(logits: Tensor, temperature: float) -> Tensor:
    """Return H(softmax(z/T)) / ln V of each row, in [0, 1]: how uncertain the teacher is. (M, V) -> (M,)."""
    R.check_settings(temperature=temperature)
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1) / math.log(logits.shape[-1])
