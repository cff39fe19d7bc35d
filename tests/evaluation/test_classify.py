"""The command classify: which texts are read, which labels are written, and the files for GLUE's server."""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import stretch

import minibalora as mb
from minibalora.base.files import write_json
from minibalora.checkpoints import BUILT_IN
from minibalora.data.files import shards
from minibalora.data.glue import TASKS
from minibalora.evaluation import classify
from minibalora.evaluation.submission import files_to_submit
from minibalora.toy.reviews import TASK, clean_reviews

BERT = BUILT_IN / "bert"
TEXTS = [row.texts[0] for row in clean_reviews(7, seed=3)]
PAIRS = [("the soup was good", "the soup was bad"), ("not dull", "charming"), ("the bread", "the bread was awful")]


@pytest.fixture
def run(in_command, monkeypatch):
    """run(*flags, stdin="") -> status, standard output, standard error of python -m minibalora classify."""

    def call(*flags, stdin: str | bytes = ""):
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw), isatty=lambda: False))
        return in_command(classify.main, "--device", "cpu", *flags)

    return call


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """adapters(classes, **settings) -> folder of an adapter of the toy BERT, with the run.json of train_nlu.py."""

    def make(classes: int, **settings):
        folder = tmp_path_factory.mktemp("adapter")
        torch.manual_seed(classes)
        model = mb.adapt(mb.load_model(BERT, "classifier", classes), rank=2)
        stretch(model)
        with torch.no_grad():
            model.classifier.weight *= 50  # probabilities that differ
        mb.save_adapter(model, folder)
        if settings:
            write_json(folder / "run.json", {"settings": settings})
        return folder

    return make


def expected(folder, texts, classes):
    """Return the probabilities (N, D), or scores (N, 1), computed one text at a time."""
    model = mb.load_adapter(mb.load_model(BERT, "classifier", classes), folder)
    encoded, _ = mb.load_tokenizer(BERT).encode_labelled(texts, 64)
    with torch.no_grad():
        logits = [
            model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), torch.tensor([types]))
            for ids, types in encoded
        ]
    return torch.cat(logits).softmax(1) if classes > 1 else torch.cat(logits)


def test_probabilities_and_labels_are_the_models_in_the_order_of_the_input(run, adapters, tmp_path):
    folder = adapters(3, labels=list(TASK.labels), max_length=64)
    shares = expected(folder, [(text,) for text in TEXTS], 3)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n\n" for text in TEXTS))
    status, out, error = run("--adapter", folder, "--data", path, "--batch-size", 2)
    assert status == 0 and "7 rows, 0 cut to 64 tokens" in error, error
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["line"] for row in rows] == [1, 3, 5, 7, 9, 11, 13]
    for row, share in zip(rows, shares, strict=True):
        assert row["label"] == TASK.labels[share.argmax()]
        assert list(row["probabilities"]) == list(TASK.labels)
        assert list(row["probabilities"].values()) == pytest.approx(share.tolist(), abs=1e-5)
    assert len({row["label"] for row in rows}) > 1


def test_all_forms_of_input_and_output_agree(run, adapters, tmp_path, monkeypatch):
    folder = adapters(3, labels=list(TASK.labels), max_length=64)
    monkeypatch.setattr(classify, "WINDOW", 1)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS))
    (tmp_path / "a.json").write_text(json.dumps([{"mine": text} for text in TEXTS]))
    table = "\ufeffid\tmine\tlabel\n" + "".join(f"{n}\t{text}\t\t\r\n" for n, text in enumerate(TEXTS))
    (tmp_path / "a.tsv").write_text(table, newline="")
    lines = "".join(f"{text}\n" for text in TEXTS)
    outputs = [
        run("--adapter", folder, "--format", "tsv", *flags, stdin=lines)
        for flags in (
            (), ("--data", "-"), ("--data", tmp_path / "a.jsonl"), ("--batch-size", 3),
            ("--data", tmp_path / "a.json", "--text-field", "mine"),
            ("--data", tmp_path / "a.tsv", "--text-field", "mine"),
        )
    ]  # fmt: skip
    assert {status for status, _, _ in outputs} == {0}, outputs
    tables = [[line.split("\t") for line in out.splitlines()] for _, out, _ in outputs]
    assert all(rows[0] == ["line", "label", *TASK.labels] for rows in tables)
    assert [row[0] for row in tables[0][1:]] == list("1234567") and [row[0] for row in tables[-1][1:]] == list(
        "2345678"
    )
    for rows in tables[1:]:
        for row, first in zip(rows[1:], tables[0][1:], strict=True):
            assert row[1] == first[1] and list(map(float, row[2:])) == pytest.approx(
                list(map(float, first[2:])), abs=1e-5
            )
    _, out, _ = run("--adapter", folder, stdin=json.dumps({"text": TEXTS[0]}) + "\n\n" + TEXTS[1])
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["line"], row["label"]) for row in rows] == [(1, tables[0][1][1]), (3, tables[0][2][1])]


