"""Conversations: a row's turns, the text that a chat template makes of them, and the parts of it that are learned.

Every turn is in the prompt, is learned, or is left out with a note.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from reprlib import repr as short  # for values from a file in messages

from minibalora.base.errors import InputError
from minibalora.checkpoints.chat_template import REPLY, ChatTemplate
from minibalora.data.files import text_of
from minibalora.data.pairs import BESIDE, EMPTY, FIELDS, HISTORIES, INPUTS, SYSTEMS, lacking, refuse_media

CONVERSATIONS = ("conversations", "messages", "conversation")  # the names in ShareGPT, OpenAI and LMSYS
SYNONYMS = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt model bot chatbot ai chatgpt bing bard claude function_call",
    "tool": "tool function ipython observation tool_response function_response",
}
ROLES = {synonym: role for role, synonyms in SYNONYMS.items() for synonym in synonyms.split()}
EARLY, LATE = "turns before the first question", "turns after the last reply"
BLANK, WEIGHTLESS = "replies without a text, not learned", "replies of weight 0, not learned"
# 0 or false: a reply is not learned; OpenAI's, ms-swift's, Axolotl's
WEIGHTS = ("weight", "loss", "train", "training", "loss_mask")
WORDS = {word: False for word in ("0", "0.0", "false", "no")} | {word: True for word in ("1", "1.0", "true", "yes")}
TAGS = ("label", "kto_tag")  # false: the answer of a row is a bad one, in KTO's data
MARKED = "rows marked as not to be learned"
UNSEEN, CURTAILED = "turns that the template leaves out", "replies that the template writes without a part"
LOST = "replies that the template leaves out, not learned"
UNUSED = "texts beside a conversation or a turn (context, documents, ...), not used"
OTHERS = {*INPUTS, *BESIDE, *HISTORIES, "instruction"}
PROMPTED = "conversations whose prompt ends with text that no reply begins with, for instance <think>"
SPECIAL = {"tool_calls", "tool_call_id", "name", "reasoning_content"}  # keys of turns that are not joined to others
TOOLS = "lists of tools that the template leaves out"
SETTINGS = "settings for the template, not used (chat_template_kwargs)"
JOINED = "conversations with neighbouring turns joined, the system's with the user's, as the template requires"


Span = tuple[int, int]
Write = Callable[..., tuple[str, list[Span]]]  # ChatTemplate.render for the messages of one row


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, with role and content, up to the last one that is learned."""

    messages: list[dict]
    learned: list[int]  # indices of the messages that are learned
    tools: list | None = None
    notes: tuple[str, ...] = ()  # one for each thing left out


@dataclass(frozen=True)
class Rendered:
    """A conversation as a chat template writes it."""

    prompt: str  # everything before the last reply
    text: str
    learned: tuple[Span, ...]  # the parts of the text (start, end) that are learned, in order
    notes: tuple[str, ...] = ()


def conversation_key(row: object) -> str | None:
    """Return the field that holds a row's conversation; None if there is none. Prefers fields that are not empty."""
    keys = [key for key in CONVERSATIONS if row.get(key) is not None] if isinstance(row, dict) else ()
    return next((key for key in keys if row[key]), keys[0] if keys else None)


