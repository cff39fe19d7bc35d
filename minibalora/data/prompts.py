"""From rows to prompts and responses: recognise the fields, fill in the template."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.data.files import read_rows
from minibalora.data.pairs import field_text, pair_fields, read_pair

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

CONVERSATIONS = ("conversations", "messages")  # first user turn, first reply; ShareGPT's and OpenAI's spelling

USER_ROLES, REPLY_ROLES = ("user", "human"), ("assistant", "gpt", "chatgpt", "bing", "bard")


@dataclass(frozen=True)
class Example:
    prompt: str  # the whole prompt, template included
    response: str
    kind: str  # the row's "type", or ""
    line: int  # its line or row, from 1, counted on through the files of a set


def read_examples(
    path: str | Path,
    prompt_field: str | None = None,
    response_field: str | None = None,
    input_field: str | None = None,
    limit: int | None = None,
    raw: bool = False,
) -> tuple[list[Example], Counter[str]]:
    """Read the first `limit` rows of a data file, or of a set of files (see `files.shards`).

    Returns the examples, and how many rows were left out for each reason: published collections have conversations in
    which no user is answered, and empty responses, which would teach to answer nothing. Raises InputError, which names
    the line, at the first row that is not understood.
    """
    examples, left_out = [], Counter({"conversations without a reply": 0, "empty responses": 0})
    for line, where, row in islice(read_rows(path), limit):
        example = example_from(row, line, where, prompt_field, response_field, input_field, raw)
        if example is None:
            left_out["conversations without a reply"] += 1
        elif not example.response.strip():
            left_out["empty responses"] += 1
        else:
            examples.append(example)
    if not examples:
        raise InputError(f"{path}: has no rows with a response: give a data file with prompts and responses")
    return examples, left_out


def example_from(
    row: object,
    line: int,
    where: str = "built-in data",
    prompt_field: str | None = None,
    response_field: str | None = None,
    input_field: str | None = None,
    raw: bool = False,
) -> Example | None:
    """Return a row as an example, its prompt template filled in; None for a conversation in which no user is answered.

    input_field: the text that the prompt is about; None: the fields INPUTS; "": none. raw: without a template, the
    prompt is what the row asks, and its input on a line below. Raises InputError, which begins with `where`, if the
    fields are not understood.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, not an object with a prompt and a response")
    has_pair = pair_fields(row) is not None
    key = next((key for key in CONVERSATIONS if row.get(key) is not None and (row[key] or not has_pair)), None)
    if key is not None and not (prompt_field or response_field):
        turns = _first_turns(row[key], f"{where}: {key}")
        if turns is None:
            return None
        question, context, response = field_text(turns, "user", where), "", field_text(turns, "reply", where)
    else:
        question, context, response = read_pair(row, where, prompt_field, response_field, input_field)
    if raw:
        prompt = f"{question}\n{context}" if context else question
    else:
        prompt = (PROMPT_WITH_INPUT if context else PROMPT).format(instruction=question, input=context)
    kind = row.get("type")
    return Example(prompt, response, kind if isinstance(kind, str) else "", line)


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


def examples_digest(examples: list) -> str:
    """SHA-256, in hex, of what is learned from `Example`s and the like: where they stand and their kind don't count."""
    digest = hashlib.sha256()
    for example in examples:
        learned = {name: value for name, value in vars(example).items() if name not in ("line", "kind")}
        digest.update(json.dumps(learned).encode())
    return digest.hexdigest()
