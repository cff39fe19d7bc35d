"""From rows to prompts and responses: recognise the fields, fill in the template."""

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.checkpoints.template import ALPACA, Template
from minibalora.data.chat import (
    Conversation,
    conversation_key,
    conversation_of,
    pair_of,
    read_conversation,
    render,
    render_prompt,
    with_ending,
)
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

NO_REPLY = "conversations without a reply"


@dataclass(frozen=True)
class Example:
    prompt: str  # the whole prompt, template included
    response: str
    kind: str  # the row's "type", or ""
    line: int  # where it stands in its file, from 1 (in a JSON array: which item)
    # What the model's chat template wrote, and the parts of it (start, end) that are learned; None: no chat template.
    rendered: str | None = None
    learned: tuple[tuple[int, int], ...] | None = None
    notes: tuple[str, ...] = ()  # what is left out of the row, a note each


def read_examples(
    path: str | Path,
    prompt_field: str | None = None,
    response_field: str | None = None,
    limit: int | None = None,
    template: Template = ALPACA,
) -> tuple[list[Example], dict[str, list[int]]]:
    """The first `limit` rows of a JSON Lines file or JSON array; InputError names the line of the first bad one.

    Also returns what is left out of them, the lines for each reason: for instance conversations in which no user is
    answered, of which published collections have many.
    """
    examples, left_out = [], {}
    for line, row in islice(read_rows(Path(path)), limit):
        example = example_from(row, line, f"{path}, line {line}", prompt_field, response_field, template)
        if example is not None:
            examples.append(example)
        for note in (NO_REPLY,) if example is None else example.notes:
            left_out.setdefault(note, []).append(line)
    if not examples:
        raise InputError(
            f"{path}: has no rows with a response: give JSON Lines or a JSON array with prompts and responses"
        )
    return examples, left_out


def left_out_in_words(left_out: dict[str, list[int]]) -> str:
    """How often each thing was left out, and where first."""
    counts = {NO_REPLY: []} | left_out
    return ", ".join(
        f"{len(lines):,} {reason}" + (f" (first in line {lines[0]})" if lines else "")
        for reason, lines in counts.items()
    )


def has_conversations(path: str | Path) -> bool:
    """Whether the first row of a file is a conversation."""
    return any(conversation_key(row) is not None for _, row in islice(read_rows(Path(path)), 1))


def example_from(
    row: object,
    line: int,
    where: str = "built-in data",
    prompt_field: str | None = None,
    response_field: str | None = None,
    template: Template = ALPACA,
) -> Example | None:
    """A row as an example, its prompt template filled in; None for a conversation in which no user is answered.

    InputError, beginning with `where`, if it is no such row.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, not an object with a prompt and a response")
    kind = row.get("type") if isinstance(row.get("type"), str) else ""
    context, conversation, notes = "", None, ()
    if prompt_field or response_field:
        guessed = (None, None) if prompt_field and response_field else _guess(row, where)
        fields = prompt_field or guessed[0], response_field or guessed[1]
    elif conversation_key(row):
        conversation, fields = read_conversation(row, where), None
        if conversation is None:
            return None
    else:
        fields = _guess(row, where)
    if fields:
        question, response = (_string(row, field, where) for field in fields)
        context = _string(row, "input", where) if fields[0] == "instruction" and row.get("input") else ""
    elif template.chat is None:
        question, response, notes = pair_of(conversation, where, template.name)
    if template.chat is None:
        return Example(fill(template, question, context), response, kind, line, notes=notes)
    conversation = conversation or conversation_of(_with_context(question, context), response)
    result = render(with_ending(conversation, template.ending), template.chat, where)
    response = conversation.messages[-1].get("content", "")
    return Example(result.prompt, response, kind, line, result.text, result.learned, result.notes)


def fill(template: Template, question: str, context: str = "") -> str:
    """Alpaca's prompt, or the raw one: what is asked, and its input on a line below."""
    if template.name == "raw":
        return _with_context(question, context) + template.ending
    return (PROMPT_WITH_INPUT if context else PROMPT).format(instruction=question, input=context) + template.ending


def ask(template: Template, question: str, where: str) -> str:
    """The whole prompt of a question; InputError, beginning with `where`, if the model's chat template refuses it."""
    if template.chat is None:
        return fill(template, question)
    return render_prompt(Conversation([{"role": "user", "content": question}], []), template.chat, where)


def _with_context(question: str, context: str) -> str:
    return f"{question}\n{context}" if context else question


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


def examples_digest(examples: list) -> str:
    """SHA-256, in hex, of what is learned from `Example`s and the like: where they stand and their kind don't count."""
    digest, aside = hashlib.sha256(), {"line", "kind", "notes"}
    for example in examples:
        learned = {name: value for name, value in vars(example).items() if value is not None and name not in aside}
        digest.update(json.dumps(learned).encode())
    return digest.hexdigest()
