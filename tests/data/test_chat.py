"""Conversations: the parts that are in the prompt, learned or left out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import minibalora as mb
from minibalora.checkpoints import BUILT_IN
from minibalora.checkpoints.chat_template import read_chat_template
from minibalora.checkpoints.template import (
    ALPACA,
    Template,
    choose_template,
    copy_template,
    save_template,
    trained_template,
)
from minibalora.data import chat as chat_module
from minibalora.data.batches import encode_examples, pack
from minibalora.data.prompts import (
    EMPTY,
    NO_REPLY,
    PROMPT,
    ask,
    example_from,
    examples_digest,
    prompt_from,
    read_examples,
)
from minibalora.run.teacher import row_digest

CHAT = Path(__file__).parents[1] / "golden" / "chat"
GOLDEN = json.loads((CHAT / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Make a model's folder: the built-in tokenizer with added tokens, and a chat template, golden or given as text."""
    folders = {}

    def folder_of(name: str, template: str | None = None) -> Path:
        if (name, template) in folders:
            return folders[name, template]
        golden, folder = GOLDEN[name], tmp_path_factory.mktemp(name)
        backend = json.loads((BUILT_IN / "llama" / "tokenizer.json").read_text())
        ids = {token["content"]: token["id"] for token in backend["added_tokens"]}
        size = len(backend["model"]["vocab"])
        settings = {key: golden[key] for key in ("bos_token", "eos_token") if golden[key]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        # transformers adds EOS first, then BOS, then the template's.
        for content in [golden["eos_token"], golden["bos_token"], *golden["tokens"]]:
            if content is not None and content not in ids:
                ids[content] = size + len(ids) - len([token for token in ids if ids[token] < size])
                backend["added_tokens"].append({"id": ids[content], "content": content} | flags)
        (folder / "tokenizer.json").write_text(json.dumps(backend))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        text = (CHAT / f"{name}.jinja").read_text(encoding="utf-8") if template is None else template
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        folders[name, template] = folder
        return folder

    return folder_of


@pytest.fixture(scope="module")
def chat_of(folder_of):
    def chat_of(name: str, template: str | None = None) -> tuple[Template, mb.checkpoints.tokenizer.Tokenizer]:
        folder = folder_of(name, template)
        parsed = Template("chat", read_chat_template(folder, folder))
        return parsed, mb.load_tokenizer(folder, parsed.chat)

    return chat_of


CASES = [(name, index) for name, golden in GOLDEN.items() for index in range(len(golden["rows"]))]


@pytest.mark.parametrize("name, index", CASES)
def test_ids_and_learned_tokens_equal_those_of_transformers(chat_of, name, index):
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
    prompt = ask(template, chat("Hi"), "here")
    assert tok.encode_prompts([prompt]) == [GOLDEN[name]["prompt"]]
    end = GOLDEN[name]["end"]
    assert template.chat.end_of_turn == end or end is None
    assert {tok.backend.token_to_id(template.chat.end_of_turn), tok.eos_id} <= tok.eos_ids


# Turns.


def chat(*contents, system=None):
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(contents)
    return start + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def learned_texts(example):
    return [example.rendered[start:end] for start, end in example.learned]


@pytest.fixture
def read(chat_of):
    def read(row: dict | list, name: str = "smollm2", template: str | None = None, **more):
        row = {"messages": row} | more if isinstance(row, list) else row
        return example_from(row, 3, "file, line 3", template=chat_of(name, template)[0])

    return read


END = "<|im_end|>"


def test_all_replies_are_learned_once_and_nothing_else(read):
    example = read(chat("q1", "a1", "q2", "a2", "q3", "a3", system="s"))
    assert learned_texts(example) == [f"a{number}{END}" for number in (1, 2, 3)]
    assert example.response == "a3" and example.prompt.endswith(f"q3{END}\n<|im_start|>assistant\n")
    assert example.rendered.startswith(example.prompt) and example.notes == ()


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "human", "value": "q"},
        {"from": "Human ", "value": "q"},
        {"role": "USER", "content": "q"},
        {"role": None, "content": None, "from": "prompter", "value": "q"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "user", "content": ["q"]},
        {"role": "user", "content": "q", "tool_calls": None, "name": None},
    ],
)
@pytest.mark.parametrize("role", ["assistant", "Assistant", "gpt", "model", "bot", "chatgpt", "AI"])
def test_roles_and_contents_have_many_spellings(read, turn, role):
    assert read([turn, {"from": role, "value": "a"}]) == read(chat("q", "a"))


