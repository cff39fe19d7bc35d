"""Text from a model, in batches with a KV cache: the most likely, or drawn. `python -m minibalora generate`."""

import json
import math
import re
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.checkpoints.adapters import load_adapter
from minibalora.checkpoints.tokenizer import Tokenizer, load_tokenizer
from minibalora.checkpoints.weights import load_model
from minibalora.data.prompts import FIELDS, example_from
from minibalora.lowrank import evaluating, merge
from minibalora.models import LanguageModel
from minibalora.toy import MODEL

WINDOW = 16  # batches
PROMPT_FIELDS = tuple(dict.fromkeys(prompt for prompt, _ in FIELDS))


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and where a text ends."""

    max_new_tokens: int = 512  # at least 1
    temperature: float = 0.0  # logits are divided by it; 0: always the most likely token
    top_p: float = 1.0  # draw from the smallest set of tokens with at least this probability (arXiv 1904.09751)
    stop: tuple[str, ...] = ()  # a text ends before the first of these
    seed: int = 42


def generate(
    model: LanguageModel, tok: Tokenizer, prompts: list[str], decoding: Decoding, keys: Sequence[int] | None = None
) -> list[str]:
    """How each prompt goes on, as one batch: without the prompt and special tokens, up to EOS or a stop string.

    Each text is the one that its prompt gives alone, whatever else is in the batch (as far as rounding does not decide
    between two tokens). What a prompt draws depends on decoding.seed and on its key, by default its index.
    """
    keys = range(len(prompts)) if keys is None else keys
    return _texts(model, tok, encode_prompts(model, tok, prompts), decoding, keys) if prompts else []


def generate_each(
    model: LanguageModel,
    tok: Tokenizer,
    prompts: list[str],
    decoding: Decoding,
    batch_size: int,
    keys: Sequence[int] | None = None,
    desc: str = "generate",
) -> Iterator[tuple[int, str]]:
    """(index of a prompt, its text) as `generate` has it, batch by batch, with a progress bar.

    A batch is of neighbours in length among those of the next WINDOW batches, so that little is padding, and no text
    waits for the last batch to be in its turn.
    """
    keys = range(len(prompts)) if keys is None else keys
    encoded = encode_prompts(model, tok, prompts)
    order = sorted(range(len(prompts)), key=lambda i: (i // (WINDOW * batch_size), -len(encoded[i])))
    start, total = time.perf_counter(), 0
    with tqdm(total=len(prompts), desc=desc, unit="prompts", miniters=0, dynamic_ncols=True, leave=False) as bar:

        def progress(tokens: int, ended: int) -> None:
            nonlocal total
            total += tokens
            bar.set_postfix_str(f"{total / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            bar.update(ended)

        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            chosen = [encoded[index] for index in batch], decoding, [keys[index] for index in batch]
            yield from zip(batch, _texts(model, tok, *chosen, progress), strict=True)


def encode_prompts(
    model: LanguageModel, tok: Tokenizer, prompts: list[str], names: Sequence[str] | None = None
) -> list[list[int]]:
    """The prompts' ids; InputError names the first that the model cannot take."""
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings or math.inf
    encoded = tok.encode_prompts(prompts)
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)] if names is None else names
    for name, ids in zip(names, encoded, strict=True):
        if not ids:
            raise InputError(f"{name} has no tokens: write something")
        if max(ids) >= vocabulary:
            which = f"token {max(ids)}, but the model has {vocabulary} tokens"
            raise InputError(f"{name}: the tokenizer gives {which}: they do not belong together")
        if len(ids) >= context:
            positions = f"the model has {context} positions and needs one for its answer"
            raise InputError(f"{name} has {len(ids)} tokens, but {positions}: shorten it")
    return encoded


def _texts(
    model: LanguageModel,
    tok: Tokenizer,
    encoded: list[list[int]],
    decoding: Decoding,
    keys: Sequence[int],
    progress: Callable[[int, int], None] = lambda tokens, ended: None,
) -> list[str]:
    width = max(map(len, encoded))
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in encoded])
    watches = [StopWatch(tok, decoding.stop, prompt) for prompt in encoded]
    has_stopped = (lambda row, ids: watches[row].has_stopped(ids)) if decoding.stop else (lambda row, ids: False)
    rows = generate_ids(model, input_ids, attention_mask, decoding, tok.eos_id, keys, has_stopped, progress)
    return [before_stop(tok.decode_after(*both), decoding.stop) for both in zip(encoded, rows, strict=True)]


