"""Warnings of a plan: the terms of L that can't help at the sizes of a run, each with what to do about it."""

import math
from dataclasses import replace
from statistics import median

from minibalora.objective import Objective

MORE_ROWS = "a --micro-batch-size and --batch-size of {} or more"
RANDOM = (
    "the teacher's classifier is new and random, so the term pulls towards answers that say nothing about the labels: "
)
RANDOM += "give --teacher DIR, a fine-tuned model, or "


def nlu_warnings(objective: Objective, classes: int, rows: int, has_random_teacher: bool) -> list[str]:
    """Return a line for each such term of `nlu_loss`.

    classes: D, 1 for a regression; rows: N of a full micro-batch; has_random_teacher: whether the teacher has a new
    classifier, drawn from the seed.
    """
    if classes == 1:
        objective = replace(objective, lambda2=0.0, lambda3=0.0)  # which `nlu_loss` leaves out
    lines = []
    if has_random_teacher and objective.lambda1 > 0:
        lines.append(f"consistency: {RANDOM}--lambda1 0")
    if has_random_teacher and objective.non_target_kl > 0:
        lines.append(f"non-target KL: {RANDOM}--non-target-kl 0")
    if objective.lambda2 > 0 and rows == 1:
        lines.append("covariance: always 0 with 1 row in a micro-batch, so it changes nothing: give "
                     f"{MORE_ROWS.format(2)}, or --lambda2 0")  # fmt: skip
    sizes = [(classes, f"{classes} classes"), (rows, f"{rows} row{'s' * (rows > 1)} in a micro-batch")]
    return lines + _spectral(objective, rows, 1, classes, sizes)


def nlg_warnings(objective: Objective, rows: int, tokens: list[int]) -> list[str]:
    """Return a line for each such term of `nlg_loss`.

    rows: in a full micro-batch; tokens: the number of response tokens of every row of the data. Their median
    decides whether the spectral term of most micro-batches is meant.
    """
    lines, of_row = [], round(median(tokens))
    if objective.lambda2 > 0 and objective.top_k == 1:
        lines.append("entropy: always 0 with --top-k 1, so it changes nothing: give --top-k 2 or more, or --lambda2 0")
    count = of_row * min(rows, len(tokens))
    sizes = [(count, f"{count} response token{'s' * (count > 1)} in most micro-batches")]
    return lines + _spectral(objective, count, of_row, math.inf, sizes)


def _spectral(objective: Objective, rows: int, of_row: int, columns: float, sizes: list[tuple[int, str]]) -> list[str]:
    """Return the warning of the spectral term, if it sums all singular values of a micro-batch's logits.

    rows, columns: of these logits; of_row: rows of logits for each row of the data; sizes: number and name of what can
    be too small for --svd-k. The sum over N (2024's classifiers) is no share: it changes with the logits' size.
    """
    k, norm = objective.svd_k, objective.svd_norm
    if objective.lambda3 == 0 or norm is None or min(rows, columns) > k:
        return []
    where = f"with --svd-k {k} and {' and '.join(name for size, name in sizes if size <= k)}"
    effect = f"always -1 {where}, so it changes nothing"
    if norm == "frobenius" and min(rows, columns) > 1:
        effect = f"a sum of all singular values {where}, so it favours equal ones instead of a few strong ones"
    ways = []
    if columns > k + 1:
        ways.append(MORE_ROWS.format(k // of_row + 1))
    if rows > 1 and columns > 2:
        most = min(rows - 1, columns - 2)  # adding a number to each row, which changes no answer, gives rank D − 1
        ways.append(f"--svd-k {most}" + (" or less" if most > 1 else ""))
    if not ways and columns > 2:
        ways.append(f"{MORE_ROWS.format(2)} with --svd-k 1")
    if columns == 2:
        effect += ", and with --svd-k 1 adding a number to both logits would do, which changes no answer"
    return [f"{norm} share: {effect}: give {', or '.join([*ways, '--lambda3 0'])}"]