def test_the_parts_of_a_content_are_joined(read):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?", "cache_control": None}]
    assert read([{"role": "user", "content": parts}, *chat("q", 4)[1:]]) == read(chat("What is 2 + 2?", "4"))


@pytest.mark.parametrize(
    "turn, parts",
    [
        ({"role": "wizard", "content": "x"}, ["'wizard'", "assistant"]),
        ({"content": "x"}, ["None"]),
        ({"role": 5, "content": "x"}, ["5"]),
        ({"role": "user", "content": {"a": 1}}, ["the content of a turn is dict"]),
        ({"role": "user", "content": "<image>", "images": ["a.png"]}, ["has 'images'", "only texts"]),
        ({"role": "user", "content": True}, ["bool"]),
        ({"role": "tool", "content": [None]}, ["NoneType"]),
        ({"role": "user", "content": None}, ["NoneType"]),
        ({"role": "user", "content": [{"type": "image", "url": "u"}]}, ["'image'"]),
        ({"role": "user", "content": "\ud800"}, ["\\ud800", "half of a character"]),
    ],
)
def test_an_invalid_turn_is_refused_with_its_line(read, refuses, turn, parts):
    refuses(lambda: read([*chat("q", "a"), turn]), "file, line 3: messages", *parts)


def test_user_turns_in_a_row_are_all_in_the_prompt(read):
    turns = [*chat("q1"), *chat("q2", "a")]
    assert "q1" in read(turns).prompt and "q2" in read(turns).prompt and read(turns).notes == ()
    joined = read(turns, "gemma")  # whose turns must alternate
    assert "<start_of_turn>user\nq1\n\nq2<end_of_turn>" in joined.prompt and joined.notes == (chat_module.JOINED,)


def test_a_system_turn_that_the_template_does_not_take_goes_into_the_question(read):
    for name, end in (("gemma", "<end_of_turn>"), ("mistral", "</s>"), ("mistral_v3", "</s>")):
        example = read(chat("q1", "a1", "q2", "a2", system="Be brief."), name)
        assert "Be brief.\n\nq1" in example.rendered and example.notes == (chat_module.JOINED,)
        assert [text.strip() for text in learned_texts(example)] == [f"a1{end}", f"a2{end}"]


def test_replies_in_a_row_are_all_learned(read):
    turns = [*chat("q", "a1"), {"role": "assistant", "content": "a2"}]
    assert learned_texts(read(turns)) == [f"a1{END}", f"a2{END}"]
    assert learned_texts(read(turns, "gemma")) == ["a1\n\na2<end_of_turn>"]


def test_a_blank_reply_next_to_another_is_left_out_where_turns_alternate(read):
    turns = [*chat("q1", ""), {"role": "assistant", "content": "a1"}, *chat("q2", "a2")]
    for name in ("gemma", "qwen3"):
        assert [text.partition("<")[0] for text in learned_texts(read(turns, name))][:1] == ["a1"]
        assert chat_module.BLANK in read(turns, name).notes


