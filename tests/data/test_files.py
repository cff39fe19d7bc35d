"""Files of rows: Parquet, shards, folders, the Hub's cache, gzip and pointers; an error names the file and the row."""

import gzip
import json

import pytest

import minibalora as mb
from minibalora.base.files import entered
from minibalora.checkpoints.families import read_config
from minibalora.checkpoints.sentencepiece import read_sentencepiece
from minibalora.checkpoints.template import ALPACA
from minibalora.data.files import named, read_rows, shards
from minibalora.data.glue import TASKS, glue_files, read_labelled
from minibalora.data.prompts import read_examples
from minibalora.evaluation.benchmarks import BENCHMARKS, read_items
from minibalora.evaluation.generate import read_prompts
from minibalora.evaluation.perplexity import text_windows

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ROWS = [{"query": f"q{index}", "response": f"r{index}"} for index in range(5)]


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: None for row in rows for name in row}
    parquet.write_table(pyarrow.Table.from_pylist([columns | row for row in rows]), path, row_group_size=2)
    return path


def texts(source):
    return [example.response for example in read_examples(source)[0]]


# Parquet.


def test_fields_that_an_object_in_parquet_lacks_are_left_out(tmp_path):
    calls = [{"name": "w", "arguments": {"city": "Paris"}}, {"name": "t", "arguments": {"zone": "UTC"}}]
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]} for call in calls]
    path = write_parquet(tmp_path / "rows.parquet", [{"messages": turns, "query": None, "response": "r"}])
    row = next(read_rows(path))[2]  # Arrow gives both calls both arguments
    assert [turn["tool_calls"][0] for turn in row["messages"]] == calls and "content" not in row["messages"][0]
    assert "query" in row  # but columns stay


def test_parquet_rows_equal_those_of_json_lines(tmp_path):
    conversation = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    rows = [*ROWS, conversation, {"query": "q", "response": None, "number": 3}]
    (tmp_path / "rows.jsonl").write_text(json_lines(*rows))
    path = write_parquet(tmp_path / "rows.parquet", rows)
    assert read_examples(path) == read_examples(tmp_path / "rows.jsonl")
    assert read_examples(path)[1] == {"conversations without a reply": 0, "empty responses": 1}
    assert [where for _, where, _ in read_rows(path)][-1] == f"{path}, row 7"
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_examples(tmp_path / "rows.parquet.gz") == read_examples(path)


@pytest.mark.parametrize("keep", [4, 40, -30, -9])
def test_a_parquet_file_that_is_cut_is_refused(tmp_path, refuses, keep):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:keep])
    refuses(lambda: read_examples(path), path, "a Parquet file", "row 0", "download it again")


def test_a_parquet_file_with_damaged_rows_names_the_last_good_one(tmp_path, refuses):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    refuses(lambda: list(read_rows(path)), path, "a Parquet file that is damaged after row")


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}, b"bytes"])
def test_a_parquet_column_of_another_type_is_refused_with_its_row(tmp_path, refuses, value):
    path = write_parquet(tmp_path / "rows.parquet", [{"query": "q", "response": value}])
    refuses(lambda: read_examples(path), path, "row 1", "'response'", type(value).__name__)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, refuses, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and so on")
    for read in (read_examples, lambda path: read_labelled(path, TASKS["sst2"])):
        refuses(lambda read=read: read(tmp_path / "rows.parquet"), "a Parquet file", "pip install '.[parquet]'")


GLUE_PARQUET = {
    "cola": ({"sentence": "a", "label": 1, "idx": 0}, (("a",), 1)),
    "sst2": ({"sentence": "a", "label": 1, "idx": 0}, (("a",), 1)),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 0, "idx": 0}, (("a", "b"), 0)),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.5, "idx": 0}, (("a", "b"), 3.5)),
    "qqp": ({"question1": "a", "question2": "b", "label": 1, "idx": 0}, (("a", "b"), 1)),
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}, (("a", "b"), 2)),
    "qnli": ({"question": "a", "sentence": "b", "label": 0, "idx": 0}, (("a", "b"), 0)),
    "rte": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, (("a", "b"), 1)),
    "wnli": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, (("a", "b"), 1)),
}


