"""What a model knows before and after training: exact match of final answers, and loss."""

import sys
from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minibalora.data import Example, Row, collate, encode_examples, micro_batches
from minibalora.generate import generate
from minibalora.models.decoder import Decoder
from minibalora.objective import predicted_rows
from minibalora.text import Tokenizer

MARKERS = ("The answer is:", "####")  # MetaMathQA's and GSM8K's


def final_answer(text: str) -> str | None:
    """What follows the last marker on its line, without commas and a closing full stop; None if there is no marker."""
    for marker in MARKERS:
        _, found, tail = text.rpartition(marker)
        if found:
            return tail.strip().partition("\n")[0].replace(",", "").strip().removesuffix(".")
    return None


def exact_match(
    model: Decoder, tok: Tokenizer, examples: list[Example], max_new_tokens: int, batch_size: int
) -> dict[str, tuple[int, int]]:
    """kind -> (right final answers, problems), for the examples whose response has a final answer."""
    counts = defaultdict(lambda: [0, 0])
    problems = sorted(
        (example for example in examples if final_answer(example.response)), key=lambda example: len(example.prompt)
    )
    for start in tqdm(range(0, len(problems), batch_size), desc="exact match", dynamic_ncols=True, leave=False):
        batch = problems[start : start + batch_size]
        texts = generate(model, tok, [example.prompt for example in batch], max_new_tokens)
        for example, text in zip(batch, texts, strict=True):
            counts[example.kind][0] += final_answer(text) == final_answer(example.response)
            counts[example.kind][1] += 1
    return {kind: (right, total) for kind, (right, total) in sorted(counts.items())}


@torch.no_grad()
def mean_loss(model: Decoder, rows: list[Row], batch_size: int) -> float:
    """Mean cross-entropy of the rows' response tokens, in nats."""
    device, total, tokens = model.embedding.weight.device, 0.0, 0
    for batch in micro_batches(rows, batch_size):
        input_ids, labels = collate(batch, device)
        states, targets = predicted_rows(model.hidden(input_ids), labels)
        total += F.cross_entropy(model.head(states).float(), targets, reduction="sum").item()
        tokens += len(targets)
    return total / tokens


def whole_text(rows: list[Row]) -> list[Row]:
    """The same rows with every token but the first to be predicted, as in pre-training."""
    return [replace(row, prompt_length=1) for row in rows]


def scores(
    model: Decoder, tok: Tokenizer, held_out: list[Example], pretraining: list[Example], batch_size: int
) -> dict[str, float]:
    """One column of the before / after table: exact match per kind in percent, and losses. The mode is restored."""
    was_training = model.training
    model.eval()
    rows, _, _ = encode_examples(held_out, tok, sys.maxsize)
    longest = max((len(row.ids) - row.prompt_length for row in rows), default=1)
    # Who has not stopped at twice the length of the longest reference has no answer.
    matches = exact_match(model, tok, held_out, max_new_tokens=2 * longest, batch_size=batch_size)
    column = {f"exact match, {kind} ({n})": 100 * right / n for kind, (right, n) in matches.items() if kind}
    if matches:
        right, n = (sum(count) for count in zip(*matches.values(), strict=True))
        column[f"exact match, all ({n})"] = 100 * right / n
    if rows:
        column["loss on held-out responses"] = mean_loss(model, rows, batch_size)
    if pretraining:
        rows, _, _ = encode_examples(pretraining, tok, sys.maxsize)
        column["loss on pre-training text"] = mean_loss(model, whole_text(rows), batch_size)
    model.train(was_training)
    return column


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Both columns side by side."""
    width = max(map(len, before))
    lines = [f"{'':{width}}  {'before':>8}  {'after':>8}"]
    lines += [f"{name:{width}}  {before[name]:8.3f}  {after[name]:8.3f}" for name in before]
    return "\n".join(lines)
