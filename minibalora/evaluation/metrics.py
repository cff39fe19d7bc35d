"""The metrics of GLUE and of the generation benchmarks.

`predicted` and `gold` have one entry per example, and at least one entry. Classes are integers from 0.
"""

import math

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Return the share of correct predictions, in [0, 1]."""
    predicted, gold = _paired(predicted, gold)
    return float(np.mean(predicted == gold))


def f1(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Return 2·TP / (2·TP + FP + FN) of class 1, in [0, 1]; 0 if neither side contains class 1."""
    predicted, gold = _paired(predicted, gold)
    positives = int((predicted == 1).sum() + (gold == 1).sum())  # TP + FP and TP + FN
    return 2 * int(((predicted == 1) & (gold == 1)).sum()) / positives if positives else 0.0


def matthews(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Return the Matthews correlation of any number of classes (Gorodkin 2004), in [-1, 1].

    (N·c − Σ_k p_k·g_k) / √((N² − Σ_k p_k²)·(N² − Σ_k g_k²)), where c of N predictions are correct and class k is
    predicted p_k times and correct g_k times. Returns 0 if either side has only one class.
    """
    predicted, gold = _paired(predicted, gold)
    right, total = int((predicted == gold).sum()), len(gold)
    # Python's integers: products of four counts overflow 64 bits from 55,000 rows on.
    counts = [(int((predicted == k).sum()), int((gold == k).sum())) for k in np.union1d(predicted, gold)]
    covariance = total * right - sum(p * g for p, g in counts)
    variances = (total**2 - sum(p * p for p, _ in counts)) * (total**2 - sum(g * g for _, g in counts))
    return covariance / math.sqrt(variances) if variances else 0.0


def pearson(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Return the linear correlation Σ x·y / √(Σ x²·Σ y²) of the centred scores, in [-1, 1].

    Returns NaN, like SciPy, if a side is constant (as with one example) or not finite.
    """
    x, y = (scores.astype(np.float64) for scores in _paired(predicted, gold))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x / np.linalg.norm(x) @ (y / np.linalg.norm(y)), -1, 1))


def spearman(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Return Pearson's correlation of the ranks, in [-1, 1]; ties get their mean rank. NaN as in `pearson`."""
    return pearson(_ranks(predicted), _ranks(gold))


def recalls(predicted: ArrayLike, gold: ArrayLike, classes: int) -> list[float | None]:
    """Return the share of each class's examples that are predicted correctly, in [0, 1]; None without examples."""
    predicted, gold = _paired(predicted, gold)
    return [float(np.mean(predicted[gold == k] == k)) if (gold == k).any() else None for k in range(classes)]


def calibration_error(confidence: ArrayLike, is_right: ArrayLike, bins: int = 10) -> float:
    """Return the expected calibration error in [0, 1] (arXiv 1706.04599, equation 3): Σ_b n_b / N · |right_b − conf_b|.

    Bin b has the n_b predictions whose confidence is in ((b − 1) / bins, b / bins]; right_b is the share of them that
    are right, and conf_b their mean confidence. confidence: the probabilities of the predicted classes.
    """
    confidence, is_right = _paired(np.asarray(confidence, dtype=np.float64), is_right)
    numbers = np.ceil(confidence * bins).astype(int)  # 0 for a confidence of 0 only
    return float(np.abs(np.bincount(numbers, weights=is_right - confidence)).sum() / len(confidence))


def effective_rank(logits: ArrayLike) -> float:
    """Return exp(−Σ p_i ln p_i), p_i = σ_i / Σ_j σ_j, of finite logits (N, D) (Roy & Vetterli 2007), in [1, min(N, D)].

    It is min(N, D) if all singular values are equal, 1 if only one is not 0, and 0 for the zero matrix.
    """
    sigma = np.linalg.svd(np.asarray(logits, dtype=np.float64), compute_uv=False)
    sigma = sigma[sigma > 0]
    p = sigma / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(sigma) else 0.0


def _paired(predicted: ArrayLike, gold: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, gold = np.asarray(predicted), np.asarray(gold)
    assert predicted.shape == gold.shape == (gold.size,) and gold.size > 0, "one prediction for each gold label"
    return predicted, gold


def _ranks(values: ArrayLike) -> np.ndarray:
    """Return ranks from 1; the rank of NaN is NaN."""
    values = np.asarray(values, dtype=np.float64)
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(sizes) - (sizes - 1) / 2
    return np.where(np.isnan(values), np.nan, ranks[group])


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the chance that at least one of k samples passes, 1 − C(n − c, k) / C(n, k) (arXiv 2107.03374).

    It is the unbiased estimate from n samples of which c passed; 1 <= k <= n.
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def wilson(share: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval (1927), by default of 95 %, for a share measured on `total` cases; within [0, 1]."""
    centre = share + z * z / (2 * total)
    width = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)
