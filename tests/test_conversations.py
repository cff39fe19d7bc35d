"""Conversations, from a file of rows to an adapter's answers, as a user runs them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import kill_before, status_of

import minibalora as mb
from minibalora.checkpoints import chat_template, export
from minibalora.evaluation import evaluate, generate
from minibalora.evaluation.decoding import Decoding, generate_each

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_nlg  # noqa: E402

START, END = "<|im_start|>", "<|im_end|>"
PIRATE = {"role": "system", "content": "Be a pirate."}


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """`tiny` with ChatML's two tokens in place of the last two, and SmolLM2's template with a date."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "chat")
    backend = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    size = len(backend["model"]["vocab"])
    backend["added_tokens"] += [{"id": size + i, "content": token} | flags for i, token in enumerate((START, END))]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    config = json.loads((folder / "config.json").read_text())
    assert size + 2 <= config["vocab_size"]
    template = (ROOT / "tests" / "golden" / "chat" / "smollm2.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + template)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [{"messages": [PIRATE, *turns(f"{i} + 1?", f"It is {i + 1}.", "And + 2?", f"{i + 2}")]} for i in range(24)]
    rows[3] = {"messages": turns("Hi", "Ho", "Bye")}
    rows[4] = {"messages": turns("Hi")}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags_of(model: Path, data: Path, out: Path) -> list:
    flags = {"model": model, "data": data, "out": out, "rank": 2, "batch-size": 6, "epochs": 2, "save-every": 2}
    flags |= {"device": "cpu", "lr": 1e-2, "init": "pissa", "eval": data}
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    assert status_of(train_nlg.main, *flags_of(model, data, out)) == 0
    return out


def test_the_plan_names_the_template_and_what_is_left_out(model, data, tmp_path, in_command):
    status, printed, _ = in_command(train_nlg.main, *flags_of(model, data, tmp_path / "o"), "--max-steps", 1)
    assert status == 0 and "1 conversations without a reply" in printed and "1 turns after the last reply" in printed
    assert "template chat, the model's own" in printed and f"a reply ends with {END}" in printed


def test_a_conversation_s_run_resumes_byte_for_byte_on_another_day(model, data, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    kill_before(5, ROOT / "train_nlg.py", *flags_of(model, data, out))

    class Tomorrow(chat_template.datetime):
        @classmethod
        def now(cls):
            return cls(2031, 5, 6)

    recorded = json.loads((out / "run.json").read_text())["settings"]
    assert recorded["template"] == "chat"
    monkeypatch.setattr(chat_template, "datetime", Tomorrow)
    assert status_of(train_nlg.main, *flags_of(model, data, out), "--resume") == 0
    for name in ("adapter_model.safetensors", "chat_template.jinja"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()


def test_an_adapter_is_asked_in_the_template_that_it_was_trained_with(model, trained, in_command, monkeypatch):
    asked = []
    monkeypatch.setattr(generate, "generate_each", lambda m, t, prompts, *_: asked.append(prompts) or [(0, "")])
    base = ["--model", model, "--device", "cpu", "--prompt", "Hi"]
    adapter = ["--adapter", trained]
    for flags, start in (
        ([*base, *adapter], START),
        (base, START),
        ([*base, *adapter, "--raw"], "Hi"),
        ([*base, "--template", "alpaca"], "Below"),
    ):
        status, _, printed = in_command(generate.main, *flags)
        assert status == 0 and asked[-1][0].lstrip("0123456789").startswith(start)
        assert ("template: chat" in printed) == (start == START)


def test_an_adapter_trained_with_alpacas_template_is_asked_in_it(model, tmp_path, in_command, monkeypatch):
    (tmp_path / "d.jsonl").write_text('{"query": "1+1?", "response": "2"}\n' * 4)
    out, merged, smaller = (tmp_path / name for name in ("out", "merged", "smaller"))
    status, printed, _ = in_command(train_nlg.main, *flags_of(model, tmp_path / "d.jsonl", out)[:-2], "--max-steps", 1)
    assert status == 0 and "template alpaca" in printed
    assert not (out / "minibalora.json").exists() and not (out / "chat_template.jinja").exists()
    asked = []
    monkeypatch.setattr(generate, "generate_each", lambda m, t, prompts, *_: asked.append(prompts) or [(0, "")])
    assert status_of(export.main, "--model", model, "--adapter", out, "--out", merged) == 0
    assert status_of(export.main, "--model", model, "--adapter", out, "--out", smaller, "--adapter-rank", 1) == 0
    for flags in (["--model", model, "--adapter", out], ["--model", merged], ["--model", model, "--adapter", smaller]):
        assert in_command(generate.main, *flags, "--device", "cpu", "--prompt", "Hi")[0] == 0
        assert asked[-1][0].startswith("Below is an instruction")


def test_a_benchmark_is_asked_in_the_chat_template(model, trained, tmp_path, in_command):
    (tmp_path / "g.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    flags = ["--model", model, "--adapter", trained, "--task", "gsm8k", "--data", tmp_path / "g.jsonl"]
    flags += ["--max-new-tokens", 2, "--device", "cpu"]
    assert in_command(evaluate.main, *flags, "--out", tmp_path / "o")[0] == 0
    (record,) = map(json.loads, (tmp_path / "o" / "records.jsonl").read_text().splitlines())
    assert record["prompt"].endswith(f"1 + 1? Let's think step by step.{END}\n{START}assistant\n")
    assert json.loads((tmp_path / "o" / "run.json").read_text())["settings"]["template"] == "chat"
    status, _, printed = in_command(evaluate.main, *flags, "--out", tmp_path / "o", "--raw")
    assert status == 2 and "--template is raw" in printed


def test_a_conversation_is_answered_where_its_last_turn_asks(model, tmp_path, in_command, monkeypatch):
    asked = []
    monkeypatch.setattr(generate, "generate_each", lambda m, t, prompts, *_: asked.append(prompts) or [(0, "Aye.")])
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"messages": [PIRATE, *turns("Hi", "Ahoy", "And?")]}))
    status, printed, _ = in_command(generate.main, "--model", model, "--device", "cpu", "--file", path)
    assert status == 0 and asked[0][0].endswith(f"assistant\nAhoy{END}\n{START}user\nAnd?{END}\n{START}assistant\n")
    assert json.loads(printed) == {"prompt": [PIRATE, *turns("Hi", "Ahoy", "And?")], "completion": "Aye."}
    path.write_text(json.dumps({"messages": turns("Hi", "Ahoy")}))
    status, _, printed = in_command(generate.main, "--model", model, "--device", "cpu", "--file", path)
    assert status == 2 and "does not end with a question" in printed


def test_generation_ends_at_the_end_of_a_turn(model):
    chat = chat_template.read_chat_template(model, model)
    tok, own = mb.load_tokenizer(model, chat), mb.load_model(model)
    end = tok.backend.token_to_id(END)
    assert end in tok.eos_ids and end not in mb.load_tokenizer(model).eos_ids
    prompt = tok.encode_prompts(["Hi"])[0]
    with torch.no_grad():
        first = int(own(torch.tensor([prompt]))[0, -1].argmax())
    with torch.no_grad():
        own.head_weight[[end, first]] = own.head_weight[[first, end]]
    assert dict(generate_each(own, tok, ["Hi"], Decoding(5), 1)) == {0: ""}


def test_a_t5_has_no_chat(model, tmp_path, refuses):
    folder = shutil.copytree(ROOT / "tests" / "golden" / "t5", tmp_path / "t5")
    shutil.copy(model / "tokenizer.json", folder)
    refuses(lambda: mb.load_tokenizer(folder, chat_template.read_chat_template(model, model)), "T5", "--template chat")


def test_a_model_without_an_end_of_text_is_reported(tiny, data, tmp_path, in_command):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (tmp_path / "d.jsonl").write_text('{"query": "1+1?", "response": "2"}\n' * 4)
    flags = flags_of(folder, tmp_path / "d.jsonl", tmp_path / "o")[:-2]
    status, printed, _ = in_command(train_nlg.main, *flags, "--max-steps", 1)
    assert status == 0 and "no EOS" in printed
    status, _, printed = in_command(generate.main, "--model", folder, "--prompt", "Hi", "--max-new-tokens", 2)
    assert status == 0 and "no EOS" in printed


def test_more_than_a_pair_needs_a_chat_template(tiny, data, tmp_path, in_command):
    status, _, printed = in_command(train_nlg.main, *flags_of(tiny, data, tmp_path / "o"))
    assert status == 2 and "line 1: a conversation of 5 turns" in printed and "--template chat" in printed
    assert not (tmp_path / "o").exists()
    status, _, printed = in_command(train_nlg.main, *flags_of(tiny, data, tmp_path / "o"), "--template", "chat")
    assert status == 2 and "no chat_template.jinja" in printed
    status, _, printed = in_command(
        train_nlg.main, *flags_of(tiny, data, tmp_path / "o"), "--template", "chat", "--raw"
    )
    assert status == 2 and "not allowed with" in printed
