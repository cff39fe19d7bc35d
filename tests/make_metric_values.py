"""Make `tests/golden/metrics.json`: metrics of degenerate and of random predictions by scikit-learn and SciPy.

Run `python tests/make_metric_values.py` in an environment with both, which the package itself never imports. NaN is
written as null.
"""

import json
import math
import warnings
from pathlib import Path

import numpy as np
from scipy.linalg import svdvals
from scipy.stats import binomtest, entropy, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score

warnings.simplefilter("ignore")  # some cases have constant input on purpose

CLASSES = [  # predicted, gold
    ([1], [1]),
    ([1], [0]),
    ([0, 0], [0, 0]),
    ([0, 1], [1, 0]),
    ([1, 1, 1], [0, 1, 1]),
    ([0, 0, 0, 0], [0, 1, 0, 1]),
    ([0, 1, 1, 0, 1], [1, 1, 1, 1, 1]),
    ([1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1]),
    ([2, 0, 2, 1, 2, 0], [2, 1, 2, 1, 0, 0]),
    ([2, 2, 2, 2], [0, 1, 2, 0]),
    ([0, 1, 1, 0], [0, 1, 3, 3]),
]
SCORES = [
    ([1.0, 2.0], [3.0, 2.5]),
    ([1.0, 2.0, 2.0, 4.0], [5.0, 0.0, 0.0, 3.75]),
    ([0.0, 0.0, 0.0, 1.0], [2.5, 2.5, 1.0, 2.5]),
    ([3.0, 3.0, 3.0], [1.0, 2.0, 3.0]),
    ([0.1, 0.1, 0.1], [0.2, 0.2, 0.2]),
    ([1e6 + 1, 1e6 + 2, 1e6 + 4], [1.0, 5.0, 2.0]),
    ([-1.0, 0.5, 9.0, 2.0, 5.0], [5.0, 4.0, 0.0, 3.0, 1.0]),
]
MATRICES = [
    [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]],
    [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]],
    [[5.0]],
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1e-3]],
]
SHARES = [(0, 1), (1, 1), (0, 20), (20, 20), (1, 7), (56, 164), (812, 1319), (3, 100_000)]  # right, total


def classification(predicted: list[int], gold: list[int]) -> dict:
    values = {"accuracy": accuracy_score(gold, predicted), "matthews": matthews_corrcoef(gold, predicted)}
    if max(predicted + gold) < 2:
        values["f1"] = f1_score(gold, predicted, zero_division=0)
    present = sorted(set(gold))
    recall = recall_score(gold, predicted, labels=present, average=None)
    recalls = [float(recall[present.index(k)]) if k in present else None for k in range(max(predicted + gold) + 1)]
    values = {name: float(value) for name, value in values.items()} | {"recalls": recalls}
    return {"predicted": predicted, "gold": gold, "expected": values}


def regression(predicted: list[float], gold: list[float]) -> dict:
    values = {"pearson": pearsonr(predicted, gold)[0], "spearman": spearmanr(predicted, gold)[0]}
    expected = {name: None if math.isnan(value) else float(value) for name, value in values.items()}
    return {"predicted": predicted, "gold": gold, "expected": expected}


def spectrum(logits: list[list[float]]) -> dict:
    return {"logits": logits, "effective_rank": float(np.exp(entropy(svdvals(logits))))}


def interval(right: int, total: int) -> dict:
    low, high = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return {"right": right, "total": total, "low": low, "high": high}


def main() -> None:
    random = np.random.default_rng(42)
    for classes, count in ((2, 40), (2, 300), (3, 60), (5, 25)):
        predicted, gold = random.integers(classes, size=(2, count))
        CLASSES.append((np.where(random.random(count) < 0.5, gold, predicted).tolist(), gold.tolist()))
    for count in (5, 100):
        gold = random.integers(0, 26, count) / 5  # many ties, as in STS-B
        SCORES.append(((gold + random.normal(size=count)).round(1).tolist(), gold.tolist()))
    MATRICES.append(random.normal(size=(12, 3)).round(3).tolist())
    values = {
        "classification": [classification(*case) for case in CLASSES],
        "regression": [regression(*case) for case in SCORES],
        "spectra": [spectrum(case) for case in MATRICES],
        "intervals": [interval(*case) for case in SHARES],
    }
    lines = ",\n".join(f'"{kind}": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]" for kind, cases in values.items())
    (Path(__file__).parent / "golden" / "metrics.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