@torch.inference_mode()
def generate_ids(
    model: LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoding: Decoding,
    eos_id: int | None = None,
    keys: Sequence[int] | None = None,
    has_stopped: Callable[[int, list[int]], bool] = lambda row, ids: False,
    progress: Callable[[int, int], None] = lambda tokens, ended: None,
) -> list[list[int]]:
    """The ids that follow each row of input_ids (B, T), without EOS; a row ends at the model's last position, too.

    attention_mask (B, T): 1 = real token; rows may be padded on the left or on the right. has_stopped(row, its ids so
    far) is asked after each token; progress(tokens of this step, rows that ended with it) is told of each step.
    decoding.stop is `generate`'s. Raises ValueError for a mask with holes, an empty row, and one without room.
    """
    context = model.config.max_position_embeddings or math.inf
    input_ids, lengths = padded_on_the_right(input_ids, attention_mask)
    if not 0 < min(lengths) <= max(lengths) < context:
        raise ValueError(f"rows of {min(lengths)} to {max(lengths)} tokens: they must have 1 to {context - 1}")
    room = [min(decoding.max_new_tokens, context - length) for length in lengths]
    rngs = [np.random.default_rng([decoding.seed, key]) for key in (range(len(lengths)) if keys is None else keys)]
    rows: list[list[int]] = [[] for _ in lengths]
    running = list(range(len(rows)))
    with evaluating(model):
        cache, state = model.prefill(input_ids.to(model.embedding.weight.device), lengths, max(room))  # (B, d)
        while True:
            tokens = next_tokens(model.head(state), decoding, rngs)
            ids, were_running = tokens.tolist(), len(running)
            for row in running:
                if ids[row] != eos_id:
                    rows[row].append(ids[row])
            running = [
                row
                for row in running
                if ids[row] != eos_id and len(rows[row]) < room[row] and not has_stopped(row, rows[row])
            ]
            progress(were_running, were_running - len(running))
            if not running:
                return rows
            state = model.decode(tokens, cache)  # rows that have ended go along, unread


def padded_on_the_right(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[int]]:
    """Rows (B, T) padded on either side with their padding on the right, and their lengths."""
    first, lengths = attention_mask.argmax(1, keepdim=True), attention_mask.sum(1)
    slots = torch.arange(input_ids.shape[1], device=input_ids.device)
    if not torch.equal(attention_mask.bool(), (slots >= first) & (slots < first + lengths[:, None])):
        raise ValueError("attention_mask has a 0 between two 1: a row's tokens must be neighbours")
    return input_ids.gather(1, (first + slots) % input_ids.shape[1]), lengths.tolist()


def next_tokens(logits: Tensor, decoding: Decoding, rngs: list[np.random.Generator]) -> Tensor:
    """(B, V) -> (B,): the most likely token of each row or, with a temperature, one drawn by the row's generator."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    uniform = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64, device=logits.device)
    return sample(logits, uniform, decoding.temperature, decoding.top_p)


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token (B,) at which the distribution function of softmax(logits / T), cut to its nucleus, passes `uniform`.

    uniform: (B,) in [0, 1). The function is summed in the vocabulary's order: in falling order two tokens that are
    nearly as likely would change places, and the text with them, by what a batch rounds otherwise. In float64.
    """
    logits = logits.double()
    below = logits - logits.amax(-1, keepdim=True)  # so that no temperature is too small to divide by
    p = (below / temperature).softmax(-1)
    if top_p < 1:
        p = p.where(p >= least_likely(p, top_p), 0)
    up_to = p.cumsum(-1)
    return torch.searchsorted(up_to, uniform[:, None] * up_to[:, -1:], right=True)[:, 0]


