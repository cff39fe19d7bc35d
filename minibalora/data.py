"""From a file of questions and answers to batches: read, recognise the fields, tokenise, order, pad."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minibalora.errors import InputError
from minibalora.families import read_config
from minibalora.objective import IGNORED
from minibalora.text import Tokenizer

# Alpaca's two prompts (github.com/tatsu-lab/stanford_alpaca); the first is the one that PiSSA and BA-LoRA train with.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

# Rows are recognised by the first pair of fields that they have.
FIELDS = [
    ("query", "response"),  # MetaMathQA
    ("instruction", "output"),  # Alpaca, Evol-Instruct, the PiSSA data set; with an optional "input"
    ("query", "answer"),  # CodeFeedback
    ("question", "answer"),  # GSM8K
    ("problem", "solution"),  # MATH
    ("prompt", "completion"),
]
CONVERSATIONS = (
    "conversations",
    "messages",
)  # first user turn, first reply; ShareGPT's and OpenAI's spelling
USER_ROLES, REPLY_ROLES = ("user", "human"), ("assistant", "gpt", "chatgpt", "bing", "bard")


@dataclass(frozen=True)
class Example:
    prompt: str  # the whole prompt, template included
    response: str
    kind: str  # the row's "type", or ""
    line: int  # where it stands in its file, from 1 (in a JSON array: which item)


@dataclass(frozen=True)
class Row:
    """A tokenised example: ids = prompt with BOS, then response with EOS; ids[prompt_length:] is what is learned."""

    ids: np.ndarray
    prompt_length: int
    line: int

    @property
    def predicted(self) -> int:
        """How many of its last tokens are learned: the response, but not a first token, which nothing predicts."""
        return len(self.ids) - max(self.prompt_length, 1)


def read_examples(
    path: str | Path,
    prompt_field: str | None = None,
    response_field: str | None = None,
    limit: int | None = None,
    raw: bool = False,
) -> tuple[list[Example], int]:
    """The first `limit` rows of a JSON Lines file or JSON array; InputError names the line of the first bad one.

    Conversations in which no user is answered are left out, for published collections have many, and counted.
    """
    rows = islice(read_rows(Path(path)), limit)
    found = [example_from(row, line, f"{path}, line {line}", prompt_field, response_field, raw) for line, row in rows]
    examples = [example for example in found if example is not None]
    if not examples:
        raise InputError(
            f"{path}: has no rows with a response: give JSON Lines or a JSON array with prompts and responses"
        )
    return examples, len(found) - len(examples)


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Line and value of each row of a JSON Lines file or JSON array; InputError names the line of the first bad one."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            file.seek(0)
            if is_array:
                yield from enumerate(_parse(file.read(), path, 1), start=1)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, _parse(line, path, number)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give a JSON Lines file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}: give a JSON Lines file") from None


def _parse(raw: bytes, path: Path, line: int) -> object:
    if raw.startswith(b"PAR1"):
        raise InputError(f"{path}: a Parquet file: convert it to JSON Lines")
    try:
        return json.loads(raw.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not valid UTF-8: convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line + error.lineno - 1}: broken JSON ({error.msg}): give an object a line, or an array"
        ) from None
    except RecursionError:
        raise InputError(f"{path}, line {line}: JSON nested too deeply: mend the line") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError(f"{path}, line {line}: JSON with a number of thousands of digits: mend the line") from None


def example_from(
    row: object,
    line: int,
    where: str = "built-in data",
    prompt_field: str | None = None,
    response_field: str | None = None,
    raw: bool = False,
) -> Example | None:
    """A row as an example, its prompt template filled in; None for a conversation in which no user is answered.

    raw: the prompt is what the row asks, and its input on a line below, without a template.

    InputError, beginning with `where`, if it is no such row.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, not an object with a prompt and a response")
    if prompt_field or response_field:
        guessed = (None, None) if prompt_field and response_field else _guess(row, where)
        fields = prompt_field or guessed[0], response_field or guessed[1]
    elif key := next((key for key in CONVERSATIONS if key in row), None):
        turns = _first_turns(row[key], f"{where}: {key}")
        if turns is None:
            return None
        row, fields = turns | {"type": row.get("type")}, ("user", "reply")
    else:
        fields = _guess(row, where)
    question, response = (_string(row, field, where) for field in fields)
    context = _string(row, "input", where) if fields[0] == "instruction" and row.get("input") else ""
    if raw:
        prompt = f"{question}\n{context}" if context else question
    else:
        prompt = (PROMPT_WITH_INPUT if context else PROMPT).format(instruction=question, input=context)
    kind = row.get("type")
    return Example(prompt, response, kind if isinstance(kind, str) else "", line)


