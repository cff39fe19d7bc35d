"""Published collections in their original form, as small files: the text that is asked, learned or left out."""

import json
import sys
from pathlib import Path

import pytest

import minibalora as mb
from minibalora.checkpoints.template import ALPACA
from minibalora.data.prompts import PROMPT, PROMPT_WITH_INPUT, example_from, prompt_from, read_examples

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_nlg  # noqa: E402

# name -> a row of the collection, and the instruction, the input and the response that are read from it
COLLECTIONS = {
    "Alpaca": (
        {"instruction": "Sort.", "input": "b, a", "output": "a, b", "text": "... Instruction:\nSort."},
        ("Sort.", "b, a", "a, b"),
    ),
    "Aya": ({"inputs": "Habari?", "targets": "Nzuri.", "language": "Swahili"}, ("Habari?", "", "Nzuri.")),
    "CodeAlpaca": ({"instruction": "Add.", "input": "", "output": "a + b"}, ("Add.", "", "a + b")),
    "CodeFeedback": ({"query": "Add.", "answer": "a + b", "resource": "evol", "lang": "py"}, ("Add.", "", "a + b")),
    "DROP": (
        {"passage": "It opened in 1990.", "question": "When?", "answer": "1990"},
        ("When?", "It opened in 1990.", "1990"),
    ),
    "an instruction and a question": (
        {"instruction": "Be brief.", "question": "When?", "context": "It opened in 1990.", "response": "1990"},
        ("Be brief.", "It opened in 1990.\nWhen?", "1990"),
    ),
    "an instruction, a question and an answer": (
        {"instruction": "In French.", "question": "Peru's capital?", "answer": "Lima"},
        ("In French.", "Peru's capital?", "Lima"),
    ),
    "an instruction, a query and a response": (
        {"instruction": "In French.", "query": "Peru's capital?", "response": "Lima"},
        ("In French.", "Peru's capital?", "Lima"),
    ),
    "an instruction, a problem and an output": (
        {"instruction": "In French.", "problem": "1 + 1?", "output": "deux"},
        ("In French.", "1 + 1?", "deux"),
    ),
    "an instruction inside the prompt": (
        {"instruction": "Sort.", "prompt": "### Sort. b, a", "completion": "a, b"},
        ("### Sort. b, a", "", "a, b"),
    ),
    "Mix-Instruct": (
        {"instruction": "Say.", "input": "hi", "output": "hi", "candidates": [{"text": "ho", "model": "m"}]},
        ("Say.", "hi", "hi"),
    ),
    "a question twice": ({"instruction": "When?", "question": "When?", "response": "1990"}, ("When?", "", "1990")),
    "Dolly": (
        {"instruction": "When?", "context": "It opened in 1990.", "response": "In 1990.", "category": "closed_qa"},
        ("When?", "It opened in 1990.", "In 1990."),
    ),
    "Evol-Instruct": ({"instruction": "Explain.", "output": "So."}, ("Explain.", "", "So.")),
    "FLAN": (
        {"inputs": "Translate: a", "targets": "b", "task": "wmt", "_template_idx": 3},
        ("Translate: a", "", "b"),
    ),
    "GPTeacher": ({"instruction": "Say.", "input": "hi", "response": "hi"}, ("Say.", "hi", "hi")),
    "GSM8K": ({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}, ("2 + 3?", "", "2 + 3 = 5\n#### 5")),
    "LaMini": (
        {"instruction": "Say.", "response": "hi", "instruction_source": "alpaca"},
        ("Say.", "", "hi"),
    ),
    "Magicoder": ({"lang": "py", "problem": "Add.", "solution": "a + b", "seed": "x"}, ("Add.", "", "a + b")),
    "LIMA": ({"conversations": ["q", "a"], "source": "stackexchange"}, ("q", "", "a")),
    "LMSYS": (
        {"model": "m", "conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ("q", "", "a"),
    ),
    "MATH": (
        {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{2}"},
        ("1 + 1?", "", "\\boxed{2}"),
    ),
    "MetaMathQA": (
        {"type": "GSM_Rephrased", "query": "q", "original_question": "o", "response": "r"},
        ("q", "", "r"),
    ),
    "No Robots": (
        {
            "prompt": "q",
            "prompt_id": "1",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "category": "Chat",
        },
        ("q", "", "a"),
    ),
    "NuminaMath": (
        {"source": "olympiads", "problem": "p", "solution": "s", "messages": None},
        ("p", "", "s"),
    ),
    "OpenMathInstruct": (
        {"problem": "p", "generated_solution": "g", "expected_answer": "5", "problem_source": "math"},
        ("p", "", "g"),
    ),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "You are an assistant.", "question": "q", "response": "r"},
        ("You are an assistant.\n\nq", "", "r"),
    ),
    "OpenOrca without a system prompt": (
        {"id": "niv.1", "system_prompt": "", "question": "q", "response": "r"},
        ("q", "", "r"),
    ),
    "sql-create-context": (
        {"question": "How many?", "context": "CREATE TABLE t (n INT)", "answer": "SELECT COUNT(*) FROM t"},
        ("How many?", "CREATE TABLE t (n INT)", "SELECT COUNT(*) FROM t"),
    ),
    "Orca-Math": ({"question": "2 + 3?", "answer": "5"}, ("2 + 3?", "", "5")),
    "numbers": ({"question": "2 + 3?", "answer": 5}, ("2 + 3?", "", "5")),
    "zero": ({"question": 3, "answer": 0, "input": 0}, ("3", "0", "0")),
    "fractions": ({"question": "1 / 2?", "answer": 0.5}, ("1 / 2?", "", "0.5")),
}