def least_likely(p: Tensor, top_p: float) -> Tensor:
    """The smallest probability (B, 1) in each row's nucleus: the likeliest tokens, as many as make up top_p."""
    for count in (256, 4096, p.shape[-1]):  # mostly a few suffice, and sorting a whole vocabulary is slow
        falling = p.topk(min(count, p.shape[-1])).values
        if (falling.sum(-1) >= top_p).all():
            break
    is_needed = falling.cumsum(-1) - falling < top_p  # what is before it does not suffice
    return falling.gather(-1, is_needed.sum(-1, keepdim=True) - 1)


class StopWatch:
    """Says of one growing text whether a stop string has come. Only its last few tokens are decoded, until one has.

    A token may end inside a character (byte-level BPE), and its text may depend on its neighbour (the space before a
    word; bytes that are a character together). So new tokens are decoded with those before them, ids[context:known],
    whose text ends with a whole character and is taken off again.
    """

    def __init__(self, tok: Tokenizer, stop: tuple[str, ...], prompt: list[int]):
        self.tok, self.stop, self.prompt = tok, stop, prompt
        self.context = self.known = 0
        self.whole = self.grown = 0  # characters that came after ids[:known] and are whole; when that number last grew
        self.tail = ""  # the end of the text of ids[:known], as long as the longest stop string

    def has_stopped(self, ids: list[int]) -> bool:
        """ids: all tokens so far, one more than the last time."""
        before = self.prompt if self.known == 0 else ids[self.context : self.known]
        recent = self.tok.decode_after(before, ids[self.known :])
        tail = self.tail + recent
        whole = len(recent.rstrip("\ufffd"))
        if whole > self.whole:
            self.whole, self.grown = whole, len(ids)
        # A half character decodes as U+FFFD. It is whole after four bytes; what lasts longer is in the text.
        if not recent.endswith("\ufffd") or len(ids) - self.grown > 4:
            self.context, self.known, self.whole, self.grown = self.known, len(ids), 0, len(ids)
            self.tail = tail[-max(map(len, self.stop)) :]
        if not any(stop in tail for stop in self.stop):
            return False
        text = self.tok.decode_after(self.prompt, ids)
        return any(stop in text for stop in self.stop)


def before_stop(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


# The command line.


def main() -> int:
    args = parse_flags()
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, tuple(args.stop), args.seed)
    names, asked, prompts = map(list, zip(*read_prompts(args), strict=True))
    model, tok = load(args)
    encode_prompts(model, tok, prompts, names)  # refuses what the model can't take before anything is answered
    if args.adapter is not None and args.dtype == torch.float32:
        merge(model)  # plain linears are faster; in bfloat16 the sum would be rounded, and a small change be lost
    found = generate_each(model, tok, prompts, decoding, args.batch_size)
    sys.stdout.reconfigure(encoding="utf-8")
    for question, text in zip(asked, in_order(found), strict=True):
        is_alone = args.prompt and len(prompts) == 1
        line = text if is_alone else json.dumps({"prompt": question, "completion": text}, ensure_ascii=False)
        with tqdm.external_write_mode():
            print(line, flush=True)
    return 0


def parse_flags() -> Namespace:
    parser = cli.OneLineParser(
        prog="python -m minibalora generate",
        description="Let a model answer prompts. They are put into the template that train_nlg.py trains with.",
    )
    add_model_flags(parser)
    add = parser.add_argument_group("prompts, from standard input where none are given").add_argument
    add("--prompt", metavar="TEXT", action="append", help="a prompt, whose answer is written, alone; of several "
        "as of --file")  # fmt: skip
    add("--file", metavar="FILE", type=cli.path, help="a prompt a line, or a JSON object with one of the fields "
        f"{', '.join(PROMPT_FIELDS)}; -: standard input; answers are JSON Lines, prompt and completion, in the same "
        "order")  # fmt: skip
    add("--raw", action="store_true", help="ask the prompt as it is, without the training template")
    add_decoding_flags(parser)
    add = parser.add_argument_group("end of an answer, beside EOS").add_argument
    add(
        "--stop",
        type=_not_empty,
        nargs="+",
        action="extend",
        default=[],
        metavar="STRING",
        help="an answer ends before any of these",
    )
    args = parser.parse_args()
    fill_in_defaults(args, {"max_new_tokens": 512})
    if args.prompt is not None and args.file is not None:
        raise InputError("--prompt and --file are both given: leave one out")
    return args