def test_parts_that_are_not_learned_are_named(read):
    hello, late = {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "bye"}
    example = read([hello, *chat("q", "a"), late, late])
    assert "Hello!" not in example.rendered and "bye" not in example.rendered
    assert example.notes == (chat_module.EARLY, chat_module.LATE, chat_module.LATE)
    blank = read([*chat("q1", " "), *chat("q2", "a")])
    assert learned_texts(blank) == [f"a{END}"] and blank.notes == (chat_module.BLANK,)
    weightless = chat("q1", "a1", "q2", "a2")
    weightless[1]["weight"], weightless[3]["weight"] = 0, 1
    assert learned_texts(read(weightless)) == [f"a2{END}"] and read(weightless).notes == (chat_module.WEIGHTLESS,)
    assert "a1" in read(weightless).prompt
    assert read(chat("q", "")) is None and read([hello]) is None and read([]) is None


def test_a_row_s_own_system_and_tools_count(read):
    assert "Be brief." in read({"messages": chat("q", "a"), "system": "Be brief."}).prompt
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for offered in (tools, json.dumps(tools)):
        assert '"name": "add"' in read({"messages": chat("q", "a"), "tools": offered}, "qwen2_5").prompt
    assert read({"messages": chat("q", "a"), "tools": tools}).notes == (chat_module.TOOLS,)
    assert read({"messages": chat("q", "a"), "tools": []}) == read(chat("q", "a"))


def test_a_broken_list_of_tools_is_refused(read, refuses):
    for tools in ("[", {"a": 1}, 5):
        refuses(lambda tools=tools: read({"messages": chat("q", "a"), "tools": tools}), "line 3", "tools is not a list")


def test_calls_of_tools_are_learned_and_results_are_not(read):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        *chat("1 + 1?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2.", "tool_calls": None},
    ]
    called, reply = learned_texts(read(turns, "qwen2_5"))
    assert '{"name": "add", "arguments": {"a": 1}}' in called and called.endswith(END) and reply == f"It is 2.{END}"
    assert "<tool_response>\n2\n</tool_response>" in read(turns, "qwen2_5").prompt


def test_a_turn_or_a_thought_that_the_template_leaves_out_is_named(read):
    turns = [*chat("q", "a"), {"role": "tool", "content": "secret"}, {"role": "assistant", "content": "b"}]
    assert chat_module.UNSEEN in read(turns, "zephyr").notes
    thought = "<think>\nhm\n</think>\n\n"
    assert read(chat("q", f"{thought}a"), "qwen3").notes == ()
    assert learned_texts(read(chat("q", f"{thought}a"), "qwen3")) == [f"{thought}a{END}"]
    assert read(chat("q", f"{thought}a"), "deepseek_r1").notes == (chat_module.CURTAILED, chat_module.PROMPTED)
    earlier = read(chat("q1", f"{thought}a1", "q2", f"{thought}a2"), "qwen3")
    assert earlier.notes == (chat_module.CURTAILED,)
    assert learned_texts(earlier) == [f"a1{END}", f"{thought}a2{END}"]
    aside = [*chat("q"), {"role": "assistant", "content": "a", "thinking": "hm"}]
    assert read(aside, "qwen3").rendered == read(chat("q", f"{thought}a"), "qwen3").rendered
    assert read(aside).notes == (chat_module.CURTAILED,)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    assert read([*chat("q"), call]) is None and read([*chat("q"), call], "qwen2_5").notes == ()
    for content in ("", None):  # with null, this template fails until the content is a text
        turns = [*chat("q"), call | {"content": content}, {"role": "tool", "content": "3"}, *chat("?", "b")[1:]]
        both = read(turns)
        assert learned_texts(both) == [f"b{END}"] and both.notes == (chat_module.LOST,)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_arguments_of_a_call_are_written_as_the_template_wants_them_an_object_or_json_text(read, content, arguments):
    call = {"role": "assistant", **content, "tool_calls": [{"type": "function", "function": {"name": "w"}}]}
    call["tool_calls"][0]["function"]["arguments"] = arguments
    own = '<tool_call>\n{"name": "w", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert learned_texts(read([*chat("q"), call], "qwen2_5")) == [own + END]
    assert '"parameters": {"city": "Paris"}' in learned_texts(read([*chat("q"), call], "llama3_1"))[0]
    if content != {"content": ""}:
        assert '{"city": "Paris"}\n```' in learned_texts(read([*chat("q"), call], "deepseek_v3"))[0]


