"""How well a model predicts text, and how far tuning moved its predictions: what it learned, what it forgot."""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from minibalora.base import progress
from minibalora.base.errors import InputError
from minibalora.base.files import appending, keep_lines
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.batches import Row, check_ids, micro_batches, pack
from minibalora.lowrank import adapted_layers, pretrained
from minibalora.models import LanguageModel
from minibalora.models.decoder import Decoder
from minibalora.regularizers import consistency_kl


@torch.no_grad()
def mean_loss(model: LanguageModel, rows: list[Row], batch_size: int) -> float:
    """Mean cross-entropy of the rows' response tokens, in nats."""
    device, total, tokens = model.embedding.weight.device, 0.0, 0
    for batch in micro_batches(rows, batch_size):
        batch = pack(batch, device)
        states = model.packed(batch.input_ids, batch.lengths, batch.wanted, batch.shared)
        total += F.cross_entropy(model.head(states).float(), batch.targets, reduction="sum").item()
        tokens += len(batch.targets)
    return total / tokens


def whole_text(rows: list[Row]) -> list[Row]:
    """The same rows, in which every token but the first is predicted, as in pre-training."""
    return [replace(row, prompt_length=1) for row in rows]


def text_windows(
    path: Path, tok: Tokenizer, config: object, length: int | None = None, limit: int | None = None
) -> list[list[int]]:
    """The ids of a text file, cut into windows of `length` ids, a BOS among them; the first `limit` windows.

    config: the model's; length: 1024 by default, or what the model has. A window's first tokens are predicted without
    those of the window before, so longer windows give a lower loss. InputError if the model can't predict them.
    """
    if tok.is_encoder_decoder:
        raise InputError("--task text: the model is a T5, which predicts answers and not the text: give a decoder")
    longest = config.max_position_embeddings
    length = length or min(1024, longest)
    if not 2 <= length <= longest:
        raise InputError(f"--max-length {length}: the model has {longest} positions: give 2 to {longest}")
    try:
        ids = tok.encode_responses([path.read_text(encoding="utf-8")])[0]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid UTF-8: convert the file to UTF-8") from None
    bos = [] if tok.bos_id is None else [tok.bos_id]
    step = length - len(bos)
    windows = [bos + ids[start : start + step] for start in range(0, len(ids), step)]
    windows = [window for window in windows if len(window) > 1][:limit]
    if not windows:
        raise InputError(f"{path}: has no two tokens, so none can be predicted: give a longer text")
    for number, window in enumerate(windows, start=1):
        check_ids(window, f"{path}, window {number}", config)
    return windows


def predict_each(model: Decoder, windows: list[list[int]], path: Path) -> list[dict[str, float]]:
    """`predict` of each window, which has its number from 1: those that `path` holds, and new ones, appended to it."""
    done = {record["window"]: record for record in keep_lines(path, lambda record: type(record.get("window")) is int)}
    with appending(path) as append:
        for number, ids in enumerate(progress.over(windows, "text", "window"), start=1):
            if number not in done:
                done[number] = {"window": number} | predict(model, ids)
                append(done[number])
    return list(done.values())


@torch.no_grad()
def predict(model: Decoder, ids: list[int]) -> dict[str, float]:
    """Sums over the T - 1 predicted tokens of a window of T ids: `tokens`, how many, and `loss` in nats.

    Of an adapted model also `base_loss`, the pre-trained model's, and `kl`, KL(base ‖ tuned) of the predictions.
    """
    input_ids = torch.tensor([ids], device=model.embedding.weight.device)
    logits, targets = model(input_ids)[0, :-1].float(), input_ids[0, 1:]  # (T - 1, V)
    found = {"tokens": len(targets), "loss": F.cross_entropy(logits, targets, reduction="sum").item()}
    if adapted_layers(model):
        with pretrained(model):
            base = model(input_ids)[0, :-1].float()
        found["base_loss"] = F.cross_entropy(base, targets, reduction="sum").item()
        found["kl"] = len(targets) * consistency_kl(logits, base).item()
    return found


def mean_predictions(found: list[dict[str, float]]) -> dict[str, float]:
    """What `predict` gave for the windows as means a token, and perplexities, e to the loss; `tokens`: how many."""
    tokens = sum(window["tokens"] for window in found)
    names = [name for name in ("loss", "base_loss", "kl") if name in found[0]]
    means = {name: sum(window[name] for window in found) / tokens for name in names}
    for name in names[:2]:
        means[name.replace("loss", "perplexity")] = math.exp(min(means[name], 700))  # more is beyond float64
    return {"tokens": tokens} | means


def in_words(found: dict[str, float]) -> str:
    """What `mean_predictions` found, in a line."""
    text = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:,.2f}"
    if "kl" in found:
        text += f"; of the base: loss {found['base_loss']:.4f}, perplexity {found['base_perplexity']:,.2f}"
        text += f"; KL(base ‖ tuned) {found['kl']:.4f} nats a token"
    return f"{text}; tokens: {found['tokens']:,}"