def read_conversation(row: dict, where: str, asks: bool = False) -> Conversation | None:
    """Read the conversation of a row. Returns None if no user turn is answered.

    asks: the last turn is to be answered, and nothing is learned. Raises InputError, which begins with `where`, for a
    turn that cannot be read.
    """
    key = conversation_key(row)
    turns, place = row[key], f"{where}: {key}"
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):  # LIMA
        turns = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{place} is not a list of turns, each an object with role and content: mend the row")
    messages = [_message(turn, place) for turn in turns]
    if not asks and messages and messages[-1]["role"] == "user":
        _refuse_reply_beside(row, place)
    unused = _unused(row, where, messages)
    tools = _all_tools(row, where, messages)
    own = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    systems = [_text(row[name], f"{where}: {name}") for name in SYSTEMS if row.get(name)]
    systems = [*(text for text in systems if text.strip() and text.strip() not in own), *([own] if own.strip() else [])]
    if systems:
        messages.insert(0, {"role": "system", "content": "\n\n".join(systems)})
    start = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    early = [message for message in messages[:start] if message["role"] != "system"]
    messages = [message for message in messages[:start] if message["role"] == "system"] + messages[start:]
    silent = {i: why for i, message in enumerate(messages) if (why := _why_not_learned(message, place))}
    learned = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i not in silent]
    if asks:
        if unused:
            raise InputError(f"{where}: no turn has the text in {unused[0]!r}: write it into one, or remove it")
        if not messages or messages[-1]["role"] == "assistant":
            raise InputError(f"{place} does not end with a question: remove its last reply")
        return Conversation(messages, [], tools)
    if not learned:
        return None
    end = learned[-1] + 1
    notes = [UNUSED] * len(unused) + [SETTINGS] * bool(row.get("chat_template_kwargs"))
    notes += [EARLY] * len(early) + [LATE] * len(messages[end:]) + [why for i, why in silent.items() if i < end]
    return Conversation(messages[:end], learned, tools, tuple(notes))


def is_marked(row: object) -> bool:
    """Return whether a row as a whole is marked as one not to learn from: by a weight of 0, or as KTO's bad answers."""
    if not isinstance(row, dict) or row.keys().isdisjoint((*TAGS, *WEIGHTS)):
        return False
    return any(row.get(name) is False for name in TAGS) or any(_learns(row.get(name)) is False for name in WEIGHTS)


def _learns(weight: object) -> bool | None:
    """Return whether a weight says that a reply is learned. None: it says neither."""
    return WORDS.get(str(weight).strip().lower())


def _refuse_reply_beside(row: dict, place: str) -> None:
    """Raise InputError if the reply to a conversation stands in a field of its own, which would not be learned."""
    if names := [name for _, name in FIELDS if isinstance(row.get(name), str) and row[name].strip()]:
        raise InputError(f"{place} ends with a question, and {names[0]!r} may be its reply: write it as the last turn")


def _unused(row: dict, where: str, messages: list[dict]) -> list[str]:
    """Return the fields beside a conversation, or beside a turn's content, with a text that no turn repeats.

    Raises InputError for a row with images and the like.
    """
    said = "\n".join(message.get("content", "") for message in messages)
    refuse_media(row, where, said)
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    return [name for part in (row, *messages) for name in lacking(part, OTHERS, said, question)]


def _all_tools(row: dict, where: str, messages: list[dict]) -> list | None:
    """Return the tools that a row or its system turn offers. None without tools."""
    tools = tools_of(row, where) or []
    if messages and messages[0]["role"] == "system":
        tools += [tool for tool in tools_of(messages[0], where) or [] if tool not in tools]
    return tools or None


def conversation_of(question: str, reply: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": reply}], [1])


def with_ending(conversation: Conversation, ending: str) -> Conversation:
    """Return the conversation with `ending` at the end of its last question."""
    messages = list(conversation.messages)
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    messages[last] = messages[last] | {"content": messages[last]["content"] + ending}
    return replace(conversation, messages=messages)


def _message(turn: dict, place: str) -> dict:
    """Return a turn with its role and text under the usual names. Other keys, such as tool calls, stay."""
    turn = {key: value for key, value in turn.items() if value is not None}
    refuse_media(turn, place)
    names = turn.pop("role", None), turn.pop("from", None)
    name = next((name for name in names if name not in EMPTY), None)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"{place} has a turn with the role {name!r}, none of {', '.join(ROLES)}: rename it")
    texts = [turn.pop(name) for name in ("content", "value", "text") if name in turn]
    texts = [text for text in texts if text not in EMPTY] or texts[:1]
    message = {"role": role} | ({"content": _text(texts[0], place)} if texts else {})
    if texts[1:] != texts[:1] * len(texts[1:]):
        turn["text"] = texts[1:]  # counted as not used
    if call := turn.pop("function_call", None):  # OpenAI's older name
        turn.setdefault("tool_calls", [{"type": "function", "function": call}])
    if "tool_calls" in turn and not turn["tool_calls"]:
        del turn["tool_calls"]
    thoughts = next((turn[name] for name in ("reasoning_content", "thinking", "reasoning") if name in turn), None)
    turn |= {} if thoughts is None else {"reasoning_content": thoughts}  # as transformers does
    if not texts and "tool_calls" not in turn:
        if role in ("system", "user"):
            raise InputError(f"{place}: the content of a {role} turn is NoneType, not a string: mend the row")
        message["content"] = ""
    return message | turn


