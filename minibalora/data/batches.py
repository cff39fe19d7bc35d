"""From prompts and responses to batches: tokenise, order, pack or pad."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minibalora.base.errors import InputError
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.models import LanguageModel


@dataclass(frozen=True)
class Row:
    """A tokenised example: ids = prompt with BOS, then response with EOS; ids[prompt_length:] is what is learned.

    In a conversation of several replies, what stands between them is not: `learned` says of each of these ids whether
    it is, the first and the last always. None: all of them.
    """

    ids: np.ndarray
    prompt_length: int
    line: int
    learned: np.ndarray | None = None

    @property
    def after_prompt(self) -> int:
        """How many tokens there are from the first learned one on, but not a first of all, which nothing predicts."""
        return len(self.ids) - max(self.prompt_length, 1)

    @property
    def predicted(self) -> int:
        """How many tokens are learned."""
        return self.after_prompt if self.learned is None else int(self.learned.sum())


def encode_examples(examples: list, tok: Tokenizer, max_length: int) -> tuple[list[Row], int, int]:
    """Tokenised rows, how many responses were cut to max_length tokens, and how many rows were dropped.

    examples: of the class Example, or whatever has a prompt, a response and a line, too, and, all of them or none, the
    text that a chat template wrote.
    Prompt and response are tokenised apart, so no token straddles the boundary and a prompt has the ids at training
    that it will have at generation. A tokenizer that marks the start of a word puts a space before the response. A row
    is dropped if its prompt leaves no room for one response token.
    """
    if examples and examples[0].rendered is not None:
        return encode_rendered(examples, tok, max_length)
    prompts = tok.encode_prompts([example.prompt for example in examples])
    responses = tok.encode_responses([example.response for example in examples])
    rows, truncated, dropped = [], 0, 0
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        ids = prompt + response + ([] if tok.eos_id is None else [tok.eos_id])
        if len(prompt) >= min(max_length, len(ids)):
            dropped += 1
            continue
        truncated += len(ids) > max_length
        rows.append(Row(np.array(ids[:max_length], dtype=np.int32), len(prompt), example.line))
    return rows, truncated, dropped


def encode_rendered(examples: list, tok: Tokenizer, max_length: int) -> tuple[list[Row], int, int]:
    """As `encode_examples`, of examples whose text a chat template wrote. It is tokenised in one piece, as transformers
    does, and a row ends with the last token that is learned."""
    rows, truncated, dropped = [], 0, 0
    encoded = tok.encode_spans([example.rendered for example in examples], [example.learned for example in examples])
    for example, (ids, inside) in zip(examples, encoded, strict=True):
        inside[:1] = False  # nothing predicts it
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
    """How many rows and tokens there are, and how many of the tokens are learned."""
    tokens = sum(len(row.ids) for row in rows)
    learned = sum(row.predicted for row in rows)
    return f"{source or 'built-in problems'}, {len(rows):,} rows, {tokens:,} tokens, {learned:,} learned"


def rows_of_step(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which of `count` rows the optimisation step takes: a pure function, so that a resumed run sees the same rows.

    Every epoch is a new permutation; its last step takes what is left.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(count, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[step_in_epoch * batch_size : (step_in_epoch + 1) * batch_size].tolist()


def steps_per_epoch(count: int, batch_size: int) -> int:
    return -(-count // batch_size)


def micro_batches(rows: list[Row], size: int) -> list[list[Row]]:
    """Cut a step's rows into micro-batches of neighbours in length: little padding where there is any."""
    ordered = sorted(rows, key=lambda row: (len(row.ids), row.line))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def longest(rows: list[Row], count: int) -> list[Row]:
    """The micro-batch that takes the most memory."""
    return sorted(rows, key=lambda row: len(row.ids))[-count:]


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end, without padding: the arguments of `Decoder.packed`, and what is predicted."""

    input_ids: Tensor  # (shared + Σ lengths,)
    lengths: list[int]
    wanted: list[int]  # how many of each row's last tokens there are from the one that predicts the first learned on
    shared: int  # first tokens, the same in every row: of Alpaca's prompt a third
    targets: Tensor  # (M,) the learned tokens
    learned: Tensor | None = None  # (M,) which of these Σ wanted tokens predict a learned one; None: all

    def states(self, model: LanguageModel) -> Tensor:
        """The model's final hidden states (M, d) that predict the targets."""
        states = model.packed(self.input_ids, self.lengths, self.wanted, self.shared)
        return states if self.learned is None else states[self.learned]


def pack(rows: list[Row], device: torch.device | str) -> Packed:
    """A micro-batch without padding, and without each row's last token, from which nothing is predicted.

    Position t predicts token t + 1, so of a row without its last token the last ones predict the response.
    """
    shared = common_start([row.ids[: max(row.prompt_length, 1) - 1] for row in rows])
    own, targets = [row.ids[shared:-1] for row in rows], [row.ids[-row.after_prompt :] for row in rows]
    parts = [np.concatenate(parts).astype(np.int64) for parts in ([rows[0].ids[:shared], *own], targets)]
    if any(row.learned is not None for row in rows):
        masks = [np.ones(row.after_prompt, bool) if row.learned is None else row.learned for row in rows]
        parts.append(np.flatnonzero(np.concatenate(masks)))
        parts[1] = parts[1][parts[2]]
    input_ids, targets, *learned = (to_device(torch.from_numpy(part), device) for part in parts)
    wanted = [row.after_prompt for row in rows]
    return Packed(input_ids, [len(ids) for ids in own], wanted, shared, targets, *learned)


def common_start(texts: list[np.ndarray]) -> int:
    """How many first tokens all of several texts share; a single text shares none."""
    if len(texts) == 1:
        return 0
    shortest = min(len(ids) for ids in texts)
    differs = (np.stack([ids[:shortest] for ids in texts]) != texts[0][:shortest]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To a GPU from pinned memory, while it is still at work."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_fits(rows: list, source: str | None, config: object, max_length: int, model: str = "the model") -> None:
    """InputError if --max-length asks for positions, or a row of the file `source` has tokens, that the model has not.

    config: the model's configuration; model: its name in the messages.
    """
    limit = config.max_position_embeddings
    if limit is not None and max_length > limit:
        raise InputError(f"--max-length {max_length}: {model} has {limit} positions: give at most {limit}")
    for row in rows:
        check_ids(row.ids, f"{source or 'built-in data'}, line {row.line}", config, model=model)


def check_ids(ids: Sequence[int], where: str, config: object, room: int = 0, model: str = "the model") -> None:
    """InputError that begins with `where` unless there are tokens, all in the vocabulary, and `room` for so many more.

    config: the model's configuration; model: its name in the messages.
    """
    if len(ids) == 0:
        raise InputError(f"{where} has no tokens: write something, or leave it out")
    if (highest := np.max(ids)) >= config.vocab_size:
        which = f"token {highest}, but {model} has {config.vocab_size} tokens"
        raise InputError(f"{where}: the tokenizer gives {which}: they do not belong together")
    limit = config.max_position_embeddings
    if limit is not None and len(ids) > limit - room:
        positions = f"{limit} positions" + (f" and needs {room} for its answer" if room else "")
        raise InputError(f"{where} has {len(ids)} tokens, but {model} has {positions}: shorten it, or leave it out")
