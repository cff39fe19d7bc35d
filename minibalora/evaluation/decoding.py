"""Generate text in batches with a KV cache: the most likely tokens, or random ones."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minibalora.base.progress import Progress
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.batches import check_ids
from minibalora.lean_product import factors_kept
from minibalora.lowrank import evaluating
from minibalora.models import LanguageModel
from minibalora.models.decoder import to_device

WINDOW = 16  # batches whose prompts are sorted together


@dataclass(frozen=True)
class Decoding:
    """The settings that choose the next token and end a text."""

    max_new_tokens: int = 512  # at least 1
    temperature: float = 0.0  # divides the logits; 0: always the most likely token
    top_p: float = 1.0  # draw from the smallest set of tokens with at least this probability (arXiv 1904.09751)
    stop: tuple[str, ...] = ()  # a text ends before the first of these
    seed: int = 42
    eos_ids: frozenset[int] | None = None  # a text ends before any of these tokens; None: the tokenizer's


def generate(
    model: LanguageModel, tok: Tokenizer, prompts: list[str], decoding: Decoding, keys: Sequence[int] | None = None
) -> list[str]:
    """Return the text that follows each prompt, generated in one batch; see `generate_each`."""
    texts = dict(generate_each(model, tok, prompts, decoding, max(1, len(prompts)), keys))
    return [texts[index] for index in range(len(prompts))]


def generate_each(
    model: LanguageModel,
    tok: Tokenizer,
    prompts: list[str],
    decoding: Decoding,
    batch_size: int,
    keys: Sequence[int] | None = None,
    desc: str = "generate",
) -> Iterator[tuple[int, str]]:
    """Yield (index of a prompt, the text that follows it), batch by batch, and show the progress.

    A text ends before EOS or a stop string and has no special tokens. It does not depend on the other prompts in its
    batch, unless two tokens are so nearly equally likely that rounding decides. A prompt's random numbers depend on
    decoding.seed and on its key, by default its index. Raises InputError for a prompt that does not fit the model.

    The prompts of WINDOW batches are sorted by length, so that a batch needs little padding. Sorting all prompts
    could delay the first answers until the last batch.
    """
    encoded = encode_prompts(model, tok, prompts)
    order = sorted(range(len(prompts)), key=lambda i: (i // (WINDOW * batch_size), -len(encoded[i])))
    decoding = replace(decoding, eos_ids=tok.eos_ids if decoding.eos_ids is None else decoding.eos_ids)
    start, total = time.perf_counter(), 0
    with Progress(desc, len(prompts), "prompt") as bar:

        def progress(tokens: int, ended: int) -> None:
            nonlocal total
            total += tokens
            bar.update(ended, f"{total / (time.perf_counter() - start):,.0f} tokens/s")

        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            chosen = [encoded[index] for index in batch]
            watches = [StopWatch(tok, decoding.stop, ids) for ids in chosen] if decoding.stop else None
            batch_keys = batch if keys is None else [keys[index] for index in batch]
            rows = generate_ids(model, chosen, decoding, batch_keys, watches, progress)
            for index, prompt, ids in zip(batch, chosen, rows, strict=True):
                before = [] if tok.is_chat else prompt  # in a chat, an answer is a separate text
                yield index, before_stop(tok.decode_after(before, ids), decoding.stop)


def encode_prompts(
    model: LanguageModel, tok: Tokenizer, prompts: list[str], names: Sequence[str] | None = None
) -> list[list[int]]:
    """Return the ids of each prompt. Raises InputError for the first that leaves the model no room for a token."""
    encoded = tok.encode_prompts(prompts)
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)] if names is None else names
    for name, ids in zip(names, encoded, strict=True):
        check_ids(ids, name, model.config, room=1)
    return encoded


@torch.inference_mode()
def generate_ids(
    model: LanguageModel,
    prompts: list[list[int]],
    decoding: Decoding,
    keys: Sequence[int] | None = None,
    watches: "Sequence[StopWatch] | None" = None,
    progress: Callable[[int, int], None] = lambda tokens, ended: None,
) -> list[list[int]]:
    """Return the ids that follow each prompt, without EOS, all in one batch. A row also ends at the last position.

    watches: detect a stop string in each row; decoding.stop is not used here. progress(tokens of this step, rows that
    ended in it) is called after each step. Raises ValueError for an empty prompt, and for a prompt that leaves no free
    position.
    """
    context, lengths = model.config.max_position_embeddings or math.inf, [len(ids) for ids in prompts]
    if not 0 < min(lengths) <= max(lengths) < context:
        raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens: they must have 1 to {context - 1}")
    input_ids = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)  # (B, T), on the right
    room = [min(decoding.max_new_tokens, context - length) for length in lengths]
    rngs = [np.random.default_rng([decoding.seed, key]) for key in (range(len(lengths)) if keys is None else keys)]
    rows: list[list[int]] = [[] for _ in lengths]
    ends = decoding.eos_ids or ()
    running = range(len(rows))
    with evaluating(model), factors_kept(model):
        input_ids = to_device(input_ids, model.embedding.weight.device)
        cache, state = model.prefill(input_ids, lengths, max(room))  # (B, d)
        while True:
            tokens = next_tokens(model.head(state), decoding, rngs)
            ids, still_running = tokens.tolist(), []  # the only wait for a GPU
            for row in running:
                if ids[row] in ends:
                    continue
                rows[row].append(ids[row])
                if len(rows[row]) < room[row] and not (watches and watches[row].has_stopped(rows[row])):
                    still_running.append(row)
            progress(len(running), len(running) - len(still_running))
            running = still_running
            if not running:
                return rows
            state = model.decode(tokens, cache)  # also computes the rows that have ended, which are not read


def next_tokens(logits: Tensor, decoding: Decoding, rngs: list[np.random.Generator]) -> Tensor:
    """Return the next tokens (B,) for logits (B, V): the most likely ones, or random ones from each row's generator."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    dtype = widest_float(logits.device)
    below_one = 1 - torch.finfo(dtype).eps / 2
    uniform = torch.tensor([min(rng.random(), below_one) for rng in rngs], dtype=dtype)
    return sample(logits, to_device(uniform, logits.device), decoding.temperature, decoding.top_p)