@pytest.mark.parametrize("name", TASKS)
def test_glue_as_the_hub_has_it_is_read_from_its_folder(tmp_path, name):
    row, expected = GLUE_PARQUET[name]
    hidden = row | {"label": -1.0 if name == "stsb" else -1}
    folder = tmp_path / "datasets--nyu-mll--glue" / "snapshots" / "abc" / name
    write_parquet(folder / "train-00000-of-00002.parquet", [row, hidden])
    write_parquet(folder / "train-00001-of-00002.parquet", [row])
    write_parquet(folder / "test-00000-of-00001.parquet", [hidden])
    for split in ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",):
        write_parquet(folder / f"{split}-00000-of-00001.parquet", [row])
    train, dev = glue_files(tmp_path / "datasets--nyu-mll--glue", TASKS[name])
    examples, skipped, _ = read_labelled(train, TASKS[name])
    assert [((example.texts, example.label), example.line) for example in examples] == [(expected, 1), (expected, 3)]
    assert skipped == 1 and len(dev) == (2 if name == "mnli" else 1)
    assert all(len(read_labelled(path, TASKS[name])[0]) == 1 for path in dev)


def test_benchmarks_are_read_from_parquet(tmp_path):
    rows = [{"question": "2 + 3?", "answer": "#### 5"}, {"question": "2 + 4?", "answer": "#### 6"}]
    write_parquet(tmp_path / "main" / "test-00000-of-00001.parquet", rows)
    assert [item.response for item in read_items(BENCHMARKS["gsm8k"], tmp_path / "main")] == ["#### 5", "#### 6"]


def test_prompts_are_read_from_parquet(tmp_path):
    path = write_parquet(tmp_path / "prompts.parquet", [{"question": "2 + 3?", "answer": None}, {"question": "why?"}])
    assert [asked for _, asked, _ in read_prompts(None, path, ALPACA)] == ["2 + 3?", "why?"]


# Shards, folders and the Hub's cache.


@pytest.fixture
def folder(tmp_path):
    """Three shards of two, two and one rows, and files that are not data."""
    for index in range(3):
        (tmp_path / f"train-0000{index}-of-00003.jsonl").write_text("\n" + json_lines(*ROWS[2 * index : 2 * index + 2]))
    (tmp_path / "README.md").write_text("# a data set")
    (tmp_path / "dataset_infos.json").write_text("{}")
    return tmp_path


def test_shards_are_read_in_order_from_a_pattern_or_a_folder(folder):
    for source in (folder, str(folder), folder / "train-*.jsonl", str(folder / "train-0000?-of-*")):
        examples, _ = read_examples(source)
        assert [example.response for example in examples] == ["r0", "r1", "r2", "r3", "r4"]
        assert [example.line for example in examples] == [2, 3, 5, 6, 8]  # as in one file after the other
        assert named(source) == f"{source} (train-00000-of-00003.jsonl to train-00002-of-00003.jsonl, 3 files)"
    assert texts(folder / "train-00001-of-00003.jsonl") == ["r2", "r3"]
    assert len(read_examples(folder, limit=3)[0]) == 3


def test_an_error_in_a_shard_names_the_file_and_its_line(folder, refuses):
    (folder / "train-00001-of-00003.jsonl").write_text(json_lines(ROWS[0]) + "{broken\n")
    refuses(lambda: read_examples(folder), "train-00001-of-00003.jsonl, line 2", "broken JSON")


def test_the_training_set_of_several_sets_is_read(folder, refuses):
    (folder / "test-00000-of-00001.jsonl").write_text(json_lines(ROWS[0]))
    assert len(texts(folder)) == 5
    (folder / "train_gen-00000-of-00001.jsonl").write_text(json_lines(ROWS[0]))
    refuses(lambda: shards(folder), folder, "3 sets", "train-*.jsonl", "test-*.jsonl", "train_gen-*.jsonl")


def test_a_folder_or_a_pattern_without_files_is_refused(tmp_path, refuses):
    refuses(lambda: shards(tmp_path), tmp_path, "without data files")
    refuses(lambda: shards(tmp_path / "train-*.jsonl"), "train-*.jsonl", "no file matches")


def test_tsv_shards_have_a_header_each(tmp_path):
    for index in range(2):
        (tmp_path / f"train-{index}.tsv").write_text(f"sentence\tlabel\ntext {index}\t{index}\n")
    examples, _, _ = read_labelled(tmp_path / "train-*.tsv", TASKS["sst2"])
    assert [(example.texts[0], example.label, example.line) for example in examples] == [
        ("text 0", 0, 2),
        ("text 1", 1, 4),
    ]