def prompt_of(instruction, context):
    template = PROMPT_WITH_INPUT if context else PROMPT
    return template.format(instruction=instruction, input=context)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_collection_is_read_in_its_own_form(name):
    row, (instruction, context, response) = COLLECTIONS[name]
    example = example_from(row, 1)
    assert (example.prompt, example.response) == (prompt_of(instruction, context), response)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_null_columns_of_a_concatenated_set_are_absent(name):
    columns = {column for row, _ in COLLECTIONS.values() for column in row}
    row = COLLECTIONS[name][0]
    assert example_from(dict.fromkeys(columns | {"conversations"}) | row, 1) == example_from(row, 1)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "### Human: a ### Assistant: b"}, ["text"]),  # Guanaco
        (
            {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
            ["parent_id (null)", "text"],
        ),  # OASST
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["chosen, rejected"]),  # preferences
        (
            {"question": "q", "context": {"contexts": ["c"]}, "long_answer": "l", "final_decision": "yes"},
            ["long_answer"],
        ),
        ({"question": "q", "context": {"title": ["t"]}, "answer": "a"}, ["'context' is dict"]),  # HotpotQA
        ({"question": "q", "answers": {"text": ["a"]}}, ["answers"]),  # SQuAD
        ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, ["'history'", "'messages'"]),  # LLaMA-Factory
        ({"instruction": None, "output": None}, ["instruction (null), output (null)"]),
        ({"instruction": "q", "output": True}, ["'output' is bool"]),
        ({"instruction": "q", "output": ["a"]}, ["'output' is list"]),
    ],
)
def test_a_collection_of_another_kind_is_refused(row, parts, refuses):
    refuses(lambda: example_from(row, 1, "file, line 1"), "file, line 1", *parts)


