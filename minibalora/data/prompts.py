"""From rows to prompts and responses: recognise the fields, fill in the template."""

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.data.files import read_rows

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


def examples_digest(examples: list) -> str:
    """SHA-256, in hex, of what is learned from `Example`s and the like: where they stand and their kind don't count."""
    digest = hashlib.sha256()
    for example in examples:
        learned = {name: value for name, value in vars(example).items() if name not in ("line", "kind")}
        digest.update(json.dumps(learned).encode())
    return digest.hexdigest()