def _text(content: object, place: str) -> str:
    """Return a turn's text. The texts of a list of parts are joined without a space, as templates write them."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict):
            if part.get("type", "text") != "text":
                raise InputError(f"{place} has a part of the type {part['type']!r}, not text: remove the row")
            part = part.get("text", part)
        texts.append(text_of(part, "the content of a turn", place))
    return "".join(texts)


def _why_not_learned(message: dict, place: str) -> str | None:
    """Return why a reply is not learned; None if it is learned or is not a reply. Raises InputError for a weight that
    is neither 0 nor 1."""
    weights = [message.pop(name) for name in WEIGHTS if name in message]
    if message["role"] != "assistant":
        return None
    if unknown := [weight for weight in weights if _learns(weight) is None]:
        raise InputError(f"{place} has a reply of the weight {short(unknown[0])}: give 0, not to learn it, or 1")
    is_blank = not (message.get("content") or "").strip() and "tool_calls" not in message
    return BLANK if is_blank else WEIGHTLESS if not all(map(_learns, weights)) else None


def tools_of(row: dict, where: str) -> list | None:
    """Return the tools that a row offers: a list of objects, or JSON text in place of the list or of an object.

    None: no tools. Raises InputError, which begins with `where`, for anything else.
    """
    name = "tools" if row.get("tools") else "functions"  # OpenAI's older name
    try:
        tools = _from_json(row.get(name) or [])
        tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: {name} is not a list of objects: mend the row")
    if name == "functions":
        tools = [{"type": "function", "function": function} for function in tools]
    return tools or None


def _from_json(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


def pair_of(conversation: Conversation, where: str, template: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the question, the reply and the notes of a conversation for a template that takes one pair of turns.

    The question begins with the system turns. Raises InputError, which begins with `where`, for a longer conversation.
    """
    *asked, reply = conversation.messages if conversation.learned else [*conversation.messages, {"content": ""}]
    if any(message["role"] not in ("system", "user") for message in asked) or "tool_calls" in reply:
        raise InputError(
            f"{where}: a conversation of {len(conversation.messages)} turns, but --template {template} takes one "
            "question and one reply: give --template chat and a --model with a chat template, or split the conversation"
        )
    notes = (TOOLS,) * bool(conversation.tools) + (CURTAILED,) * ("reasoning_content" in reply)
    return "\n\n".join(message["content"] for message in asked), reply["content"], conversation.notes + notes


def render_prompt(conversation: Conversation, chat: ChatTemplate, where: str) -> str:
    """Return the text of a conversation up to the start of its next reply. Raises InputError as `render` does."""
    for messages, _ in _versions(_without_ends(conversation, chat.end_of_turn)):
        try:
            text, _ = chat.render(messages, where, conversation.tools, asks=True)
        except InputError as error:
            refusal = error
        else:
            if not _unseen(messages, text):
                return text
            refusal = InputError(f"{where}: the chat template in {chat.source} leaves out a turn: join it to another")
    raise refusal