@pytest.mark.parametrize("name", ["models--org--name", "datasets--org--name"])
def test_a_folder_of_the_hub_s_cache_is_entered_at_its_snapshot(tmp_path, refuses, name):
    cache = tmp_path / name
    (cache / "snapshots" / "aaa").mkdir(parents=True)
    (cache / "snapshots" / "aaa" / "data.json").write_text(json.dumps(ROWS))
    assert entered(cache) == cache / "snapshots" / "aaa" and texts(cache) == [f"r{index}" for index in range(5)]
    (cache / "snapshots" / "bbb").mkdir()
    refuses(lambda: entered(cache), cache, "2 snapshots (aaa, bbb)")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb")
    assert entered(cache) == cache / "snapshots" / "bbb"
    assert entered(tmp_path) == tmp_path


# gzip and git-lfs.


def test_every_reader_reads_gzip(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json_lines(*ROWS).encode()))
    assert len(texts(tmp_path / "rows.jsonl.gz")) == 5
    (tmp_path / "dev.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\na\t1\n"))
    assert read_labelled(tmp_path / "dev.tsv.gz", TASKS["sst2"])[0][0].texts == ("a",)
    (tmp_path / "prompts.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert [asked for _, asked, _ in read_prompts(None, tmp_path / "prompts.txt.gz", ALPACA)] == ["one", "two"]
    tok, model = mb.load_tokenizer(mb.checkpoints.BUILT_IN / "llama"), read_config(mb.checkpoints.BUILT_IN / "llama")
    (tmp_path / "text.txt").write_bytes(b"one two three")
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(b"one two three"))
    assert text_windows(tmp_path / "text.txt.gz", tok, model) == text_windows(tmp_path / "text.txt", tok, model)


def test_a_damaged_gzip_file_is_refused(tmp_path, refuses):
    whole = gzip.compress(json_lines(*ROWS * 100).encode())
    (tmp_path / "rows.tsv.gz").write_bytes(whole[: len(whole) // 2])
    refuses(lambda: read_examples(tmp_path / "rows.tsv.gz"), "rows.tsv.gz")
    refuses(lambda: read_labelled(tmp_path / "rows.tsv.gz", TASKS["sst2"]), "rows.tsv.gz")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "spm.model", "data.jsonl", "train.tsv"]
)
def test_a_git_lfs_pointer_is_recognised_in_any_file(tmp_path, refuses, name):
    toy = mb.checkpoints.BUILT_IN / "bert"
    for path in toy.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(POINTER)
    read = {
        "data.jsonl": lambda: read_examples(tmp_path / name),
        "train.tsv": lambda: read_labelled(tmp_path / name, TASKS["sst2"]),
        "tokenizer.json": lambda: mb.load_tokenizer(tmp_path),
        "spm.model": lambda: read_sentencepiece(tmp_path / name, {}),
    }.get(name, lambda: mb.load_model(tmp_path, head="classifier"))
    refuses(read, tmp_path / name, "a git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(("names", "message"), [
    (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "has shards of 3, but not number 1: download it"),
    (["train-00000-of-00001.jsonl", "train-00001-of-00002.jsonl"], "has shards of 1 and of 2, two versions"),
    (["train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"], None),  # counted from 1
])  # fmt: skip
def test_missing_shards_and_those_of_two_versions_are_refused(names, message, tmp_path, refuses):
    for name in names:
        (tmp_path / name).write_text(json_lines(ROWS[0]))
    if message is None:
        assert [path.name for path in shards(tmp_path)] == names
    else:
        refuses(lambda: shards(tmp_path), tmp_path, message)


def test_a_pattern_chooses_some_shards_of_one_version(tmp_path, refuses):
    for name in ("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl", "train-00000-of-00001.jsonl"):
        (tmp_path / name).write_text(json_lines(ROWS[0]))
    assert len(shards(tmp_path / "train-*-of-00003.jsonl")) == 2
    refuses(lambda: shards(tmp_path / "train-*.jsonl"), "has shards of 1 and of 3")


