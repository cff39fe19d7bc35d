"""Compute a model's loss and perplexity on text, and how far tuning moved its predictions."""

import math
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path

import torch
import torch.nn.functional as F

from minibalora.base import progress
from minibalora.base.errors import InputError
from minibalora.base.files import appending, keep_lines
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.batches import Row, check_ids, micro_batches, pack
from minibalora.data.files import opened
from minibalora.lowrank import adapted_layers, pretrained
from minibalora.models import LanguageModel
from minibalora.models.decoder import Decoder, to_device
from minibalora.regularizers import consistency_kl


@torch.no_grad()
def mean_loss(model: LanguageModel, rows: list[Row], batch_size: int) -> float:
    """Return the mean cross-entropy of the rows' response tokens, in nats."""
    device, total, tokens = model.embedding.weight.device, 0.0, 0
    for batch in micro_batches(rows, batch_size):
        batch = pack(batch, device)
        total += F.cross_entropy(model.head(batch.states(model)).float(), batch.targets, reduction="sum").item()
        tokens += len(batch.targets)
    return total / tokens


def whole_text(rows: list[Row]) -> list[Row]:
    """Return the rows with every token but the first to be predicted, as in pre-training."""
    return [replace(row, prompt_length=1, learned=None) for row in rows]


def text_windows(
    path: Path, tok: Tokenizer, config: object, length: int | None = None, limit: int | None = None
) -> list[list[int]]:
    """Return the first `limit` windows of a text file's ids, each of `length` ids including a BOS.

    config: the model's; length: at most 1024 by default. The tokens of a window are predicted without the window
    before it, so longer windows give a lower loss. Raises InputError if the model cannot predict them.
    """
    if tok.is_encoder_decoder:
        raise InputError("--task text: the model is a T5, which does not predict its input: give a decoder")
    longest = config.max_position_embeddings
    length = length or min(1024, longest)
    if not 2 <= length <= longest:
        raise InputError(f"--max-length {length}: the model has {longest} positions: give 2 to {longest}")
    try:
        with opened(path) as file:
            ids = tok.encode_responses([TextIOWrapper(file, "utf-8-sig").read()])[0]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid UTF-8: convert the file to UTF-8") from None
    bos = [] if tok.bos_id is None else [tok.bos_id]
    step = length - len(bos)
    windows = [bos + ids[start : start + step] for start in range(0, len(ids), step)]
    windows = [window for window in windows if len(window) > 1][:limit]
    if not windows:
        raise InputError(f"{path}: has fewer than two tokens, so none can be predicted: give a longer text")
    for number, window in enumerate(windows, start=1):
        check_ids(window, f"{path}, window {number}", config)
    return windows


def predict_each(model: Decoder, windows: list[list[int]], path: Path) -> list[dict[str, float]]:
    """Return `predict` of each window, numbered from 1. Reads results in the file `path` and appends new ones."""
    records = {record["window"]: record for record in keep_lines(path, lambda row: type(row.get("window")) is int)}
    with appending(path) as append:
        for number, ids in enumerate(progress.over(windows, "text", "window"), start=1):
            if number not in records:
                records[number] = {"window": number} | predict(model, ids)
                append(records[number])
    return list(records.values())


@torch.no_grad()
def predict(model: Decoder, ids: list[int]) -> dict[str, float]:
    """Return sums over the T - 1 predicted tokens of a window of T ids: their number `tokens`, and `loss` in nats.

    For an adapted model also `base_loss`, of the pre-trained model, and `kl`, KL(base ‖ tuned) of the predictions.
    """
    input_ids = to_device(torch.tensor([ids]), model.embedding.weight.device)
    logits, targets = model(input_ids)[0, :-1].float(), input_ids[0, 1:]  # (T - 1, V)
    sums = {"loss": F.cross_entropy(logits, targets, reduction="sum")}
    if adapted_layers(model):
        with pretrained(model):
            base = model(input_ids)[0, :-1].float()
        sums["base_loss"] = F.cross_entropy(base, targets, reduction="sum")
        sums["kl"] = len(targets) * consistency_kl(logits, base)
    return {"tokens": len(targets)} | dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def mean_predictions(windows: list[dict[str, float]]) -> dict[str, float]:
    """Return the results of `predict` as means per token, the perplexities, and the number of tokens."""
    tokens = sum(window["tokens"] for window in windows)
    names = [name for name in ("loss", "base_loss", "kl") if name in windows[0]]
    means = {name: sum(window[name] for window in windows) / tokens for name in names}
    for name in names[:2]:
        means[name.replace("loss", "perplexity")] = math.exp(min(means[name], 700))  # larger values exceed float64
    return {"tokens": tokens} | means


def in_words(means: dict[str, float]) -> str:
    """Describe the result of `mean_predictions` in a line."""
    text = f"loss {means['loss']:.4f}, perplexity {means['perplexity']:,.2f}"
    if "kl" in means:
        text += f"; base: loss {means['base_loss']:.4f}, perplexity {means['base_perplexity']:,.2f}"
        text += f"; KL(base ‖ tuned) {means['kl']:.4f} nats per token"
    return f"{text}; tokens: {means['tokens']:,}"
