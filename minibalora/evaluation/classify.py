"""What a classifier answers to labelled texts, and how good the answers are."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minibalora.base.errors import InputError
from minibalora.data.glue import Task, fold
from minibalora.data.labelled import ClassRow, padded
from minibalora.evaluation import metrics
from minibalora.lowrank import evaluating


@torch.no_grad()
def answers(
    model: nn.Module, rows: list[ClassRow], batch_size: int, device: torch.device | str, part: Callable | None = None
) -> Tensor:
    """The logits (N, D) of all rows, in their order, on the CPU in float32, without dropout.

    part: what to call in place of the model, as `model.features` for the states (N, d) that the head reads. Raises
    InputError if the answers are not finite, as after a step that was too large.
    """
    # Rows of similar length share a batch: less padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    found = []
    with evaluating(model):
        for start in tqdm(range(0, len(rows), batch_size), desc="answers", dynamic_ncols=True, leave=False, delay=2):
            inputs, _ = padded([rows[index] for index in order[start : start + batch_size]], model, device)
            found.append((part or model)(*inputs).float().cpu())
    found = torch.cat(found)[torch.tensor(order).argsort()]
    if not found.isfinite().all():
        raise InputError("the model's answers are not finite: lower --lr, or use --dtype float32")
    return found


def class_scores(
    logits: Tensor, rows: list[ClassRow], task: Task, is_folded: bool, batch_size: int
) -> dict[str, float]:
    """What GLUE reports for the task, accuracy, each class's recall, and the ranks of batches of logits.

    is_folded: the labels only tell class 0 from all others, so predictions are folded, too (`glue.fold`). Rank and
    effective rank (`metrics.effective_rank`) are means over the (batch_size, D) logits of rows that follow each other.
    NaN where a correlation is not defined and where a class has no example.
    """
    gold = np.array([row.label for row in rows])
    if task.labels is None:
        return {name: getattr(metrics, name)(logits[:, 0].numpy(), gold) for name in task.metrics}
    predicted, labels, names = logits.argmax(1).numpy(), task.labels, dict.fromkeys((*task.metrics, "accuracy"))
    if is_folded:
        predicted, labels, names = np.array(fold(predicted.tolist())), (labels[0], f"not {labels[0]}"), ["accuracy"]
    found = {name: getattr(metrics, name)(predicted, gold) for name in names}
    recalls = metrics.recalls(predicted, gold, len(labels))
    found |= {
        f"recall of {label}": math.nan if recall is None else recall
        for label, recall in zip(labels, recalls, strict=True)
    }
    batches = logits.split(batch_size)
    found["rank of batch logits"] = float(np.mean([torch.linalg.matrix_rank(batch) for batch in batches]))
    found["effective rank of them"] = float(np.mean([metrics.effective_rank(batch) for batch in batches]))
    return found


def dev_metric(found: dict[str, float], task: Task) -> float:
    """The number that chooses the best epoch: the mean of what GLUE reports for the task, as in GLUE's own score."""
    return float(np.mean([found[name] for name in task.metrics]))
