"""From prompts and responses to batches: tokenise, order, pack or pad."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minibalora.base.errors import InputError
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.models import LanguageModel
from minibalora.models.decoder import to_device


@dataclass(frozen=True)
class Row:
    """A tokenised example: ids = prompt with BOS, then response with EOS. ids[prompt_length:] are learned.

    In a conversation with several replies, the tokens between them are not: `learned` is a mask of ids[prompt_length:],
    true for its first and last token. None: all are learned.
    """

    ids: np.ndarray
    prompt_length: int
    line: int
    learned: np.ndarray | None = None

    @property
    def after_prompt(self) -> int:
        """The number of tokens after the prompt, without the first token of the row, which nothing predicts."""
        return len(self.ids) - max(self.prompt_length, 1)

    @property
    def predicted(self) -> int:
        """The number of learned tokens."""
        return self.after_prompt if self.learned is None else int(self.learned.sum())


def encode_examples(examples: list, tok: Tokenizer, max_length: int) -> tuple[list[Row], int, int]:
    """Tokenise examples. Returns the rows, and how many responses were cut to max_length tokens and rows dropped.

    examples: `prompts.Example`s, or other objects with prompt, response, line and rendered (a chat template's text,
    which all examples have or none). Prompt and response are tokenised separately, so that no token
    crosses the boundary and a prompt has the same ids in training and generation. A tokenizer that marks the start of
    a word puts a space before the response. EOS is added to a response that lacks it. A row is dropped if its prompt
    leaves no room for a response token.
    """
    if examples and examples[0].rendered is not None:
        return encode_rendered(examples, tok, max_length)
    prompts = tok.encode_prompts([example.prompt for example in examples])
    responses = tok.encode_responses([example.response for example in examples])
    rows, truncated, dropped = [], 0, 0
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        has_end = tok.eos_id is None or response[-1:] == [tok.eos_id]
        ids = prompt + response + ([] if has_end else [tok.eos_id])
        if len(prompt) >= min(max_length, len(ids)):
            dropped += 1
            continue
        truncated += len(ids) > max_length
        rows.append(Row(np.array(ids[:max_length], dtype=np.int32), len(prompt), example.line))
    return rows, truncated, dropped


def encode_rendered(examples: list, tok: Tokenizer, max_length: int) -> tuple[list[Row], int, int]:
    """Tokenise examples that a chat template rendered; see `encode_examples`. As in transformers, each text is
    tokenised as a whole. A row ends with its last learned token."""
    rows, truncated, dropped = [], 0, 0
    encoded = tok.encode_spans([example.rendered for example in examples], [example.learned for example in examples])
    for example, (ids, inside) in zip(examples, encoded, strict=True):
        inside[:1] = False  # nothing predicts the first token
        places = np.flatnonzero(inside[:max_length])
        if len(places) == 0:
            dropped += 1
            continue
        truncated += bool(inside[max_length:].any())
        first, end = int(places[0]), int(places[-1]) + 1
        learned = None if len(places) == end - first else inside[first:end]
        rows.append(Row(np.array(ids[:end], dtype=np.int32), first, example.line, learned))
    return rows, truncated, dropped


def in_words(rows: list[Row], source: str | None) -> str:
    """Describe the rows: their number, and the numbers of tokens and of learned tokens."""
    tokens = sum(len(row.ids) for row in rows)
    learned = sum(row.predicted for row in rows)
    return f"{source or 'built-in problems'}, {len(rows):,} rows, {tokens:,} tokens, {learned:,} learned"


def rows_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the indices, below `count`, of the rows of a step. A pure function, so a resumed run gets the same rows.

    Every epoch is a new permutation; its last step takes the remaining rows.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(count, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[step_in_epoch * batch_size : (step_in_epoch + 1) * batch_size].tolist()


def steps_per_epoch(count: int, batch_size: int) -> int:
    return -(-count // batch_size)


def micro_batches(rows: list[Row], size: int) -> list[list[Row]]:
    """Cut the rows of a step into micro-batches of rows with similar lengths, which need little padding."""
    ordered = sorted(rows, key=lambda row: (len(row.ids), row.line))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def longest(rows: list[Row], count: int) -> list[Row]:
    """Return the micro-batch that needs the most memory."""
    return sorted(rows, key=lambda row: len(row.ids))[-count:]


@dataclass(frozen=True)
class Packed:
    """Rows end to end, without padding: the arguments of `Decoder.packed`, and the tokens to predict."""

    input_ids: Tensor  # (shared + Σ lengths,)
    lengths: list[int]
    wanted: list[int]  # per row, the tokens from the one that predicts the first learned token to the end
    shared: int  # first tokens that all rows share: a third of Alpaca's prompt
    targets: Tensor  # (M,) the learned tokens
    learned: Tensor | None = None  # (M,) indices of the wanted tokens that predict a learned token; None: all

    def states(self, model: LanguageModel) -> Tensor:
        """Return the model's final hidden states (M, d), from which the targets are predicted."""
        states = model.packed(self.input_ids, self.lengths, self.wanted, self.shared)
        return states if self.learned is None else states[self.learned]