def test_the_older_names_of_a_call_and_of_tools_are_known(read):
    call, tool = {"name": "w", "arguments": '{"city": "Paris"}'}, {"name": "w", "description": "weather"}
    old = read([*chat("q"), {"role": "assistant", "content": None, "function_call": call}], "qwen2_5", functions=[tool])
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    new = read([*chat("q"), called], "qwen2_5", tools=[{"type": "function", "function": tool}])
    assert old == new and '"weather"' in old.prompt


def test_a_pair_with_tools_has_them_in_the_prompt_or_they_are_counted(chat_of):
    row = {"query": "q", "answer": "a", "tools": '[{"name": "w", "description": "weather"}]'}  # xLAM's
    assert '"weather"' in example_from(row, 1, template=chat_of("qwen2_5")[0]).prompt
    assert example_from(row, 1, template=chat_of("gemma")[0]).notes == (chat_module.TOOLS,)
    assert example_from(row, 1).notes == (chat_module.TOOLS,)


@pytest.mark.parametrize("mark", [{"loss": False}, {"train": False}, {"weight": 0}, {"weight": "0"}])
def test_replies_that_are_marked_as_not_learned_are_not(read, mark):
    turns = chat("q", "bad", "r", "good")
    example = read([turns[0], turns[1] | mark, turns[2], turns[3] | dict.fromkeys(mark, True)])
    assert learned_texts(example) == [f"good{END}"] and example.notes == (chat_module.WEIGHTLESS,)


def test_a_system_text_beside_the_conversation_is_in_the_prompt_whatever_its_form(read):
    assert "be brief<" in read(chat("q", "a"), system=[{"type": "text", "text": "be brief"}]).prompt
    turns = [{"role": "system", "content": "in French"}, *chat("q", "a")]
    assert "be brief\n\nin French<" in read(turns, system="be brief").prompt
    assert read(turns, system="in French") == read(turns)


def test_turns_are_joined_whatever_else_their_rows_say_of_them(read):
    turns = [{"role": "system", "content": "s"}, *chat("q", "a")]
    more = [turn | {"toxic": False, "turn_identifier": 1} for turn in turns]  # WildChat's
    assert read(more, "gemma").rendered == read(turns, "gemma").rendered


def test_rows_with_an_image_or_with_answers_to_choose_from_are_refused(read):
    with pytest.raises(mb.InputError, match="has 'image': only texts"):  # LLaVA's
        read(chat("q", "a"), image="cat.jpg")
    with pytest.raises(mb.InputError, match="has 'images': only texts"):
        example_from({"question": "q", "images": ["cat.jpg"], "answer": "a"}, 1)
    with pytest.raises(mb.InputError, match="choose from in 'choices'"):  # MMLU's
        example_from({"question": "q", "choices": ["b", "c"], "answer": 1}, 1)
    with pytest.raises(mb.InputError, match="choose from in 'options'"):
        example_from({"question": "q", "options": {"A": "b", "B": 5}, "answer": "A"}, 1)
    assert example_from({"question": "q: b or 5?", "options": {"A": "b", "B": 5}, "answer": "A"}, 1).response == "A"


def test_an_adapter_keeps_the_template_for_tools_too(tmp_path, folder_of):
    model, out, merged = folder_of("smollm2"), tmp_path / "out", tmp_path / "merged"
    stored = [
        {"name": "default", "template": "d {{ strftime_now('%Y') }}"},
        {"name": "tool_use", "template": "with tools"},
    ]
    for folder in (tmp_path / "model", out, merged):
        folder.mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    chat = read_chat_template(tmp_path / "model", model)
    save_template(Template("chat", chat), out)
    copy_template(out, merged)
    assert read_chat_template(out, model).texts == read_chat_template(merged, model).texts == chat.texts
    assert len(chat.texts) == 2 and chat.has_date


# Templates.

HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
TAGGED = (
    "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}<|im_end|>\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


def test_an_end_of_turn_behind_a_tag_is_learned_too(read):
    assert learned_texts(read(chat("q", "a", "r", "b"), template=TAGGED)) == [f"a{END}", f"b{END}"]


@pytest.mark.parametrize(
    "template, parts",
    [
        ("{{ raise_exception('no,\n thanks') }}", ["no, thanks"]),
        ("{{ messages[9].content.x }}", ["fails"]),
        ("{% for i in range(10000000) %}{% endfor %}", ["Range"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["recursion"]),
        ("{{ messages.append(1) }}", ["fails"]),
        ("{{ ''.__class__.__mro__ }}", ["fails"]),
        ("{% for %}", ["not a Jinja template"]),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ["ends a reply with no token"]),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            ["turn 2", "generation"],
        ),
    ],
)
def test_a_template_that_fails_is_one_error_that_names_the_row(read, refuses, template, parts):
    refuses(lambda: read(chat("q", "a", "r", "b"), template=template), parts[0], *parts[1:], "chat_template.jinja")


def test_a_template_that_does_not_end_is_refused(read, refuses, monkeypatch):
    monkeypatch.setattr("minibalora.checkpoints.chat_template.SECONDS", 0.5)
    template = "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
    refuses(lambda: read(chat("q", "a"), template=template), "file, line 3", "did not finish")


def test_a_template_writes_the_date_of_the_runs_start(chat_of, folder_of):
    template = "{{ strftime_now('%d %b %Y') }}" + TAGGED
    before = chat_of("smollm2", template)[0]
    folder = folder_of("smollm2", template)
    resumed = Template("chat", read_chat_template(folder, folder))
    resumed.resume({"date": "2024-07-26T10:00:00"})
    assert ask(resumed, chat("q"), "here").startswith("26 Jul 2024<|im_start|>")
    assert before.settings == {"template": "chat", "date": before.chat.now.isoformat()}
    assert chat_of("smollm2")[0].settings == {"template": "chat"}


def test_named_templates_and_those_in_tokenizer_config_are_read(folder_of, tmp_path, refuses):
    folder = shutil.copytree(folder_of("qwen2_5"), tmp_path / "m")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert read_chat_template(folder, folder) is None and choose_template(None, folder) == ALPACA
    refuses(lambda: choose_template("chat", folder), folder, "no chat_template.jinja", "--template alpaca")
    settings = json.loads((folder / "tokenizer_config.json").read_text())

    def write(stored):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": stored}))
        return read_chat_template(folder, folder)

    assert write(text).text == text
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": "with tools"}]
    assert write(named).text == text
    assert write(named).render([], "here", tools=[{}])[0] == "with tools"
    for stored, part in (
        (named[1:], "default"),
        (5, "neither a text"),
        ([5], "neither a text"),
        ([{"name": "default"}], "neither a text"),
    ):
        refuses(lambda stored=stored: write(stored), "tokenizer_config.json", part)


