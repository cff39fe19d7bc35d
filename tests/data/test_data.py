"""From files to batches: every row format, every broken file, the boundary, the order, the padding."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import minibalora as mb
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.template import RAW
from minibalora.checkpoints.tokenizer import Tokenizer
from minibalora.data.batches import (
    Row,
    check_fits,
    check_ids,
    encode_examples,
    micro_batches,
    pack,
    rows_of_step,
    steps_per_epoch,
)
from minibalora.data.prompts import PROMPT, PROMPT_WITH_INPUT, Example, example_from, examples_digest, read_examples
from minibalora.toy import MODEL

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
NONE = {"conversations without a reply": 0, "empty responses": 0}
ROW = {"query": "What is 2 + 3?", "response": "The answer is: 5"}
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def tok():
    return mb.load_tokenizer(MODEL)


@pytest.fixture
def write(tmp_path):
    """write(content) is a file with these bytes."""

    def file(content):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        return path

    return file


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def row_of(length, prompt_length, line=1):
    return Row(np.arange(100, 100 + length, dtype=np.int32), prompt_length, line)


# Rows.


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "response": "a"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": "a", "input": ""},
        {"query": "q", "answer": "a"},
        {"question": "q", "answer": "a"},
        {"prompt": "q", "completion": "a"},
        {"query": "q", "response": "a", "original_question": "x", "answer": "y", "output": "z"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": TURNS[1:]},
    ],
)
def test_every_row_format_gives_prompt_and_response(row):
    assert example_from(row, 7) == Example(PROMPT.format(instruction="q"), "a", "", 7)


def test_alpacas_input_has_a_separate_template():
    example = example_from({"instruction": "q", "input": "i", "output": "a"}, 1)
    assert example.prompt == PROMPT_WITH_INPUT.format(instruction="q", input="i")
    assert example.prompt.endswith("### Instruction:\nq\n\n### Input:\ni\n\n### Response:")
    assert example_from({"instruction": "q", "input": "i", "output": "a"}, 1, template=RAW).prompt == "q\ni"
    assert example_from({"query": "q", "response": "a"}, 1, template=RAW).prompt == "q"


def test_the_prompt_is_the_published_one():
    assert example_from(ROW, 1).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nWhat is 2 + 3?\n\n### Response:"
    )


def test_braces_in_a_question_are_text():
    assert "{x} {instruction} {" in example_from({"query": "{x} {instruction} {", "response": ""}, 1).prompt


@pytest.mark.parametrize(
    "prompt_field, response_field, expected",
    [("x", "y", ("px", "ry")), ("x", None, ("px", "r")), (None, "y", ("p", "ry")), (None, None, ("p", "r"))],
)
def test_fields_can_be_named(prompt_field, response_field, expected):
    row = {"query": "p", "response": "r", "x": "px", "y": "ry"}
    example = example_from(row, 1, "here", prompt_field, response_field)
    assert (example.prompt, example.response) == (PROMPT.format(instruction=expected[0]), expected[1])


def test_the_kind_is_the_row_s_type():
    assert example_from(ROW | {"type": "GSM_Rephrased"}, 1).kind == "GSM_Rephrased"
    assert example_from(ROW | {"type": 5}, 1).kind == ""
    assert example_from({"messages": TURNS, "type": "chat"}, 1).kind == "chat"


# Files.


@pytest.mark.parametrize(
    "content",
    [
        lines(ROW, ROW),
        lines(ROW, ROW).replace(b"\n", b"\r\n"),
        lines(ROW, ROW).rstrip(b"\n"),
        b"\xef\xbb\xbf" + lines(ROW, ROW),
        json.dumps([ROW, ROW]).encode(),
        b"\xef\xbb\xbf\n  " + json.dumps([ROW, ROW], indent=2).encode(),
    ],
)
def test_json_lines_and_arrays_are_read_with_or_without_bom(write, content):
    assert read_examples(write(content)) == ([example_from(ROW, 1), example_from(ROW, 2)], NONE)


def test_empty_lines_are_skipped_but_counted(write):
    assert [example.line for example in read_examples(write(b"\n" + lines(ROW) + b" \t\n\n" + lines(ROW)))[0]] == [2, 5]


def test_text_beyond_ascii_is_kept(write):
    row = {"query": "¿Cuánto es 2 + 3? 🤖\u2028", "response": "日本語\r\n"}
    raw = json.dumps(row, ensure_ascii=False).encode() + b"\n" + lines(row)
    assert read_examples(write(raw)) == ([example_from(row, 1), example_from(row, 2)], NONE)


def test_a_limit_stops_reading(write):
    path = write(lines(ROW, ROW) + b"broken")
    assert len(read_examples(path, limit=2)[0]) == 2
    assert len(read_examples(write(lines(ROW, ROW)), limit=5)[0]) == 2


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["no rows"]),
        (b"\n \n", ["no rows"]),
        (b"[]", ["no rows"]),
        (lines(ROW) + b'{"query": \n', ["line 2", "broken JSON"]),
        (lines(ROW) + b"\n{'query': 1}\n", ["line 3", "broken JSON"]),
        (lines(ROW, ROW) + b'{"query": "\xff"}\n', ["line 3", "UTF-8"]),
        (b"[\n" + lines(ROW) + b",\n{x}]", ["line 4", "broken JSON"]),
        (b'[\n"a",\n"\xff"]', ["line 3", "UTF-8"]),
        (json.dumps([ROW]).encode()[:-1], ["line 1", "broken JSON"]),
        (json.dumps([ROW]).encode() + b"]", ["line 1", "broken JSON"]),
        (lines(ROW).decode().encode("utf-16"), ["line 1", "UTF-8"]),
        (lines(ROW, 5), ["line 2", "int"]),
        (lines(ROW, None), ["line 2", "NoneType"]),
        (b'["a"]', ["item 1", "str"]),
        (b'[\n{"query": "q", "response": "r"},\n\n{"query": "q"}]', ["item 2", "none of"]),
        (lines(ROW, {}), ["line 2", "none"]),
        (lines(ROW, {"query": "q", "text": "t"}), ["line 2", "query, text", "question/answer", "--prompt-field"]),
        (lines(ROW, {"query": "q", "response": True}), ["line 2", "'response'", "bool"]),
        (lines(ROW, {"query": "q", "response": float("inf")}), ["line 2", "'response'", "float"]),
        (lines(ROW, {"query": None, "response": "a"}), ["line 2", "query (null), response, none of"]),
        (lines(ROW, {"question": "q", "answer": "a", "context": {"x": []}}), ["line 2", "'context'", "dict"]),
        (lines(ROW, {"query": "\ud800", "response": "a"}), ["line 2", "'query'", "\\ud800"]),
        (lines(ROW, {"messages": "hi"}), ["line 2", "messages", "not a list of turns"]),
        (lines(ROW, {"conversations": [5]}), ["line 2", "conversations", "not a list of turns"]),
        (lines({"conversations": []}), ["has no rows"]),
        (b"PAR1\x15\x04", ["a Parquet file"]),
        (POINTER, ["a git-lfs pointer", "`git lfs pull`"]),
        (b"PK\x03\x04\x14\x00", ["a ZIP archive: unpack it"]),
        (lines(ROW, {"messages": [{"role": "user"}, *TURNS[2:]]}), ["line 2", "user", "NoneType"]),
        (lines(ROW) + b"[" * 100_000, ["line 2", "nested"]),
        (lines(ROW) + b'{"query": %s}' % (b"9" * 5000), ["line 2", "digits"]),
        (bytes(range(256)), ["line"]),
    ],
)
def test_a_bad_row_is_refused_with_its_line(write, refuses, content, parts):
    path = write(content)
    refuses(lambda: read_examples(path), path, *parts)


@pytest.mark.parametrize("fields", [("x", None), (None, "x"), ("x", "x"), ("query", "x")])
def test_a_named_field_that_is_missing_is_refused(write, refuses, fields):
    refuses(lambda: read_examples(write(lines(ROW)), *fields), "line 1", "'x'")


def test_a_path_that_is_not_a_file_is_refused(tmp_path, refuses):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300), tmp_path / "file" / "below"):
        refuses(lambda path=path: read_examples(path), path, "JSON Lines, Parquet")


def test_a_text_without_tokens_is_refused(refuses):
    row = Row(np.array([], dtype=np.int32), 0, 7)
    refuses(lambda: check_fits([row], "file.tsv", read_config(GOLDEN / "gpt2"), 20), "file.tsv, line 7", "no tokens")


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 40), ("llama2", 2048)])
def test_rows_beyond_the_context_are_refused(refuses, name, positions):
    config, ids = read_config(GOLDEN / name), np.full(positions + 1, 5, dtype=np.int32)
    check_fits([Row(ids[1:], 1, 7)], "file", config, positions)
    refuses(lambda: check_fits([], "file", config, positions + 1, "m"), "--max-length", f"m has {positions} positions")
    refuses(
        lambda: check_fits([Row(ids, 1, 7)], "file", config, 9, "m"), "file, line 7", f"m has {positions} positions"
    )
    check_ids(ids[2:], "a prompt", config, room=1)
    refuses(
        lambda: check_ids(ids[1:], "a prompt", config, room=1), f"a prompt has {positions} tokens", "for its answer"
    )


def test_a_token_beyond_the_vocabulary_is_refused(refuses):
    config = read_config(GOLDEN / "gpt2")
    check_ids([60], "a prompt", config)
    refuses(lambda: check_ids([2, 61], "a prompt", config, model="m"), "a prompt", "token 61", "m has 61 tokens")


def test_the_digest_covers_the_texts_that_are_learned():
    examples = [example_from(ROW, 1), example_from(ROW | {"query": "q"}, 2)]
    assert examples_digest(examples) == examples_digest([replace(examples[0], line=5, kind="k"), examples[1]])
    assert examples_digest(examples) != examples_digest(examples[::-1])
    assert examples_digest(examples) != examples_digest([examples[0], replace(examples[1], response="")])


# Tokens.

TEXTS = ["", "5", " 5", "\n5", "Tom pays 3 + 4 = 7.\n#### 7", "ünï 🤖 日本", "### Response:", "a" * 50]


@pytest.mark.parametrize("response", TEXTS)
@pytest.mark.parametrize("question", TEXTS)
def test_the_boundary_between_prompt_and_response_is_exact(tok, question, response):
    example = example_from({"query": question, "response": response}, 3)
    (row,), truncated, dropped = encode_examples([example], tok, 512)
    assert (truncated, dropped, row.line) == (0, 0, 3)
    assert row.ids[: row.prompt_length].tolist() == tok.encode(example.prompt)  # as at generation
    assert row.ids[0] == tok.bos_id and row.ids[-1] == tok.eos_id
    assert tok.decode(row.ids[row.prompt_length :]) == response
    assert tok.decode(row.ids) == example.prompt + response


@settings(deadline=None)
@given(st.integers(1, 120))
def test_truncation_keeps_a_response_token_or_drops_the_row_and_counts_it(tok, max_length):
    examples = [example_from({"query": text, "response": TEXTS[-1]}, line) for line, text in enumerate(TEXTS)]
    whole, truncated, dropped = encode_examples(examples, tok, 10_000)
    assert len(whole) == len(examples) and truncated == dropped == 0
    rows, truncated, dropped = encode_examples(examples, tok, max_length)
    fitting = [row for row in whole if row.prompt_length < max_length]
    assert [row.line for row in rows] == [row.line for row in fitting] and dropped == len(whole) - len(fitting)
    assert truncated == sum(len(row.ids) > max_length for row in fitting)
    for row, complete in zip(rows, fitting, strict=True):
        assert row.ids.tolist() == complete.ids[:max_length].tolist() and row.prompt_length == complete.prompt_length
        assert row.prompt_length < len(row.ids) <= max_length


def test_a_model_without_eos_learns_the_response_alone(tok, tmp_path):
    bare = Tokenizer(tok.backend, {}, tmp_path)
    rows, truncated, dropped = encode_examples(
        [example_from(ROW, 1), example_from(ROW | {"response": ""}, 2)], bare, 512
    )
    assert [row.line for row in rows] == [1] and (truncated, dropped) == (0, 1)  # no response token: nothing to learn
    assert rows[0].ids[rows[0].prompt_length :].tolist() == bare.encode_responses([ROW["response"]])[0]


def test_a_response_that_ends_with_eos_learns_it_once(tok):
    eos = tok.backend.id_to_token(tok.eos_id)
    rows, _, _ = encode_examples(
        [example_from(ROW, 1), example_from(ROW | {"response": ROW["response"] + eos}, 2)], tok, 512
    )
    assert rows[0].ids.tolist() == rows[1].ids.tolist()


# Batches.


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 2**62), st.integers(0, 3))
def test_every_epoch_takes_every_row_once(count, batch_size, seed, epoch):
    per_epoch = steps_per_epoch(count, batch_size)
    steps = [rows_of_step(count, batch_size, seed, epoch * per_epoch + step) for step in range(per_epoch)]
    assert [len(rows) for rows in steps[:-1]] == [batch_size] * (per_epoch - 1) and 1 <= len(steps[-1]) <= batch_size
    assert sorted(sum(steps, [])) == list(range(count))


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 2**62), st.integers(0, 10**6))
def test_the_rows_of_a_step_depend_only_on_count_batch_size_seed_and_step(count, batch_size, seed, step):
    np.random.seed(1), torch.manual_seed(1)
    rows = rows_of_step(count, batch_size, seed, step)
    np.random.seed(2), torch.manual_seed(2)
    rows_of_step(count, batch_size, seed + 1, step)
    assert rows_of_step(count, batch_size, seed, step) == rows


def test_epochs_and_seeds_differ_in_order():
    orders = {tuple(rows_of_step(50, 50, seed, epoch)) for seed in (42, 1024, 2024) for epoch in range(3)}
    assert len(orders) == 9


@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(1, 50))
def test_micro_batches_are_a_partition_sorted_by_length(lengths, size):
    rows = [row_of(length, 1, line) for line, length in enumerate(lengths)]
    batches = micro_batches(rows, size)
    ordered = [row for batch in batches for row in batch]
    assert sorted(row.line for row in ordered) == list(range(len(rows)))
    assert [len(row.ids) for row in ordered] == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size
    assert [[row.line for row in batch] for batch in micro_batches(rows[::-1], size)] == [
        [row.line for row in batch] for batch in batches
    ]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6), st.integers(0, 9))
def test_packed_rows_come_back_whole_and_predict_exactly_the_response(parts, alike):
    """Return rows whose first `alike` ids are equal, followed by different ids."""
    parts = [(max(prompt, 2 - response), response) for prompt, response in parts]  # two tokens at least
    rows = [row_of(prompt + response, prompt) for prompt, response in parts]
    for index, row in enumerate(rows):
        row.ids[alike:] += 100 * (index + 1)
    packed = pack(rows, "cpu")
    assert packed.input_ids.dtype == packed.targets.dtype == torch.int64
    begin, *own = (part.tolist() for part in packed.input_ids.split([packed.shared, *packed.lengths]))
    assert [begin + part for part in own] == [row.ids[:-1].tolist() for row in rows]
    predicted = [row.ids[max(row.prompt_length, 1) :].tolist() for row in rows]
    assert [part.tolist() for part in packed.targets.split(packed.wanted)] == predicted
    assert all(count <= length for count, length in zip(packed.wanted, packed.lengths, strict=True))
    assert packed.shared == (0 if len(rows) == 1 else min(alike, *(max(prompt, 1) - 1 for prompt, _ in parts)))


def test_conversations_without_an_answered_user_are_counted(write):
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    conversations = [[], [human], [gpt], [gpt, human], [human, gpt], [human, {"from": "bing", "value": "b"}]]
    examples, unanswered = read_examples(write(lines(*({"conversations": turns} for turns in conversations))))
    assert [(example.line, example.response) for example in examples] == [(5, "a"), (6, "b")] and unanswered == NONE | {
        "conversations without a reply": 4
    }