def test_pairs_and_scores(run, adapters, tmp_path):
    folder = adapters(1, task="stsb", labels=[], max_length=64)
    scores = expected(folder, PAIRS, 1)[:, 0].tolist()
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in PAIRS))
    for flags, stdin in [
        (("--data", path, "--text-field", "a", "b"), ""),
        ((), "".join(f"{a}\t{b}\n" for a, b in PAIRS)),
    ]:
        status, out, error = run("--adapter", folder, *flags, stdin=stdin)
        assert status == 0, error
        assert [json.loads(line)["score"] for line in out.splitlines()] == pytest.approx(scores, abs=1e-5)
    _, out, _ = run("--adapter", folder, "--format", "tsv", stdin="x\ty\n")
    assert out.startswith("line\tscore\n1\t")
    status, _, error = run("--adapter", folder, stdin="one text\n")
    assert status == 2 and "line 1: has 1 texts" in error


def test_labels_come_from_the_run_or_from_a_config(run, adapters, tmp_path):
    folder = adapters(3)
    assert json.loads(run("--adapter", folder, stdin="x")[1])["label"].startswith("LABEL_")
    write_json(folder / "config.json", {"id2label": {"2": "c", "0": "a", "1": "b"}})
    assert list(json.loads(run("--adapter", folder, stdin="x")[1])["probabilities"]) == ["a", "b", "c"]
    mb.save_model(mb.load_adapter(mb.load_model(BERT, "classifier", 3), folder), tmp_path / "model", TASK.labels)
    whole, adapted = (
        run(*flags, stdin="fair food")[1] for flags in (("--model", tmp_path / "model"), ("--adapter", folder))
    )
    whole, adapted = (list(json.loads(out)["probabilities"].items()) for out in (whole, adapted))
    assert [name for name, _ in whole] == list(TASK.labels)
    assert [share for _, share in whole] == pytest.approx([share for _, share in adapted], abs=1e-5)


def test_a_model_with_several_labels_per_text_is_refused(run, adapters, tmp_path):
    mb.save_model(mb.load_adapter(mb.load_model(BERT, "classifier", 3), adapters(3)), tmp_path, TASK.labels)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"problem_type": "multi_label_classification"})
    status, out, error = run("--model", tmp_path, stdin="fair food")
    assert (status, out) == (2, "") and "config.json: problem_type is multi_label_classification" in error
    assert run("--model", tmp_path, "--adapter", adapters(3, labels=["a", "b", "c"]), stdin="x")[0] == 0  # its own head


# GLUE's server.

TEST_FILES = {
    "cola": ("index\tsentence", "{i}\t{a}", ["0", "1"], "CoLA"),
    "sst2": ("index\tsentence", "{i}\t{a}", ["0", "1"], "SST-2"),
    "mrpc": ("\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String", "{i}\t7\t8\t{a}\t{b}", ["0", "1"], "MRPC"),
    "qqp": ("id\tquestion1\tquestion2", "{i}\t{a}\t{b}", ["0", "1"], "QQP"),
    "qnli": ("index\tquestion\tsentence", "{i}\t{a}\t{b}", ["entailment", "not_entailment"], "QNLI"),
    "rte": ("index\tsentence1\tsentence2", "{i}\t{a}\t{b}", ["entailment", "not_entailment"], "RTE"),
    "wnli": ("index\tsentence1\tsentence2", "{i}\t{a}\t{b}", ["0", "1"], "WNLI"),
}  # fmt: skip


