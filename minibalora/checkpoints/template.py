"""The template of prompts: Alpaca's, the model's own chat template, or none."""

import argparse
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object, recorded_settings, replacing, write_json
from minibalora.checkpoints.chat_template import FILE, MORE, ChatTemplate, read_chat_template

NAMES = ("alpaca", "chat", "raw")
RECORD = "minibalora.json"  # in an exported folder: the name of the template used in training


@dataclass(frozen=True)
class Template:
    """How questions and conversations become prompts."""

    name: str  # one of NAMES
    chat: ChatTemplate | None = None  # if the name is "chat"
    ending: str = ""  # appended to every question; in Alpaca's template, the response begins with it

    def __str__(self) -> str:
        chat = self.chat and f"chat, the model's own in {self.chat.source}; a reply ends with {self.chat.end_of_turn}"
        return chat or {"alpaca": "alpaca", "raw": "raw, prompts as they are"}[self.name]

    @property
    def settings(self) -> dict[str, str]:
        """The settings that a run records: the name, and the date if the chat template writes one."""
        has_date = self.chat is not None and self.chat.has_date
        return {"template": self.name} | ({"date": self.chat.now.isoformat()} if has_date else {})

    def resume(self, settings: dict) -> None:
        """Let the template write the recorded date, not today's, so that a resumed run has the same rows."""
        if self.chat is not None and "date" in settings:
            self.chat.now = datetime.fromisoformat(settings["date"])


ALPACA, RAW = Template("alpaca"), Template("raw")


def add_template_flags(group: argparse._ArgumentGroup, default: str) -> None:
    """Add --template, and --raw for `--template raw`. default: describes the default."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--template", choices=NAMES, help="template of the prompts: Alpaca's, the model's own for "
        f"conversations (chat), or none (raw) (default: {default})")  # fmt: skip
    add("--raw", dest="template", action="store_const", const="raw", help="as --template raw")


def choose_template(name: str | None, model: Path, adapter: Path | None = None) -> Template:
    """Return the template of this name. None: chat if there is a chat template, else alpaca.

    An adapter's chat template takes precedence over the model's. Raises InputError for chat if neither folder has one.
    """
    if name in ("alpaca", "raw"):
        return Template(name)
    folders = [folder for folder in (adapter, model) if folder is not None]
    templates = (read_chat_template(folder, model) for folder in folders)
    chat = next(filter(None, templates), None)
    if chat is None and name == "chat":
        where = "no chat_template.jinja, and no chat_template in tokenizer_config.json"
        raise InputError(f"{model}: {where}: give --template alpaca, or add the model's template")
    return Template("chat", chat) if chat else ALPACA


def trained_template(model: Path, adapter: Path | None) -> str | None:
    """Return the name of the template that the adapter, or else the model, was trained with. None if unknown."""
    return next((name for folder in (adapter, model) if folder is not None and (name := recorded_name(folder))), None)


def recorded_name(folder: Path) -> str | None:
    if not os.path.isdir(folder):
        return None
    settings = recorded_settings(folder)
    # Older runs recorded `raw`.
    name = settings.get("template", {True: "raw", False: "alpaca"}.get(settings.get("raw")))
    if (folder / RECORD).exists():
        name = read_json_object(folder / RECORD).get("template")
    if name not in (None, *NAMES):
        raise InputError(f"{folder}: its template is {name!r}, not one of {', '.join(NAMES)}: give --template")
    return name


def save_template(template: Template, folder: Path) -> None:
    """Write the chat template into a trained model's folder, and its name if there is no run.json to record it."""
    if template.chat is not None:
        for name, text in template.chat.texts.items():
            path = folder / (FILE if name == "default" else f"{MORE}/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    if not (folder / "run.json").exists():
        write_json(folder / RECORD, {"template": template.name})


def copy_template(source: Path, folder: Path) -> None:
    """Copy the name and the chat template that the adapter in `source` was trained with, if recorded."""
    name = recorded_name(source)
    if name is not None:
        write_json(folder / RECORD, {"template": name})
    for file in (source / FILE, *(source / MORE).glob("*.jinja")):
        if file.exists():
            path = folder / file.relative_to(source)
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                shutil.copyfile(file, temporary)