def test_one_pair_takes_alpaca_s_template_and_more_is_refused(refuses):
    example = example_from({"messages": chat("q", "a", system="s")}, 1)
    assert (example.prompt, example.response) == (PROMPT.format(instruction="s\n\nq"), "a")
    both = example_from({"messages": [*chat("q1"), *chat("q2", "a")]}, 1)
    assert both.prompt == PROMPT.format(instruction="q1\n\nq2")
    refuses(lambda: example_from({"messages": chat("q", "a", "r", "b")}, 1, "here"), "here", "4 turns", "chat template")
    tool = [*chat("q"), {"role": "tool", "content": "t"}, *chat("q", "a")[1:]]
    refuses(lambda: example_from({"messages": tool}, 1, "here"), "here", "3 turns")
    called = [*chat("q"), {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]
    refuses(lambda: example_from({"messages": called}, 1, "here"), "here", "2 turns")


def test_other_rows_take_the_chat_template_as_one_question(chat_of):
    template, _ = chat_of("zephyr")
    example = example_from({"instruction": "q", "input": "i", "output": "a"}, 1, template=template)
    assert example.rendered == "<|user|>\nq\ni</s>\n<|assistant|>\na</s>\n" and learned_texts(example) == ["a</s>"]


def test_the_digest_covers_everything_learned(read):
    turns = chat("q1", "a1", "q2", "a2")
    weightless = [dict(turn) for turn in turns]
    weightless[1]["weight"] = 0
    one, other = read(turns), read(weightless)
    assert one.rendered == other.rendered and examples_digest([one]) != examples_digest([other])


# Rows.


def test_rows_with_a_mask_are_packed_with_the_learned_tokens_as_targets(chat_of):
    template, tok = chat_of("smollm2")
    rows = [chat("q1", "a1", "q2", "a2 a2"), chat("q", "a")]
    examples = [example_from({"messages": row}, line, template=template) for line, row in enumerate(rows)]
    encoded, _, _ = encode_examples(examples, tok, 500)
    packed, model = pack(encoded, "cpu"), mb.load_model(BUILT_IN / "llama")
    model.embedding.weight.data = torch.randn(len(tok.backend.get_vocab()), 128)
    states, targets = packed.states(model).split([row.predicted for row in encoded]), packed.targets.tolist()
    expected = []
    for row, state in zip(encoded, states, strict=True):
        learned = np.ones(row.after_prompt, bool) if row.learned is None else row.learned
        places = row.prompt_length + np.flatnonzero(learned)
        expected += row.ids[places].tolist()
        hidden = model.hidden(torch.tensor(row.ids[None].astype(np.int64)), torch.ones(1, len(row.ids)).long())[0]
        assert torch.allclose(state, hidden[places - 1], atol=1e-4)
    assert targets == expected and encoded[0].learned is not None and encoded[1].learned is None
    assert row_digest(encoded[0]) != row_digest(replace(encoded[0], learned=None))


def test_a_conversation_is_cut_like_any_row(chat_of):
    template, tok = chat_of("smollm2")
    example = example_from({"messages": chat("q1", "a1", "q2", "a2")}, 1, template=template)
    (whole,), _, _ = encode_examples([example], tok, 500)
    for length in range(1, len(whole.ids)):
        rows, cut, dropped = encode_examples([example], tok, length)
        assert (len(rows), cut, dropped) == ((1, 1, 0) if length > whole.prompt_length else (0, 0, 1))
        for row in rows:
            mask = whole.learned[: length - whole.prompt_length]
            assert row.predicted == mask.sum() and len(row.ids) <= length
            assert row.ids.tolist() == whole.ids[: len(row.ids)].tolist()


def test_rows_left_out_of_a_file_are_counted(chat_of, tmp_path):
    rows = [{"messages": chat("q", "a")}, {"messages": chat("q")}, {"messages": [*chat("q", "a"), *chat("bye")]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, left_out = read_examples(tmp_path / "d.jsonl", template=chat_of("smollm2")[0])
    assert len(examples) == 2 and left_out == {NO_REPLY: 1, EMPTY: 0, chat_module.LATE: 1}


# A trained model records its template.


def test_the_template_is_saved_beside_the_adapter(chat_of, tmp_path, refuses):
    template, _ = chat_of("smollm2")
    save_template(template, tmp_path)
    assert trained_template(tmp_path, None) == "chat" == trained_template(tmp_path / "none", tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template.chat.text
    for settings, name in (({"template": "raw"}, "raw"), ({"raw": False}, "alpaca"), ({}, None)):
        folder = tmp_path / str(name)
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"settings": settings}))
        assert trained_template(tmp_path / "none", folder) == name
        save_template(ALPACA, folder)
        assert not (folder / "minibalora.json").exists()
    copy_template(tmp_path / "raw", tmp_path / "alpaca")
    assert trained_template(tmp_path / "alpaca", None) == "raw"
    (tmp_path / "minibalora.json").write_text('{"template": "x"}')
    refuses(lambda: trained_template(tmp_path, None), tmp_path, "'x'", "--template")


@pytest.mark.parametrize(
    "mark", [{"train": "False"}, {"train": "no"}, {"weight": "0.0"}, {"loss_mask": 0}, {"loss": 0.0}]
)
def test_weights_may_be_texts(read, mark):
    turns = chat("q", "bad", "r", "good")
    turns[1] |= mark
    assert learned_texts(read(turns)) == [f"good{END}"] and read(turns).notes == (chat_module.WEIGHTLESS,)


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"train": "maybe"}, {"loss": [0]}])
def test_a_weight_that_is_neither_0_nor_1_is_refused(read, refuses, mark):
    refuses(lambda: read([*chat("q"), chat("q", "a")[1] | mark]), "file, line 3", "weight", str(*mark.values()))