def render(conversation: Conversation, chat: ChatTemplate, where: str) -> Rendered:
    """Render a conversation and find the parts that are learned.

    Raises InputError, which begins with `where`, if the template refuses the conversation, or if it is not certain
    where a reply stands in the text.
    """
    conversation = _without_ends(conversation, chat.end_of_turn)
    results, refusal = [], None
    write = partial(chat.render, where=where, tools=conversation.tools)
    for messages, learned in _versions(conversation):
        try:
            text, tagged = write(messages)
            if chat.end_of_turn is None:
                raise InputError(f"{chat.source}: ends a reply with no token of the tokenizer, so a model would not "
                                 "learn to stop: give --template alpaca, or another chat template")  # fmt: skip
            prompts, spans = _learned_spans(chat, write, messages, learned, text, tagged)
        except InputError as error:
            refusal = error
            continue
        if None in spans:
            reply = learned[spans.index(None)] + 1
            refusal = InputError(
                f"{where}: the chat template in {chat.source} writes a reply differently if turns follow, so "
                f"turn {reply}'s tokens are uncertain: end the row there, or add {{% generation %}} to the template"
            )
            continue
        results.append((_unseen(messages, text), messages, learned, text, spans, prompts[-1]))
        if results[-1][0] == 0:
            break
    if not results:
        raise refusal
    unseen, messages, learned, text, spans, prompt = min(results, key=lambda result: result[0])
    notes = [*conversation.notes, *[UNSEEN] * unseen, *[JOINED] * (len(messages) < len(conversation.messages))]
    written = [(start, end) for start, end in spans if text[start:end].strip() != chat.end_of_turn]
    notes += [LOST] * (len(spans) - len(written))
    for index, (start, end) in zip(learned, spans, strict=True):
        is_cut = any(not _has(text[start:end], part) for part in _parts_of(messages[index]))
        notes += [CURTAILED] * (is_cut and (start, end) in written)
    notes += [] if text.startswith(prompt) else [PROMPTED]
    if conversation.tools and not any("tools" in program for program in chat.texts.values()):
        notes.append(TOOLS)
    return Rendered(prompt, text, tuple(written), tuple(notes))


def _without_ends(conversation: Conversation, end: str | None) -> Conversation:
    """Return the conversation without the end of turn, which the template adds, in replies that have it already."""
    messages = []
    for message in conversation.messages:
        content = (message.get("content") or "").rstrip()
        if end and message["role"] == "assistant" and content.endswith(end):
            message = message | {"content": content.removesuffix(end)}
        messages.append(message)
    return replace(conversation, messages=messages)


def _versions(conversation: Conversation) -> list[tuple[list[dict], list[int]]]:
    """Return the messages and the indices of the learned ones; then, if they differ, the same in alternating turns.

    Many templates accept only alternating turns of user and assistant. A system turn joins the question that
    follows, and blank replies are left out.
    """
    joined, learned = [], []
    for index, message in enumerate(conversation.messages):
        if message["role"] == "system":
            message = message | {"role": "user"}
        is_plain = SPECIAL.isdisjoint(message)
        if is_plain and message["role"] == "assistant" and not message["content"].strip():
            continue
        before = joined[-1] if joined else {"role": None}
        is_plain = is_plain and SPECIAL.isdisjoint(before) and before["role"] == message["role"]
        if is_plain and (index in conversation.learned) == (len(joined) - 1 in learned):
            joined[-1] = message | {"content": f"{before['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
            if index in conversation.learned:
                learned.append(len(joined) - 1)
    versions = [(_with_calls(conversation.messages, form), conversation.learned) for form in (dict, str)]
    # Templates that know no tool calls fail on a missing content.
    versions.append(([{"content": ""} | message for message in conversation.messages], conversation.learned))
    versions = [version for index, version in enumerate(versions) if version not in versions[:index]]
    return versions if len(joined) == len(conversation.messages) else [*versions, (joined, learned)]


def _with_calls(messages: list[dict], form: type) -> list[dict]:
    """Return the messages with the arguments of all tool calls as objects (form: dict), or as JSON text and with a null
    content beside them if there is none (str).

    Some templates, such as DeepSeek's, take only the second. Others would quote a text twice and write None.
    """
    changed = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            null = {"content": None} if form is str else {}
            message = null | message | {"tool_calls": [_with_form(call, form) for call in calls]}
        changed.append(message)
    return changed


def _with_form(call: object, form: type) -> object:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_form(call["function"], form)}
    arguments = call.get("arguments")
    if form is str and isinstance(arguments, dict):
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if form is dict and isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return call | {"arguments": value} if isinstance(value, dict) else call
    return call