def written(folder, header, form, pairs=PAIRS):
    rows = [form.format(i=i, a=a, b=b) for i, (a, b) in enumerate(pairs)]
    folder.write_text("".join(f"{row}\n" for row in [header, *rows]))


@pytest.mark.parametrize("task", TEST_FILES)
def test_a_submission_has_the_servers_name_header_and_labels(run, adapters, tmp_path, task):
    header, form, labels, name = TEST_FILES[task]
    folder = adapters(2, task=task, labels=labels, max_length=64)
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / "test.tsv", header, form)
    texts = [pair if "b" in form else pair[:1] for pair in PAIRS]
    best = expected(folder, texts, 2).argmax(1).tolist()
    status, out, error = run(
        "--adapter", folder, "--data", tmp_path / "data", "--glue-submission", tmp_path / "to" / "go"
    )
    assert status == 0 and out == f"{tmp_path}/to/go/{name}.tsv: 3 predictions\n", error
    rows = (tmp_path / "to" / "go" / f"{name}.tsv").read_text().splitlines()
    assert rows == ["index\tprediction", *(f"{i}\t{labels[label]}" for i, label in enumerate(best))]


def test_mnli_has_a_file_for_each_of_its_test_files(run, adapters, tmp_path):
    labels = ["entailment", "neutral", "contradiction"]
    folder, out = adapters(3, task="mnli", labels=labels, max_length=64), tmp_path / "out"
    best = [labels[label] for label in expected(folder, PAIRS, 3).argmax(1)]
    header = "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2"
    for name in ("test_matched", "test_mismatched"):
        written(tmp_path / f"{name}.tsv", header, "{i}\t1\t1e\tfiction\t{a}\t{b}")
    assert run("--adapter", folder, "--data", tmp_path, "--glue-submission", out)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    written(tmp_path / "diagnostic.tsv", "index\tsentence1\tsentence2", "{i}\t{a}\t{b}")
    written(tmp_path / "diagnostic-full.tsv", "Premise\tHypothesis", "{a}\t{b}")
    assert run("--adapter", folder, "--data", tmp_path, "--glue-submission", out)[0] == 0
    assert run("--adapter", folder, "--data", tmp_path / "test_mismatched.tsv", "--glue-submission", out)[0] == 0
    for name in ("MNLI-m", "MNLI-mm", "AX"):
        rows = [line.split("\t") for line in (out / f"{name}.tsv").read_text().splitlines()]
        assert rows == [["index", "prediction"], *([str(i), label] for i, label in enumerate(best))]
    status, _, error = run("--adapter", folder, "--data", tmp_path / "diagnostic-full.tsv", "--glue-submission", out)
    assert status == 2 and "'Premise', 'Hypothesis'" in error


def test_scores_of_a_submission_are_clipped_to_the_range_of_stsb(run, adapters, tmp_path):
    folder = adapters(1, task="stsb", labels=[], max_length=64)
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
    written(tmp_path / "test.tsv", header, "{i}\tg\tf\t2012\t1\tn\tn\t{a}\t{b}")
    assert run("--adapter", folder, "--data", tmp_path / "test.tsv", "--glue-submission", tmp_path)[0] == 0
    rows = [line.split("\t") for line in (tmp_path / "STS-B.tsv").read_text().splitlines()[1:]]
    scores = expected(folder, PAIRS, 1)[:, 0].clamp(0, 5).tolist()
    assert [float(score) for _, score in rows] == pytest.approx(scores, abs=6e-4)
    assert not any(math.isnan(score) for score in scores)