def pack(rows: list[Row], device: torch.device | str) -> Packed:
    """Pack a micro-batch without padding, and without each row's last token, which predicts nothing.

    Position t predicts token t + 1, so the last positions of such a row predict its response.
    """
    shared = common_start([row.ids[: max(row.prompt_length, 1) - 1] for row in rows])
    rests, targets = [row.ids[shared:-1] for row in rows], [row.ids[-row.after_prompt :] for row in rows]
    parts = [np.concatenate(parts).astype(np.int64) for parts in ([rows[0].ids[:shared], *rests], targets)]
    if any(row.learned is not None for row in rows):
        masks = [np.ones(row.after_prompt, bool) if row.learned is None else row.learned for row in rows]
        parts.append(np.flatnonzero(np.concatenate(masks)))
        parts[1] = parts[1][parts[2]]
    input_ids, targets, *learned = (to_device(torch.from_numpy(part), device) for part in parts)
    wanted = [row.after_prompt for row in rows]
    return Packed(input_ids, [len(ids) for ids in rests], wanted, shared, targets, *learned)


def common_start(texts: list[np.ndarray]) -> int:
    """Return the number of first tokens that all texts share; 0 for a single text."""
    if len(texts) == 1:
        return 0
    shortest = min(len(ids) for ids in texts)
    differs = (np.stack([ids[:shortest] for ids in texts]) != texts[0][:shortest]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def check_fits(rows: list, source: str | None, config: object, max_length: int, model: str = "the model") -> None:
    """Raise InputError if --max-length exceeds the model's positions, or if a row of the file `source` does not fit.

    config: the model's configuration; model: its name in messages.
    """
    limit = config.max_position_embeddings
    if limit is not None and max_length > limit:
        raise InputError(f"--max-length {max_length}: {model} has {limit} positions: give at most {limit}")
    for row in rows:
        check_ids(row.ids, f"{source or 'built-in data'}, line {row.line}", config, model=model)


def check_ids(ids: Sequence[int], where: str, config: object, room: int = 0, model: str = "the model") -> None:
    """Raise InputError, which begins with `where`, if there are no ids, one is outside the vocabulary, or the model has
    too few positions for the ids and `room` more. config: the model's configuration; model: its name in messages."""
    if len(ids) == 0:
        raise InputError(f"{where} has no tokens: write something, or leave it out")
    if (highest := np.max(ids)) >= config.vocab_size:
        which = f"token {highest}, but {model} has {config.vocab_size} tokens"
        raise InputError(f"{where}: the tokenizer gives {which}: give the model its own tokenizer")
    limit = config.max_position_embeddings
    if limit is not None and len(ids) > limit - room:
        positions = f"{limit} positions" + (f" and needs {room} for its answer" if room else "")
        raise InputError(f"{where} has {len(ids)} tokens, but {model} has {positions}: shorten it, or leave it out")