def _guess(row: dict, where: str) -> tuple[str, str]:
    for prompt, response in FIELDS:
        if prompt in row and response in row:
            return prompt, response
    known = ", ".join(f"{prompt}/{response}" for prompt, response in FIELDS)
    fields = ", ".join(map(str, row)) or "none"
    raise InputError(
        f"{where}: has fields {fields}, none of {known}: rename yours, or name them to train_nlg.py "
        "with --prompt-field, --response-field"
    )


def _string(row: dict, field: str, where: str) -> str:
    if field not in row:
        raise InputError(f"{where}: the field {field!r} is missing: add it or name another")
    if not isinstance(row[field], str):
        raise InputError(f"{where}: the field {field!r} is {type(row[field]).__name__}, not a string: mend the row")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:
        half = row[field][error.start].encode("ascii", "backslashreplace").decode()
        raise InputError(f"{where}: the field {field!r} has {half}, half of a character: mend the row") from None
    return row[field]


def _first_turns(turns: object, where: str) -> dict | None:
    """The first user turn and the reply that follows it; None if there is no such pair."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{where} is no list of turns, each an object with role and content: mend the row")
    found = {}
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role in USER_ROLES and not found:
            found["user"] = content
        if role in REPLY_ROLES and found:
            return found | {"reply": content}
    return None


def encode_examples(examples: list, tok: Tokenizer, max_length: int) -> tuple[list[Row], int, int]:
    """Tokenised rows, how many responses were cut to max_length tokens, and how many rows were dropped.

    examples: of the class Example, or whatever has a prompt, a response and a line, too.
    Prompt and response are tokenised apart, so no token straddles the boundary and a prompt has the ids at training
    that it will have at generation. A tokenizer that marks the start of a word puts a space before the response. A row
    is dropped if its prompt leaves no room for one response token.
    """
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


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end, without padding: the arguments of `Decoder.packed`, and what is predicted."""

    input_ids: Tensor  # (shared + Σ lengths,)
    lengths: list[int]
    wanted: list[int]  # how many of each row's last tokens predict a response token
    shared: int  # first tokens, the same in every row: of Alpaca's prompt a third
    targets: Tensor  # (Σ wanted,) those response tokens


def pack(rows: list[Row], device: torch.device | str) -> Packed:
    """A micro-batch without padding, and without each row's last token, from which nothing is predicted.

    Position t predicts token t + 1, so of a row without its last token the last ones predict the response.
    """
    shared = common_start([row.ids[: max(row.prompt_length, 1) - 1] for row in rows])
    own, targets = [row.ids[shared:-1] for row in rows], [row.ids[-row.predicted :] for row in rows]
    packed = (np.concatenate(parts).astype(np.int64) for parts in ([rows[0].ids[:shared], *own], targets))
    input_ids, targets = (to_device(torch.from_numpy(ids), device) for ids in packed)
    return Packed(input_ids, [len(ids) for ids in own], [row.predicted for row in rows], shared, targets)


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


def collate(rows: list[Row], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """input_ids (B, T), padded on the right, and labels (B, T): the ids of response tokens, IGNORED elsewhere.

    What pads is never looked at, so it is 0 and not the pad token: that may lie beyond the model's vocabulary.
    """
    width = max(len(row.ids) for row in rows)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.ids)] = row.ids
        labels[index, row.prompt_length : len(row.ids)] = row.ids[row.prompt_length :]
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device)


def examples_digest(examples: list) -> str:
    """SHA-256, in hex, of what is learned from `Example`s and the like: where they stand and their kind don't count."""
    digest = hashlib.sha256()
    for example in examples:
        learned = {name: value for name, value in vars(example).items() if name not in ("line", "kind")}
        digest.update(json.dumps(learned).encode())
    return digest.hexdigest()


def check_fits(rows: list, source: str | None, model: str, max_length: int) -> None:
    """InputError if rows of the file `source` have tokens, or --max-length asks for positions, that `model` has not."""
    config = read_config(Path(model))
    limit = config.max_position_embeddings
    if limit is not None and max_length > limit:
        raise InputError(f"--max-length {max_length}: {model} has {limit} positions: give at most {limit}")
    for row in rows:
        where = f"{source or 'built-in data'}, line {row.line}"
        if len(row.ids) == 0:
            raise InputError(f"{where}: the text has no tokens: leave it out")
        if row.ids.max() >= config.vocab_size:
            which = f"token {row.ids.max()}, but the model has {config.vocab_size} tokens"
            raise InputError(f"{model}: its tokenizer gives {which} ({where}): they do not belong together")
        if limit is not None and len(row.ids) > limit:
            raise InputError(f"{where}: {len(row.ids)} tokens, but the model has {limit} positions: leave it out")