def test_fields_named_by_hand_keep_the_context():
    """PubMedQA's context is not a text: the user names another field, or leaves it out explicitly."""
    dolly = COLLECTIONS["Dolly"][0]
    assert example_from(dolly, 1, "", "instruction", "response") == example_from(dolly, 1)
    assert example_from(dolly, 1, "", "instruction", "response", "category").prompt == prompt_of("When?", "closed_qa")
    assert example_from(dolly, 1, "", "instruction", "response", "").prompt == prompt_of("When?", "")
    assert example_from(dolly, 1, "", "context", "response").prompt == prompt_of("It opened in 1990.", "")
    pubmed = {"question": "q", "context": {"contexts": ["c"]}, "final_decision": "yes"}
    assert example_from(pubmed, 1, "", "question", "final_decision", "").response == "yes"


def test_a_named_input_may_be_null_but_not_missing(refuses):
    row = {"query": "q", "response": "r", "about": None}
    assert example_from(row, 1, "", input_field="about").prompt == prompt_of("q", "")
    refuses(lambda: example_from({"query": "q", "response": "r"}, 1, "here", input_field="about"), "here", "'about'")


def test_empty_responses_are_left_out_and_counted(tmp_path):
    responses = ["", "  \n", None, "he", 0]
    rows = [{"instruction": "Say", "input": "", "output": response} for response in responses]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, left_out = read_examples(tmp_path / "data.jsonl")
    assert [(example.line, example.response) for example in examples] == [(4, "he"), (5, "0")]
    assert left_out["empty responses"] == 3


def test_the_plan_names_the_files_and_counts_what_is_left_out(tmp_path, tiny, in_command):
    for index, response in enumerate(["he", "", "hu"]):
        row = {"instruction": "Say", "input": None, "output": response}
        (tmp_path / f"train-{index}.jsonl").write_text(json.dumps(row) + "\n")
    source = ("--model", tiny, "--data", tmp_path / "train-*.jsonl", "--eval", tmp_path / "train-?.jsonl")
    flags = "--method lora --rank 2 --max-steps 1 --device cpu --out".split()
    status, out, error = in_command(train_nlg.main, *source, *flags, tmp_path / "run")
    assert status == 0, error
    assert f"{tmp_path}/train-*.jsonl (train-0.jsonl to train-2.jsonl, 3 files), 2 rows" in out
    assert "0 conversations without a reply, 1 empty responses" in out
    assert f"of {tmp_path}/train-?.jsonl 0 conversations without a reply, 1 empty responses" in out


def test_a_file_of_empty_responses_only_is_refused(tmp_path, refuses):
    (tmp_path / "data.jsonl").write_text('{"query": "q", "response": ""}\n')
    refuses(lambda: read_examples(tmp_path / "data.jsonl"), "data.jsonl", "no rows with a response")


@pytest.mark.parametrize("filler", ["", " "])
def test_blank_columns_of_a_concatenated_set_are_absent(filler):
    names = ("query", "response", "instruction", "input", "output", "question", "answer")
    for own in ({"question": "q?", "answer": "a"}, {"instruction": "q?", "output": "a"}):
        row = dict.fromkeys(names, filler) | own
        example = example_from(row, 1, "row")
        assert "q?" in example.prompt and example.response == "a"


def test_a_prompt_without_the_answers_to_choose_from_is_refused(refuses):
    row = {"question": "Which?", "choices": ["x1", "y1"]}
    refuses(lambda: prompt_from(row, "row", "question", ALPACA), "row: the prompt lacks the answers to choose from")
    assert "x1" in prompt_from(row | {"question": "Which, x1 or y1?"}, "row", "question", ALPACA)


@pytest.mark.parametrize(
    "columns",
    [
        {"A": "x1", "B": "y1"},
        {"opa": "x1", "opb": "y1"},
        {"option_a": "x1", "option_b": "y1"},
        {"option1": "x1", "option2": "y1"},
        {"distractor1": "x1", "distractor2": "y1"},
        {"endings": ["x1", "y1"]},
        {"candidates": ["x1", "y1"]},
    ],
)
def test_answers_to_choose_from_may_stand_in_columns_of_their_own(refuses, columns):
    row = {"question": "Which?", "answer": "B"} | columns
    refuses(
        lambda: example_from(row, 1, "row"), "row: the prompt lacks the answers to choose from", next(iter(columns))
    )
    assert example_from(row | {"question": "x1 or y1?"}, 1).response == "B"
    assert example_from(dict.fromkeys(columns) | {"question": "Which?", "answer": "B"}, 1).response == "B"


