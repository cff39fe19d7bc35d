"""Compute a classifier's answers to labelled texts, and their scores."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minibalora.base import progress
from minibalora.base.errors import InputError
from minibalora.base.files import replacing, write_json
from minibalora.checkpoints.tokenizer import load_tokenizer
from minibalora.checkpoints.weights import load_model, weights_digest
from minibalora.data.batches import check_fits
from minibalora.data.glue import LabelledText, Task, fold
from minibalora.data.labelled import ClassRow, encode, padded, unknown_share
from minibalora.data.sets import EvalSet, class_order
from minibalora.evaluation import metrics
from minibalora.lowrank import evaluating
from minibalora.run.settings import ClassSource, Hardware


@torch.no_grad()
def answers(
    model: nn.Module, rows: list[ClassRow], batch_size: int, device: torch.device | str, part: Callable | None = None
) -> Tensor:
    """Return the logits (N, D) of all rows, in their order, on the CPU in float32, without dropout.

    part: called instead of the model, for instance `model.features` for the states (N, d) that the head reads. Raises
    InputError if the answers are not finite, for instance after a step that was too large.
    """
    # Rows of similar length share a batch, which needs less padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    parts = []
    with evaluating(model):
        for start in progress.over(range(0, len(rows), batch_size), "answers", "batch", delay=2):
            inputs, _ = padded([rows[index] for index in order[start : start + batch_size]], model, device)
            parts.append((part or model)(*inputs).float().cpu())
    logits = torch.cat(parts)[torch.tensor(order).argsort()]
    if not logits.isfinite().all():
        raise InputError("the model's answers are not finite: use --dtype float32, or train with a lower --lr")
    return logits


def class_scores(
    logits: Tensor, rows: list[ClassRow], task: Task, is_folded: bool, batch_size: int
) -> dict[str, float]:
    """Return GLUE's metrics of the task, accuracy, each class's recall, and the ranks of batches of logits.

    is_folded: the labels distinguish only class 0 from all others, so predictions are folded too (`glue.fold`). Rank
    and effective rank (`metrics.effective_rank`) are means over the (batch_size, D) logits of consecutive rows. An
    undefined correlation is NaN, and so is the recall of a class without examples.
    """
    gold = np.array([row.label for row in rows])
    if task.labels is None:
        return {name: getattr(metrics, name)(logits[:, 0].numpy(), gold) for name in task.metrics}
    predicted, labels, names = logits.argmax(1).numpy(), task.labels, dict.fromkeys((*task.metrics, "accuracy"))
    if is_folded:
        predicted, labels, names = np.array(fold(predicted.tolist())), (labels[0], f"not {labels[0]}"), ["accuracy"]
    scores = {name: getattr(metrics, name)(predicted, gold) for name in names}
    recalls = metrics.recalls(predicted, gold, len(labels))
    scores |= {
        f"recall of {label}": math.nan if recall is None else recall
        for label, recall in zip(labels, recalls, strict=True)
    }
    batches = logits.split(batch_size)
    scores["rank of batch logits"] = float(np.mean([torch.linalg.matrix_rank(batch) for batch in batches]))
    scores["effective rank of them"] = float(np.mean([metrics.effective_rank(batch) for batch in batches]))
    return scores


def dev_metric(scores: dict[str, float], task: Task) -> float:
    """Return the number that chooses the best epoch: the mean of the task's metrics, as in GLUE's own score."""
    return float(np.mean([scores[name] for name in task.metrics]))


def scores_of_sets(
    answer: Callable[[list[ClassRow]], Tensor], task: Task, batch_size: int, eval_sets: list[EvalSet]
) -> dict[str, dict[str, float]]:
    """Return the `class_scores` of each evaluation set by its name. answer: rows -> logits, see `answers`."""
    return {dev.name: class_scores(answer(dev.rows), dev.rows, task, dev.is_folded, batch_size) for dev in eval_sets}


# A fine-tuned teacher.


def teacher_digest(folder: str | None) -> str | None:
    """Return the digest of the fine-tuned checkpoint that --teacher names; None if it names none."""
    if folder in (None, "pretrained"):
        return None
    if not Path(folder).is_dir():
        raise InputError(f"--teacher {folder}: no such folder: give pretrained or a fine-tuned checkpoint")
    return weights_digest(folder)


def fine_tuned_logits(
    source: ClassSource, task: Task, examples: list[LabelledText], hardware: Hardware, batch_size: int
) -> Tensor:
    """Return the logits (N, D) of the teacher in `source.teacher` for every example, in the task's order of classes.

    Uses the teacher's own tokenizer. Raises InputError if it has no trained head, or a head for other classes.
    """
    folder, classes = source.teacher, 1 if task.labels is None else len(task.labels)
    teacher = load_model(folder, "classifier", None, hardware.dtype, hardware.device)
    if new := teacher.checkpoint.new_modules:
        raise InputError(f"--teacher {folder}: has no trained {new[0]}: give a fine-tuned model")
    if teacher.num_labels != classes:
        counts = f"has {teacher.num_labels} classes, but {task.name} has {classes}"
        raise InputError(f"--teacher {folder}: {counts}: give a model fine-tuned on {task.name}")
    order = class_order(folder, task)
    if order is None:
        names = f"config.json names other classes (id2label) than {task.name}"
        raise InputError(f"--teacher {folder}: {names}: give a model fine-tuned on {task.name}, or correct the names")
    tok = load_tokenizer(folder)
    rows, _ = encode(examples, tok, source.max_length)
    check_fits(rows, source.data, teacher.config, source.max_length, folder)
    unknown_share(rows, tok, source.data, folder)
    return answers(teacher, rows, batch_size, hardware.device)[:, order]


def teacher_in_words(folder: str, logits: Tensor, rows: list[ClassRow], task: Task) -> str:
    """Describe how good a teacher's logits (N, D) are on the training rows, which reveals a wrong order of classes."""
    gold = np.array([row.label for row in rows])
    if task.labels is None:
        return f"teacher {folder}: Pearson correlation {metrics.pearson(logits[:, 0], gold):.3f} on the training rows"
    share = metrics.accuracy(logits.argmax(1), gold)
    doubt = ", no more than by chance: are its classes in another order?" if share * len(task.labels) <= 1 else ""
    return f"teacher {folder}: right on {share:.1%} of the training rows{doubt}"


# Files with a run's measurements.


def save_features(path: Path, before: Tensor, after: Tensor, labels: list[int | float], names: Sequence[str]) -> None:
    """Write the states (N, d) that the head reads, before and after training, and the labels (N,) of the dev set.

    The metadata has the names of the classes.
    """
    tensors = {"before": before, "after": after, "labels": torch.tensor(labels)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"classes": json.dumps(list(names))})


def write_report(out: Path, task: Task, best_step: int, before: dict, after: dict) -> None:
    """Write report.json: every score of every evaluation set, and the dev metric after each epoch."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    epochs = [{"step": entry["step"], "dev": entry["dev"]} for entry in entries if "dev" in entry]
    before, after = (
        {name: {key: finite(value) for key, value in scores.items()} for name, scores in column.items()}
        for column in (before, after)
    )
    report = {"task": task.name, "dev_metric": task.metrics, "best_step": best_step, "epochs": epochs}
    write_json(out / "report.json", report | {"before": before, "after": after})


def flat(column: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the scores of several sets as one column of a table."""
    return {f"{name}: {key}": value for name, scores in column.items() for key, value in scores.items()}


def finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
