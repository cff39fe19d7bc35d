"""Conversations: what is in the prompt, what is learned, what is left out."""

import json
from pathlib import Path

import numpy as np
import pytest

import minibalora as mb
from minibalora.checkpoints import BUILT_IN
from minibalora.checkpoints.chat_template import read_chat_template
from minibalora.data.batches import encode_examples
from minibalora.data.prompts import ask, example_from
from minibalora.data.template import Template

CHAT = Path(__file__).parents[1] / "golden" / "chat"
GOLDEN = json.loads((CHAT / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A model's folder with the built-in tokenizer, tokens added, and a chat template: a golden one's or a text."""
    done = {}

    def folder_of(name: str, template: str | None = None) -> Path:
        if (name, template) in done:
            return done[name, template]
        golden, folder = GOLDEN[name], tmp_path_factory.mktemp(name)
        backend = json.loads((BUILT_IN / "llama" / "tokenizer.json").read_text())
        known = {token["content"]: token["id"] for token in backend["added_tokens"]}
        size = len(backend["model"]["vocab"])
        settings = {key: golden[key] for key in ("bos_token", "eos_token") if golden[key]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        # transformers adds EOS first, then BOS, then the template's.
        for content in [golden["eos_token"], golden["bos_token"], *golden["tokens"]]:
            if content is not None and content not in known:
                known[content] = size + len(known) - len([token for token in known if known[token] < size])
                backend["added_tokens"].append({"id": known[content], "content": content} | flags)
        (folder / "tokenizer.json").write_text(json.dumps(backend))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        text = (CHAT / f"{name}.jinja").read_text(encoding="utf-8") if template is None else template
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        done[name, template] = folder
        return folder

    return folder_of


@pytest.fixture(scope="module")
def chat_of(folder_of):
    def chat_of(name: str, template: str | None = None) -> tuple[Template, mb.checkpoints.tokenizer.Tokenizer]:
        folder = folder_of(name, template)
        own = Template("chat", read_chat_template(folder, folder))
        return own, mb.load_tokenizer(folder, own.chat)

    return chat_of


CASES = [(name, index) for name, golden in GOLDEN.items() for index in range(len(golden["rows"]))]


@pytest.mark.parametrize("name, index", CASES)
def test_ids_and_learned_tokens_are_those_of_transformers(chat_of, name, index):
    template, tok = chat_of(name)
    golden = GOLDEN[name]["rows"][index]
    example = example_from({"messages": golden["messages"]}, 1, template=template)
    ((ids, inside),) = tok.encode_spans([example.rendered], [example.learned])
    assert ids == golden["ids"]
    assert inside.astype(int).tolist() == golden["mask"]
    (row,), cut, dropped = encode_examples([example], tok, 10_000)
    places = np.flatnonzero(golden["mask"])
    assert row.ids.tolist() == ids[: places[-1] + 1] and row.prompt_length == max(places[0], 1)
    assert row.predicted == sum(golden["mask"][1:]) and (cut, dropped) == (0, 0)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_question_is_asked_as_transformers_asks_it_and_its_answer_ends_at_the_turn(chat_of, name):
    template, tok = chat_of(name)
    prompt = ask(template, "Hi", "here")
    assert tok.encode_prompts([prompt]) == [GOLDEN[name]["prompt"]]
    end = GOLDEN[name]["end"]
    assert template.chat.end_of_turn == end or end is None
    assert {tok.backend.token_to_id(template.chat.end_of_turn), tok.eos_id} <= tok.eos_ids