@pytest.mark.parametrize("value", ["Open since 1990.", ["Open since 1990."], [{"title": "t", "text": "Open"}]])
@pytest.mark.parametrize("name", ["text", "table", "paragraph", "passages", "documents", "contexts", "schema"])
def test_a_text_of_many_meanings_that_the_prompt_lacks_is_refused(refuses, name, value):
    row = {"question": "When?", "answer": "1990", name: value}
    refuses(lambda: example_from(row, 1, "row"), f"row: the prompt lacks the text in {name!r}", "--input-field ''")
    assert example_from(row, 1, input_field="").prompt == prompt_of("When?", "")
    assert example_from(row, 1, "", "question", "answer").prompt == prompt_of("When?", "")
    assert example_from(row | {"context": f"{value} t Open since 1990."}, 1).response == "1990"
    if isinstance(value, str):
        assert example_from(row, 1, input_field=name).prompt == prompt_of("When?", value)


def test_earlier_turns_beside_a_pair_are_refused(refuses):
    row = {"question": "q", "answer": "a", "chat_history": ["q0", "a0"]}
    refuses(lambda: example_from(row, 1, "row"), "'chat_history'", "'messages'")


@pytest.mark.parametrize("fields", [("query", "query"), (None, "query"), ("response", None), (None, None, "response")])
def test_a_response_that_is_also_the_prompt_is_refused(refuses, fields):
    refuses(
        lambda: example_from({"query": "q", "response": "r"}, 1, "row", *fields), "row: the field", "is the response"
    )


@pytest.mark.parametrize(
    "mark", [{"label": False}, {"kto_tag": False}, {"train": False}, {"weight": 0}, {"loss": "no"}]
)
@pytest.mark.parametrize("row", [{"prompt": "hi", "completion": "BAD"}, {"conversations": ["hi", "BAD"]}])
def test_rows_marked_as_not_to_be_learned_are_left_out_and_counted(tmp_path, row, mark):
    rows = [row | mark, row | dict.fromkeys(mark, True), row | {"label": 0}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, left_out = read_examples(tmp_path / "data.jsonl")
    assert [example.line for example in examples] == [2, 3] and left_out["rows marked as not to be learned"] == 1


@pytest.mark.parametrize(
    "columns",
    [{"image_path": "a"}, {"img": "a"}, {"pixel_values": [[0.5]]}, {"file_name": "7.JPG", "question": "<image>\nq"}],
)
def test_rows_about_a_picture_are_refused_whatever_its_column(refuses, columns):
    refuses(lambda: example_from({"question": "q", "answer": "a"} | columns, 1, "row"), "row: has", "only texts")
    turns = [{"role": "user", "content": columns.get("question", "q")}, {"role": "assistant", "content": "a"}]
    refuses(lambda: example_from({"messages": turns} | columns, 1, "row"), "row: has", "only texts")


def test_a_tag_of_html_and_the_name_of_a_file_are_texts():
    assert example_from({"question": "What is <video>?", "answer": "a", "file_name": "a.html"}, 1).response == "a"
    assert example_from({"question": "q", "answer": "a", "file_name": "a.jpg", "image": None}, 1).response == "a"


def test_a_row_of_many_fields_is_refused_in_a_short_line():
    with pytest.raises(mb.InputError) as caught:
        example_from({f"field{index}": "x" * index for index in range(50_000)} | {"y" * 9999: 1}, 1)
    assert len(str(caught.value)) < 1000 and "field19 and 49,981 more" in str(caught.value)