@cache
def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device without float64, such as MPS."""
    try:
        return torch.zeros(1, dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return tokens (B,) from the nucleus of softmax(logits / temperature), chosen by `uniform` (B,) in [0, 1).

    The token is the one at which the running sum of the probabilities passes `uniform`. The sum is in the dtype of
    `uniform`, float64 where there is one, and in the vocabulary's order: if sorted by size, rounding in a batch could
    swap two nearly equal tokens.
    """
    logits = logits.to(uniform.dtype)
    below = logits - logits.amax(-1, keepdim=True)  # at most 0, so that no temperature overflows exp
    p = (below / temperature).softmax(-1)
    if top_p < 1:
        p = p.where(p >= least_likely(p, top_p), 0)
    up_to = p.cumsum(-1)
    return torch.searchsorted(up_to, uniform[:, None] * up_to[:, -1:], right=True)[:, 0]


def least_likely(p: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability (B, 1) in each row's nucleus, the fewest tokens that sum to top_p."""
    # A few usually suffice, and a CPU is slow to sort a whole vocabulary. A GPU is slow to answer whether they do.
    for count in (256, 4096, p.shape[-1]) if p.device.type == "cpu" else (p.shape[-1],):
        falling = p.topk(min(count, p.shape[-1])).values
        if count >= p.shape[-1] or (falling.sum(-1) >= top_p).all():
            break
    is_needed = falling.cumsum(-1) - falling < top_p  # the more likely tokens do not suffice
    return falling.gather(-1, is_needed.sum(-1, keepdim=True) - 1)


class StopWatch:
    """Watches a growing text for a stop string, and decodes only its last few tokens until one appears.

    A token may end inside a character (byte-level BPE), which then decodes as U+FFFD, and a token's text may depend on
    its neighbour (the space before a word). So new tokens are decoded together with earlier ones, ids[context:read],
    whose text ends with a whole character and is removed afterwards.
    """

    def __init__(self, tok: Tokenizer, stop: tuple[str, ...], prompt: list[int]):
        self.tok, self.stop, self.prompt = tok, stop, prompt
        self.context = self.read = 0
        self.tail = ""  # the end of the text of ids[:read], as long as the longest stop string

    def has_stopped(self, ids: list[int]) -> bool:
        """Return whether the text contains a stop string. ids: all tokens so far, one more than in the last call."""
        recent = self.tok.decode_after(ids[self.context : self.read] or self.prompt, ids[self.read :])
        text = self.tail + recent
        # A character has at most four bytes, so a U+FFFD that stays belongs to the text.
        if not recent.endswith("\ufffd") or len(ids) - self.read > 16:
            self.context, self.read, self.tail = self.read, len(ids), text[-max(map(len, self.stop)) :]
        if any(stop in text for stop in self.stop):
            text = self.tok.decode_after(self.prompt, ids)
            return any(stop in text for stop in self.stop)
        return False


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]
