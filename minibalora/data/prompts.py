"""From rows to prompts and responses: recognise the fields, fill in the template."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.checkpoints.template import ALPACA, Template
from minibalora.data.chat import (
    MARKED,
    TOOLS,
    Conversation,
    conversation_key,
    conversation_of,
    is_marked,
    pair_of,
    read_conversation,
    render,
    render_prompt,
    tools_of,
    with_ending,
)
from minibalora.data.files import read_rows
from minibalora.data.pairs import pair_fields, read_pair, read_question

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

NO_REPLY, EMPTY = "conversations without a reply", "empty responses"


@dataclass(frozen=True)
class Example:
    prompt: str  # the whole prompt, template included
    response: str
    kind: str  # the row's "type", or ""
    line: int  # its line or row, from 1, counted on through the files of a set
    # The text that the chat template wrote, and its parts (start, end) that are learned; None: no chat template.
    rendered: str | None = None
    learned: tuple[tuple[int, int], ...] | None = None
    notes: tuple[str, ...] = ()  # one for each thing left out of the row


def read_examples(
    path: str | Path,
    prompt_field: str | None = None,
    response_field: str | None = None,
    input_field: str | None = None,
    limit: int | None = None,
    template: Template = ALPACA,
) -> tuple[list[Example], Counter[str]]:
    """Read the first `limit` rows of a data file, or of a set of files (see `files.shards`).

    Returns the examples, and the number of things left out for each reason: published collections have conversations
    in which no user turn is answered, empty responses, which would teach the model to answer nothing, and rows marked
    as not to be learned, such as KTO's bad answers. Raises InputError, which names the line, at the first row that
    cannot be read.
    """
    examples, left_out = [], Counter({NO_REPLY: 0, EMPTY: 0})
    for line, where, row in islice(read_rows(path), limit):
        if is_marked(row):
            left_out[MARKED] += 1
            continue
        example = example_from(row, line, where, prompt_field, response_field, input_field, template)
        if example is None or not (example.response.strip() or example.rendered):
            left_out[NO_REPLY if example is None else EMPTY] += 1
        else:
            examples.append(example)
            left_out.update(example.notes)
    if not examples:
        raise InputError(f"{path}: has no rows with a response to learn: give a data file with prompts and responses")
    return examples, left_out


def counts_in_words(left_out: Mapping[str, int]) -> str:
    """Describe how much was left out for each reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())


def has_conversations(path: str | Path) -> bool:
    """Return whether the first row of a data file is a conversation."""
    return any(conversation_key(row) is not None for _, _, row in islice(read_rows(path), 1))


def example_from(
    row: object,
    line: int,
    where: str = "built-in data",
    prompt_field: str | None = None,
    response_field: str | None = None,
    input_field: str | None = None,
    template: Template = ALPACA,
) -> Example | None:
    """Return a row as an example, its template filled in; None for a conversation in which no user turn is answered.

    input_field: the text that the prompt is about; None: the fields INPUTS; "": none. Raises InputError, which begins
    with `where`, if the fields cannot be read or the model's chat template fails on them.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, not an object with a prompt and a response")
    kind = row.get("type") if isinstance(row.get("type"), str) else ""
    key, conversation, context, notes = conversation_key(row), None, "", ()
    if key is not None and not (prompt_field or response_field) and (row[key] or pair_fields(row) is None):
        conversation = read_conversation(row, where)
        if conversation is None:
            return None
    else:
        question, context, response = read_pair(row, where, prompt_field, response_field, input_field)
        if template.chat is not None and not response.strip():
            return Example("", response, kind, line)  # nothing to learn
    if template.chat is not None:
        conversation = conversation or replace(
            conversation_of(_with_context(question, context), response), tools=tools_of(row, where)
        )
        result = render(with_ending(conversation, template.ending), template.chat, where)
        if not result.learned:
            return None
        response = conversation.messages[-1].get("content", "")
        return Example(result.prompt, response, kind, line, result.text, result.learned, result.notes)
    if conversation is not None:
        question, response, notes = pair_of(conversation, where, template.name)
    else:
        notes = (TOOLS,) * bool(tools_of(row, where))
    return Example(_fill(template, question, context), response, kind, line, notes=notes)


def prompt_from(row: dict, where: str, field: str, template: Template) -> str:
    """Return the whole prompt of a row that has no response yet: a conversation, or a question in the field.

    Raises InputError, which begins with `where`, as `example_from` does.
    """
    if conversation_key(row):
        conversation = read_conversation(row, where, asks=True)
        return ask(template, conversation.messages, where, conversation.tools)
    question, context = read_question(row, where, field)
    if template.chat is not None:
        question = [{"role": "user", "content": _with_context(question, context)}]
        return ask(template, question, where, tools_of(row, where))
    return _fill(template, question, context)


def ask(template: Template, messages: list[dict], where: str, tools: list | None = None) -> str:
    """Return the whole prompt that asks for an answer to the last message.

    Raises InputError, which begins with `where`, if the template has no room for the messages, or fails on them.
    """
    conversation = Conversation(messages, [], tools)
    if template.chat is not None:
        return render_prompt(conversation, template.chat, where)
    return _fill(template, pair_of(conversation, where, template.name)[0])


def _fill(template: Template, question: str, context: str = "") -> str:
    """Return Alpaca's prompt, or the raw one: the question and, on the next line, the text that it is about."""
    if template.name == "raw":
        return _with_context(question, context) + template.ending
    return (PROMPT_WITH_INPUT if context else PROMPT).format(instruction=question, input=context) + template.ending


def _with_context(question: str, context: str) -> str:
    return f"{question}\n{context}" if context else question


def examples_digest(examples: list) -> str:
    """Return the SHA-256, in hex, of everything that is learned from examples: line, kind and notes don't count."""
    digest, aside = hashlib.sha256(), {"line", "kind", "notes"}
    for example in examples:
        learned = {name: value for name, value in vars(example).items() if value is not None and name not in aside}
        digest.update(json.dumps(learned).encode())
    return digest.hexdigest()