def test_a_published_heads_order_of_classes_is_obeyed(run, adapters, tmp_path):
    folder = adapters(3)
    write_json(folder / "config.json", {"id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}})
    written(tmp_path / "test_matched.tsv", "index\tsentence1\tsentence2", "{i}\t{a}\t{b}")
    flags = ("--adapter", folder, "--task", "mnli", "--data", tmp_path / "test_matched.tsv")
    assert run(*flags, "--glue-submission", tmp_path)[0] == 0
    best = [("contradiction", "neutral", "entailment")[label] for label in expected(folder, PAIRS, 3).argmax(1)]
    assert [line.split("\t")[1] for line in (tmp_path / "MNLI-m.tsv").read_text().splitlines()[1:]] == best


def test_shards_are_found_in_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "rte[1]"
    folder.mkdir()
    shard = folder / "test-00000-of-00001.parquet"
    shard.touch()
    ((pattern, name),) = files_to_submit(folder, TASKS["rte"])
    assert name == "RTE" and shards(pattern) == [shard]


SUBMIT = ("--adapter", "mine", "--glue-submission", "out")


@pytest.mark.parametrize("flags, stdin, words", [
    ((), "", "no trained bert.pooler"),
    (("--adapter", "nowhere"), "x", "nowhere: no such folder"),
    (("--adapter", "mine"), "\n\n", "standard input: has no texts"),
    (("--adapter", "mine"), b"caf\xe9", "line 1: not valid UTF-8"),
    (("--adapter", "mine"), '{"text": 3, "x"\n', "line 1: broken JSON"),
    (("--adapter", "mine"), '{"words": "a"}\n', "line 1: has the columns 'words', not text or sentence"),
    (("--adapter", "mine"), 'x\n{"text": null}\n', "line 2: the field 'text' is NoneType"),
    (("--adapter", "mine", "--data", "file"), "", "line 3: has 1 columns, not 2"),
    (("--adapter", "mine", "--data", "missing"), "", "missing: no such file"),
    (("--adapter", "mine", "--text-field", "a", "a"), "x", "two different ones"),
    (("--adapter", "mine", "--max-length", "9999"), "x", "--max-length 9999"),
    ((*SUBMIT,), "x", "needs --data"),
    ((*SUBMIT, "--data", "file"), "", "name it with --task"),
    ((*SUBMIT, "--data", "file", "--format", "tsv"), "", "takes no --format"),
    ((*SUBMIT, "--data", "file", "--task", "rte"), "", "has 3 classes, but rte has 2 classes"),
    ((*SUBMIT, "--data", "file", "--task", "stsb"), "", "has 3 classes, but stsb has scores"),
    ((*SUBMIT, "--data", "file", "--task", "mnli"), "", "does not begin with test_matched"),
])  # fmt: skip
def test_bad_input_is_one_line(run, adapters, tmp_path, monkeypatch, flags, stdin, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").symlink_to(adapters(3, labels=["a", "b", "c"]))
    (tmp_path / "file").write_text("text\tb\nx\ty\nz\n")
    status, out, error = run(*flags, stdin=stdin)
    assert status == 2 and out == "" and len(error.splitlines()) == 1 and words in error, error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("flags, words", [
    (("--text-field", "a"), "--text-field names 1 columns, but mnli has 2 texts"),
    (("--task", "rte"), "--task rte: run.json names the task mnli: leave --task out"),
])  # fmt: skip
def test_the_task_of_a_run_decides_what_a_row_has(run, adapters, flags, words):
    folder = adapters(3, labels=["entailment", "neutral", "contradiction"], task="mnli")
    status, out, error = run("--adapter", folder, *flags, stdin='{"a": "x"}\n')
    assert status == 2 and out == "" and len(error.splitlines()) == 1 and words in error, error


def test_a_language_models_adapter_is_refused(run, tmp_path):
    llama = BUILT_IN / "llama"
    model = mb.adapt(mb.load_model(llama), rank=2)
    mb.save_adapter(model, tmp_path)
    status, _, error = run("--model", llama, "--adapter", tmp_path, stdin="x")
    assert status == 2 and "classifier" in error and len(error.splitlines()) == 1


def test_the_labels_of_a_trained_adapter_are_as_good_as_its_report_says(in_command, run, tmp_path):
    import train_nlu

    out = tmp_path / "run"
    flags = ("--device", "cpu", "--epochs", 1, "--max-steps", 12, "--max-rows", 200, "--batch-size", 8, "--out", out)
    assert in_command(train_nlu.main, *flags)[0] == 0
    rows = clean_reviews(600, seed=-1)
    status, printed, _ = run("--adapter", out, stdin="".join(f"{row.texts[0]}\n" for row in rows))
    labels = [TASK.labels.index(json.loads(line)["label"]) for line in printed.splitlines()]
    accuracy = sum(label == row.label for label, row in zip(labels, rows, strict=True)) / 600
    assert status == 0
    assert accuracy == pytest.approx(
        json.loads((out / "report.json").read_text())["after"]["clean reviews"]["accuracy"]
    )