def test_the_first_name_with_a_text_counts_in_concatenated_chats(read):
    turns = [{"role": "user", "from": "", "content": "", "value": "q"}, {"role": "", "from": "gpt", "value": "a"}]
    assert read(turns) == read(chat("q", "a"))


@pytest.mark.parametrize("form", ["functions", "texts", "a system turn"])
def test_tools_are_read_whatever_their_form(read, form):
    tool = {"name": "w", "description": "weather"}
    whole = {"type": "function", "function": tool}
    turns = chat("q", "a", system="s")
    expected = read(turns, "qwen2_5", tools=[whole])
    if form == "functions":
        assert read(turns, "qwen2_5", functions=json.dumps([tool])) == expected
    elif form == "texts":
        assert read(turns, "qwen2_5", tools=[json.dumps(whole)]) == expected
    else:
        assert read([turns[0] | {"tools": [whole]}, *turns[1:]], "qwen2_5", tools=[whole]) == expected
        assert read([turns[0] | {"tools": [whole]}, *turns[1:]], "qwen2_5") == expected
        assert read([turns[0] | {"tools": json.dumps([whole])}, *turns[1:]]).notes == (chat_module.TOOLS,)


def test_tools_that_are_names_are_refused(read, refuses):
    refuses(lambda: read(chat("q", "a"), tools=["search"]), "file, line 3: tools is not a list of objects")


@pytest.mark.parametrize("beside", [{"context": "DOC"}, {"documents": [{"text": "DOC"}]}, {"chat_history": ["DOC"]}])
def test_a_text_beside_a_conversation_or_a_turn_is_counted(read, refuses, beside):
    assert read(chat("q", "a"), **beside).notes == (chat_module.UNUSED,)
    assert read(chat("DOC q", "a"), **beside).notes == ()
    turns = chat("q", "a")
    for name in ("attachments", "text"):
        assert read([turns[0] | {name: "DOC"}, turns[1]]).notes == (chat_module.UNUSED,)
    row = {"messages": chat("q")} | beside
    refuses(lambda: prompt_from(row, "here", "messages", ALPACA), "here: no turn has the text", next(iter(beside)))


def test_a_conversation_in_a_template_beside_its_turns_is_not_another_text(read):
    assert read(chat("q", "a"), text="<user>q<bot>a", prompt="q").notes == ()


def test_a_reply_beside_its_conversation_is_refused(read, refuses):
    refuses(lambda: read(chat("q"), response="a"), "file, line 3: messages ends with a question", "'response'")
    assert read(chat("q", "a", "r"), response="").notes == (chat_module.LATE,)


def test_a_reply_that_ends_with_its_end_of_turn_learns_it_once(read):
    turns = chat("q1", f"a1{END}", "q2", f"a2{END}\n")
    assert read(turns).rendered == read(chat("q1", "a1", "q2", "a2")).rendered
    assert learned_texts(read(turns)) == [f"a1{END}", f"a2{END}"]


def test_settings_for_the_template_are_counted_as_not_used(read):
    row = {"messages": chat("q", "a"), "chat_template_kwargs": {"enable_thinking": True}}
    assert read(row).notes == (chat_module.SETTINGS,)