def _learned_spans(
    chat: ChatTemplate, write: Write, messages: list[dict], learned: list[int], text: str, tagged: list[Span]
) -> tuple[list[str], list[Span | None]]:
    """Return the prompts of the learned replies, at least the last one, and the span of each learned reply in the text.

    A span includes the end of the turn. It is the part that a `generation` tag encloses, or else the text after the
    prompt. It is None if the reply cannot be located.
    """
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(tagged) == len(replies):
        spans = [_with_end(chat, text, *span) for index, span in zip(replies, tagged, strict=True) if index in learned]
        return [write(messages[: learned[-1]], asks=True)[0]], spans
    prompts, spans, before = [], [], 0
    for index in learned:
        prompts.append(write(messages[:index], asks=True)[0])
        start = _start(write, messages[:index], prompts[-1], text)
        end = None if start is None or start < before else _end(chat, write, messages, index, text, start)
        spans.append(None if end is None else (start, end))
        before = end or before
    return prompts, spans


def _with_end(chat: ChatTemplate, text: str, start: int, end: int) -> Span:
    """Extend a span by an end of turn right after it: a model that does not learn this token does not stop."""
    rest = text[end:].lstrip()
    if chat.end_of_turn not in text[start:end] and rest.startswith(chat.end_of_turn):
        end = len(text) - len(rest) + len(chat.end_of_turn)
    return start, end


def _start(write: Write, asked: list[dict], prompt: str, text: str) -> int | None:
    """Return where the reply to the messages `asked` begins in the text. prompt: these messages, rendered."""
    if text.startswith(prompt):
        return len(prompt)
    # A prompt may end with something that the text lacks, such as "<think>". Then the reply begins before it.
    marked, without_reply = write([*asked, {"role": "assistant", "content": REPLY}])[0], write(asked)[0]
    common = os.path.commonprefix([prompt, marked.partition(REPLY)[0]])
    return len(common) if text.startswith(common) and common.startswith(without_reply) else None


def _end(chat: ChatTemplate, write: Write, messages: list[dict], index: int, text: str, start: int) -> int | None:
    """Return the end in the text of the reply at `index`, which begins at `start`, with its end of turn."""
    end, content = chat.end_of_turn, (messages[index].get("content") or "").strip()
    rest = text[start:].lstrip()
    if content and rest.startswith(content) and rest[len(content) :].lstrip().startswith(end):
        return text.index(end, len(text) - len(rest) + len(content)) + len(end)
    upto = text if index == len(messages) - 1 else write(messages[: index + 1])[0]
    if text.startswith(upto):
        reply = upto[start:]
        if end in reply:
            return start + reply.rindex(end) + len(end)
        others = [match.end() for match in chat.token.finditer(reply)]  # some templates end tool calls differently
        return start + others[-1] if others and not reply[others[-1] :].strip() else None
    marked, _ = write([*messages[:index], {"role": "assistant", "content": REPLY}, *messages[index + 1 :]])
    rest = marked.partition(REPLY)[2]
    return len(text) - len(rest) + rest.index(end) + len(end) if end in rest and text.endswith(rest) else None


def _unseen(messages: list[dict], text: str) -> int:
    """Count the turns, other than replies, that the text lacks."""
    return sum(message["role"] != "assistant" and not _has(text, message.get("content", "")) for message in messages)


def _parts_of(reply: dict) -> list[str]:
    """Return the parts of a reply: its text, its thoughts, the names of the tools that it calls."""
    calls = reply.get("tool_calls") if isinstance(reply.get("tool_calls"), list) else []
    calls = [call.get("function") or call for call in calls if isinstance(call, dict)]
    names = [call.get("name") for call in calls if isinstance(call, dict)]
    return [part for part in (reply.get("content"), reply.get("reasoning_content"), *names) if isinstance(part, str)]


def _has(text: str, part: str) -> bool:
    """Return whether the text contains the part, as it is or as a JSON string; spaces do not count."""
    if part.strip() in text:
        return True
    as_json = json.dumps(part.strip(), ensure_ascii=False)[1:-1]
    text, *forms = ("".join(form.split()) for form in (text, part, as_json))
    return any(form in text for form in forms)