def test_times_in_parquet_are_not_read_and_a_field_that_needs_one_is_refused(tmp_path, refuses):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    times = pyarrow.array([10**17, 1], pyarrow.timestamp("ms")), pyarrow.array([1, 2], pyarrow.time64("ns"))
    table = pyarrow.table({"query": ["q0", "q1"], "response": ["r0", "r1"], "day": times[0], "hour": times[1]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == ["r0", "r1"]
    refuses(lambda: read_examples(tmp_path / "rows.parquet", input_field="day"), "row 1", "'day' is a date or time")
    parquet.write_table(table.rename_columns(["query", "response", "input", "hour"]), tmp_path / "rows.parquet")
    refuses(lambda: read_examples(tmp_path / "rows.parquet"), "row 1", "'input' is a date or time")


def test_a_time_inside_an_object_is_left_out_and_the_rest_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turn = pyarrow.struct({"from": pyarrow.string(), "value": pyarrow.string(), "at": pyarrow.timestamp("ns")})
    turns = [{"from": "human", "value": "q", "at": 1}, {"from": "gpt", "value": "a", "at": 2}]
    column = pyarrow.array([turns], pyarrow.list_(turn))
    parquet.write_table(pyarrow.table({"conversations": column}), tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == ["a"]
    assert "at" not in next(read_rows(tmp_path / "rows.parquet"))[2]["conversations"][0]


def test_numbers_are_texts_as_they_were_written(tmp_path):
    numbers = ["2.10", "0.00001", "1E3", "0.1", "7", "-0.0"]
    rows = "".join(f'{{"query": {number}, "response": {number}, "tools": [{{"a": 2.10}}]}}\n' for number in numbers)
    (tmp_path / "rows.jsonl").write_text(rows)
    assert texts(tmp_path / "rows.jsonl") == numbers
    row = next(read_rows(tmp_path / "rows.jsonl"))[2]
    assert row["query"] == 2.1 and json.dumps(row["tools"]) == '[{"a": 2.1}]'


@pytest.mark.parametrize(
    ("values", "kind", "written"),
    [
        ([0.1, 2.5], "float32", ["0.1", "2.5"]),
        ([2.0, None, 30.0], "float64", ["2", "30"]),  # what pandas makes of 2, nothing and 30
        ([2.0, 30.0], "float64", ["2.0", "30.0"]),
        ([2.0, None, 2.5], "float64", ["2.0", "2.5"]),
    ],
)
def test_numbers_in_parquet_are_texts_as_they_were_written(tmp_path, values, kind, written):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"query": ["q"] * len(values), "response": pyarrow.array(values, kind)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == written


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"query": "q", "input": "a", "input": "b", "response": "r"}', ["line 2", "two fields 'input'"]),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', ["line 2", "two fields 'content'"]),
        ('[{"query": "q",\n"query": "p",\n"response": "r"}]', ["two fields 'query'"]),
    ],
)
def test_a_field_that_is_there_twice_is_refused(tmp_path, refuses, content, parts):
    (tmp_path / "rows.jsonl").write_text(content if content[0] == "[" else json_lines(ROWS[0]) + content)
    refuses(lambda: read_examples(tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl", *parts)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path, refuses):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table([["q"], ["a"], ["r"]], names=["query", "input", "input"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    refuses(lambda: read_examples(tmp_path / "rows.parquet"), "rows.parquet: has two columns 'input'")


@pytest.mark.parametrize("name", ["a-00001.jsonl.zst", "a-00001.csv", "a-00001.csv.gz", "a-00001.arrow", "a-00001.zip"])
def test_a_shard_in_a_form_that_is_not_read_is_refused(tmp_path, refuses, name):
    (tmp_path / "a-00000.jsonl").write_text(json_lines(ROWS[0]))
    for other in ("a-00000.csv", "notes.txt", "b-00001.zip"):  # the same shard in another form, and other files
        (tmp_path / other).touch()
    assert texts(tmp_path) == ["r0"]
    (tmp_path / name).touch()
    refuses(lambda: shards(tmp_path), tmp_path, f"has the shard {name}, which can't be read")


def test_our_own_runs_inside_a_folder_of_data_are_no_data(tmp_path):
    (tmp_path / "alpaca.jsonl").write_text('{"prompt": "q", "response": "r"}\n')
    (tmp_path / "runs" / "a" / "checkpoint").mkdir(parents=True)
    for name in ("run.json", "log.jsonl", "checkpoint/state.json"):
        (tmp_path / "runs" / "a" / name).write_text("{}")
    assert shards(tmp_path) == [tmp_path / "alpaca.jsonl"]


def test_a_folder_of_ndjson_is_read_and_one_of_csv_is_named(tmp_path, refuses):
    (tmp_path / "train.csv").write_text("query,response\nq,r\n")
    refuses(lambda: shards(tmp_path), tmp_path, "without data files (train.csv can't be read)")
    (tmp_path / "train.ndjson").write_text(json_lines(ROWS[0]))
    assert texts(tmp_path) == ["r0"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz"])
def test_csv_is_refused_by_its_name_unless_it_holds_json(tmp_path, refuses, name):
    zipped = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(zipped(b"query,response\nq,r\n"))
    refuses(lambda: read_examples(tmp_path / name), name, "CSV and TSV are not read here", "to_json")
    (tmp_path / name).write_bytes(zipped(json_lines(ROWS[0]).encode()))
    assert texts(tmp_path / name) == ["r0"]
