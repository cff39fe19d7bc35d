"""A model's chat template: a Jinja program that writes a conversation as the text that the model was trained on.

Rendering follows transformers' `apply_chat_template`. It runs in Jinja's sandbox because a stranger wrote the program.
"""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object

FILE, MORE = "chat_template.jinja", "additional_chat_templates"
FILE_NAME = re.compile(r"(?!\.)[\w.-]{1,50}")  # a template's name becomes a file's name when a model is saved
SECONDS = 5  # limit for one rendering
# Noncharacters, which no text contains: they mark what a `generation` tag encloses, and stand for a reply.
OPEN, CLOSE, REPLY = "\ufdd0", "\ufdd1", "\ufdd2"


class ChatTemplate:
    """A template; `render` turns messages, each with a role and usually a content, into one text.

    source: its file. variables: special tokens by name, which templates write into the text. tokens: all added tokens,
    which a tokenizer never splits.
    """

    def __init__(self, source: Path, texts: dict[str, str], variables: dict[str, str], tokens: list[str]):
        """texts: templates by name. Rows with tools take "tool_use" if it exists; all others take "default"."""
        self.source, self.texts, self.variables = source, texts, variables
        self.now = datetime.now()  # some templates write the date; it must not change during a run
        whole = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
        self.token = re.compile("|".join(map(re.escape, whole)) or r"(?!)")

    @property
    def text(self) -> str:
        return self.texts["default"]

    @property
    def has_date(self) -> bool:
        return any("strftime_now" in text for text in self.texts.values())

    @cached_property
    def end_of_turn(self) -> str | None:
        """The token that ends a reply. None if the template writes none, or fails."""
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
        try:
            end = self.token.search(self.render(probe, str(self.source))[0].partition(REPLY)[2])
        except InputError:
            return None  # rendering a row will report the reason
        return end and end[0]

    def render(
        self, messages: list[dict], where: str, tools: list | None = None, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and the (start, end) of each part that a `generation` tag encloses.

        asks: end the text where a reply begins. Raises InputError, which begins with `where`, if the template refuses
        the messages, fails on them or does not end.
        """
        program = self._compiled["tool_use" if tools and "tool_use" in self.texts else "default"]
        try:
            with _limited():
                text = program.render(
                    messages=messages, tools=tools, documents=None, add_generation_prompt=asks, **self.variables
                )
        except Exception as error:  # a stranger's program can raise anything
            reason = " ".join(f"{error}".split())[:200] or type(error).__name__
            cure = "mend the row, or choose another --template"
            raise InputError(f"{where}: the chat template in {self.source} fails: {reason}: {cure}") from None
        parts = re.split(f"([{OPEN}{CLOSE}])", text)
        text, spans, start = "", [], 0
        for part in parts:
            if part == OPEN:
                start = len(text)
            elif part == CLOSE:
                spans.append((start, len(text)))
            else:
                text += part
        return text, [(start, end) for start, end in spans if start < end]

    @cached_property
    def _compiled(self) -> dict:
        environment, error_class = _environment(lambda form: self.now.strftime(form))
        try:
            return {name: environment.from_string(text) for name, text in self.texts.items()}
        except (error_class, RecursionError) as error:
            raise InputError(f"{self.source}: not a Jinja template ({error}): download it again") from None


def read_chat_template(folder: Path, model: Path) -> ChatTemplate | None:
    """Read the chat template in `folder`. Returns None if there is none. model: the tokenizer's folder.

    As in transformers, chat_template.jinja (with additional_chat_templates/*.jinja) takes precedence over
    tokenizer_config.json.
    """
    file, settings_file = folder / FILE, folder / "tokenizer_config.json"
    source, texts = file, {}
    if os.path.isfile(file):
        more = sorted((folder / MORE).glob("*.jinja"))
        texts = {path.stem: _read(path) for path in more} | {"default": _read(file)}
    elif os.path.isfile(settings_file):
        source, stored = settings_file, read_json_object(settings_file).get("chat_template")
        named = stored if isinstance(stored, list) else [{"name": "default", "template": stored}]
        if stored is not None:
            try:
                texts = {entry["name"]: entry["template"] for entry in named}
            except (TypeError, KeyError):
                texts = {"default": None}
            if not all(isinstance(text, str) for text in texts.values()):
                raise InputError(
                    f"{source}: chat_template is neither a text nor a list of named texts: download it again"
                )
    if not texts:
        return None
    for name in texts:
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            expected = "1 to 50 letters, digits, '_', '-' and '.', without '.' in front"
            raise InputError(f"{source}: a chat template is named {name!r}: rename it to {expected}")
    if "default" not in texts:
        raise InputError(f"{source}: no chat template is named default, only {', '.join(texts)}: rename one to default")
    if empty := [name for name, text in texts.items() if not text.strip()]:
        raise InputError(f"{source}: the chat template {empty[0]!r} is empty: fill it, or give --template alpaca")
    special = special_tokens(model)
    return ChatTemplate(source, texts, special, [*special.values(), *_added_tokens(model)])


def special_tokens(folder: Path) -> dict[str, str]:
    """Return special tokens by name ("eos_token", ...) from tokenizer_config.json, or else special_tokens_map.json.

    Raises InputError if the two contradict each other: which one counts depends on the program and the files.
    """
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_if_there(folder / name)
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
        texts = {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}
        differ = [key for key in texts.keys() & tokens.keys() - {"pad_token"} if texts[key] != tokens[key]]
        if differ and "added_tokens_decoder" not in settings:  # beside it, transformers does not read the map
            key, other = min(differ), "special_tokens_map.json"
            both = f"{key} is {texts[key]!r}, but {tokens[key]!r} in {other}"
            raise InputError(f"{folder / name}: {both}, which transformers reads: make the two the same")
        tokens |= texts
    return tokens


def _added_tokens(folder: Path) -> list[str]:
    """Return the texts of the tokens that a model's files add to its tokenizer. `load_tokenizer` checks the files."""
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    tokenizer, settings, old = (read_if_there(folder / name) for name in names)
    by_id = settings.get("added_tokens_decoder", {text: {"content": text} for text in old})
    tokens = [*(tokenizer.get("added_tokens") or []), *(by_id.values() if isinstance(by_id, dict) else [])]
    contents = [token.get("content") for token in tokens if isinstance(token, dict)]
    return [text for text in contents if isinstance(text, str)]


def read_if_there(file: Path) -> dict:
    """Return the JSON object in a file, {} if there is no such file. Raises InputError as `read_json_object` does."""
    return read_json_object(file) if file.exists() else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}: download it again") from None


def _environment(strftime_now: Callable[[str], str]) -> tuple:
    """Return Jinja's sandbox, set up as in transformers, and the class of Jinja's errors.

    Jinja2 comes with torch. It is imported only here because most runs do not need it.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise InputError(f"jinja2 {jinja2.__version__} has known holes in its sandbox: pip install 'jinja2>=3.1.6'")

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

        def _enclosed(self, caller: jinja2.runtime.Macro) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment, jinja2.TemplateError


@contextmanager
def _limited() -> Iterator[None]:
    """Raise TimeoutError if the body takes longer than SECONDS. Works only in the main thread, which gets signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it did not finish within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