def _not_empty(text: str) -> str:
    if not text:
        raise ArgumentTypeError("the string is empty")
    return text


def add_model_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="DIR", type=cli.path, default=MODEL, help="checkpoint folder: config.json, tokenizer.json, "
        "*.safetensors (default: the built-in tiny LLaMA)")  # fmt: skip
    add("--adapter", metavar="DIR", type=cli.path, help="folder of an adapter for it: what train_nlg.py or PEFT saved")
    add("--batch-size", type=cli.positive_int, metavar="N", help="prompts at a time (default: 8)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: bfloat16 on GPUs, "
        "float32 on CPUs)")  # fmt: skip


def add_decoding_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("decoding").add_argument
    add("--max-new-tokens", type=cli.positive_int, metavar="N", help="tokens of an answer (default: 512; of "
        "--task math 1024)")  # fmt: skip
    add("--temperature", type=cli.rate, metavar="T", help="divides the logits; 0: always the most likely "
        "token (default: 0)")  # fmt: skip
    add("--top-p", type=cli.number("a number above 0, up to 1", lambda value: 0 < value <= 1), metavar="P",
        help="draw from the smallest set of tokens with this probability (default: 1, all)")  # fmt: skip
    add("--seed", type=cli.natural, help="of what is drawn with --temperature (default: 42)")


def fill_in_defaults(args: Namespace, others: dict) -> None:
    """Of the two functions above, and others; as `cli.fill_in`. InputError for what can't be meant."""
    if args.top_p is not None and not args.temperature:
        raise InputError("--top-p has no meaning without --temperature: add it")
    cli.fill_in(args, {"batch_size": 8, "temperature": 0.0, "top_p": 1.0, "seed": 42} | others)


def load(args: Namespace) -> tuple[LanguageModel, Tokenizer]:
    """What `add_model_flags` names, the adapter apart from its base."""
    tok, model = load_tokenizer(args.model), load_model(args.model, dtype=args.dtype, device=args.device)
    return model if args.adapter is None else load_adapter(model, args.adapter), tok


def read_prompts(args: Namespace) -> list[tuple[str, str, str]]:
    """Where it stands, what is asked, and the prompt that asks it, with the template unless --raw; at least one."""
    if args.prompt is not None:
        return [prompt_of({"prompt": text}, "--prompt", args.raw) for text in args.prompt]
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("nothing to answer: give --prompt or --file")
    if args.file in (None, Path("-")):
        return _prompts_of(sys.stdin.buffer, "standard input", args.raw)
    try:
        with open(args.file, "rb") as file:
            return _prompts_of(file, str(args.file), args.raw)
    except OSError as error:
        raise InputError(f"{args.file}: {error.strerror}: give a file with a prompt a line") from None


def _prompts_of(lines: Iterable[bytes], source: str, raw: bool) -> list[tuple[str, str, str]]:
    """A prompt a line, blank lines left out. A line that begins with `{"` is JSON, whose prompts may have newlines."""
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{source}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            row = json.loads(text) if re.match(r'[{[]\s*[{"]', text) else {"prompt": text}
        except UnicodeDecodeError:
            raise InputError(f"{where}: not valid UTF-8: convert the file to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: broken JSON ({error}): mend the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON {type(row).__name__}: give an object or a plain prompt a line")
        if text.strip():
            found.append(prompt_of(row, where, raw))
    if not found:
        raise InputError(f"{source}: has no prompts: give one a line")
    return found


def prompt_of(row: dict, where: str, raw: bool) -> tuple[str, str, str]:
    """As `read_prompts`, of a row with one of PROMPT_FIELDS; the template is the one that the row gets in training."""
    field = next((field for field in PROMPT_FIELDS if field in row), None)
    if field is None:
        raise InputError(f"{where}: has fields {', '.join(row)}, none of {', '.join(PROMPT_FIELDS)}: rename one")
    example = example_from(row, 0, where, field, field, raw)  # of the prompt alone, for there is no response yet
    return where, row[field], example.prompt


def in_order(found: Iterable[tuple[int, str]]) -> Iterator[str]:
    """The texts of (index, text) by their index, each as soon as all before it are there."""
    waiting, turn = {}, 0
    for index, text in found:
        waiting[index] = text
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1
