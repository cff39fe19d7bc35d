"""Labelled texts: every task's files with their quirks, every broken file, noise and imbalance."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibalora.data.glue import (
    TASKS,
    LabelledText,
    check_classes,
    custom_task,
    fold,
    glue_files,
    read_labelled,
    with_imbalance,
    with_label_noise,
)
from minibalora.evaluation import metrics

MNLI_HEADER = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label"
)
# A file of each task as GLUE hands it out, and the texts and label of its rows.
GLUE_FILES = {
    "cola": (
        "gj04\t1\t\tThey drank the pub dry.\ngj04\t0\t*\tThey drank the pub.\n",
        [(("They drank the pub dry.",), 1), (("They drank the pub.",), 0)],
    ),
    "sst2": (
        "sentence\tlabel\nhide new secretions \t0\nthat 's \"good\t1\n",
        [(("hide new secretions ",), 0), (("that 's \"good",), 1)],
    ),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t70\t71\t"A," he said\tB\r\n0\t8\t9\tC\tD "\r\n',
        [(('"A," he said', "B"), 1), (("C", 'D "'), 0)],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
        "1\tmain-captions\tMSRvid\t2012test\t0004\tnone\tnone\tA man.\t\t3\n",
        [(("A plane.", "An air plane."), 5.0), (("A man.", ""), 3.0)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n1\t3\t4\tWhat?\tWhat is?\t1\n",
        [(("Why?", "How?"), 0), (("What?", "What is?"), 1)],
    ),
    "mnli": (
        "\n".join(
            ["\t".join(MNLI_HEADER.split())]
            + [
                f"{n}\t1\t1n\tfiction\t( a\t( b\t(ROOT\t(ROOT\tA.\tB{n}.\tneutral\t{label}"
                for n, label in enumerate(("entailment", "neutral", "contradiction"))
            ]
        ),
        [(("A.", f"B{n}."), n) for n in range(3)],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tWho?\tIt.\tnot_entailment\n",
        [(("Who?", "He."), 0), (("Who?", "It."), 1)],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
        [(("A.", "B."), 1), (("C.", "D."), 0)],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n1\tC.\tD.\t0\n",
        [(("A.", "B."), 1), (("C.", "D."), 0)],
    ),
}
HANS = "gold_label\tsentence1_binary_parse\tsentence1\tsentence2\tpairID\n"


@pytest.fixture
def write(tmp_path):
    """write(content) is a file with this content, str or bytes."""

    def file(content, name="data"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return file


def rows(examples):
    return [(example.texts, example.label) for example in examples]


def json_lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def labelled(*labels):
    return [LabelledText((f"text {line}",), label, line) for line, label in enumerate(labels, start=1)]


# Files of GLUE.


def test_every_task_has_a_file_here_and_metrics_that_exist():
    assert GLUE_FILES.keys() == TASKS.keys()
    for task in TASKS.values():
        assert all(callable(getattr(metrics, name)) for name in task.metrics)
        assert task.labels is None or set(task.spellings.values()) == set(range(len(task.labels)))


@pytest.mark.parametrize("name", TASKS)
def test_glue_s_own_files_are_read(write, name):
    content, expected = GLUE_FILES[name]
    examples, skipped, folded = read_labelled(write(content), TASKS[name])
    assert rows(examples) == expected and (skipped, folded) == (0, False)
    first = 1 if name == "cola" else 2  # CoLA has no header
    assert [example.line for example in examples] == list(range(first, first + len(expected)))
    assert all(type(example.label) is (float if name == "stsb" else int) for example in examples)


@pytest.mark.parametrize("name", TASKS)
def test_line_ends_a_bom_and_empty_lines_change_nothing(write, name):
    content = GLUE_FILES[name][0].removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\n")
    expected = read_labelled(write(content), TASKS[name])
    for variant in (content + "\n", content.replace("\n", "\r\n") + "\r\n\r\n\n", "\ufeff" + content):
        assert read_labelled(write(variant), TASKS[name]) == expected


def test_only_a_newline_ends_a_row_and_quotes_are_text(write):
    text = 'a\u2028b\u2029c\x85d\x0b\x0ce\rf "" \' \\t #'
    examples, _, _ = read_labelled(write(f"sentence\tlabel\n{text}\t1\n\t0\n"), TASKS["sst2"])
    assert rows(examples) == [((text,), 1), (("",), 0)]


def test_rows_on_which_annotators_disagreed_are_counted(write):
    lines = GLUE_FILES["mnli"][0].split("\n")
    lines.insert(2, lines[2].rpartition("\t")[0] + "\t-")
    examples, skipped, _ = read_labelled(write("\n".join(lines)), TASKS["mnli"])
    assert rows(examples) == GLUE_FILES["mnli"][1] and skipped == 1
    assert [example.line for example in examples] == [2, 4, 5]


def test_broken_rows_are_counted_in_qqp_only(write, refuses):
    content = GLUE_FILES["qqp"][0] + "2\t5\t6\tbroken\nhere\t\t1\n3\t7\t8\ta\tb\t1\n"
    examples, skipped, _ = read_labelled(write(content), TASKS["qqp"])
    assert len(examples) == 3 and skipped == 2
    for name in TASKS.keys() - {"qqp"}:
        path = write(GLUE_FILES[name][0].rstrip("\n") + "\nbroken\n")
        last = len(GLUE_FILES[name][1]) + (name != "cola") + 1
        refuses(lambda path=path, name=name: read_labelled(path, TASKS[name]), path, f"line {last}:", "has 1 columns")


# The same data elsewhere.


@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("cola", {"sentence": "s", "label": 1, "idx": 0}, (("s",), 1)),
        ("sst2", {"text": "s", "label": "positive"}, (("s",), 1)),
        ("sst2", {"sentence": "s", "label": "0"}, (("s",), 0)),
        ("mrpc", {"sentence1": "a", "sentence2": "b", "label": 0}, (("a", "b"), 0)),
        ("qqp", {"question1": "a", "question2": "b", "label": 1}, (("a", "b"), 1)),
        ("qqp", {"id": 1, "sentence1": "a", "sentence2": "b", "label": 1}, (("a", "b"), 1)),  # PAWS
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 4}, (("a", "b"), 4.0)),
        ("stsb", {"sentence1": "a", "sentence2": "b", "score": "2.5"}, (("a", "b"), 2.5)),
        ("mnli", {"premise": "a", "hypothesis": "b", "label": 2}, (("a", "b"), 2)),
        ("mnli", {"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}, (("a", "b"), 1)),
        ("qnli", {"question": "a", "sentence": "b", "label": 1}, (("a", "b"), 1)),
        ("rte", {"premise": "a", "hypothesis": "b", "label": "not_entailment"}, (("a", "b"), 1)),
        ("rte", {"gold_label": "non-entailment", "sentence1": "a", "sentence2": "b"}, (("a", "b"), 1)),
        ("wnli", {"sentence1": "a\n", "sentence2": "ü\u2028", "label": 0}, (("a\n", "ü\u2028"), 0)),
    ],
)
def test_json_with_other_names_is_read(write, name, row, expected):
    for content in (json_lines(row, row), json.dumps([row, row], indent=1), "\ufeff" + json_lines(row) * 2):
        examples, skipped, folded = read_labelled(write(content), TASKS[name])
        assert rows(examples) == [expected, expected] and (skipped, folded) == (0, False)


def test_a_file_without_gold_labels_for_some_rows(write):
    row = {"premise": "a", "hypothesis": "b", "label": -1}  # SNLI on Hugging Face
    assert read_labelled(write(json_lines(row, row | {"label": 0})), TASKS["mnli"])[1] == 1


def test_a_header_and_a_column_order_of_its_own(write):
    examples, _, _ = read_labelled(write("label\tidx\ttext\nnegative\t1\tbad\n1\t2\tgood\t\t\n"), TASKS["sst2"])
    assert rows(examples) == [(("bad",), 0), (("good",), 1)]
    examples, _, _ = read_labelled(write("sentence\tlabel\tmore\ns\t1\n"), TASKS["sst2"])  # all that is needed
    assert rows(examples) == [(("s",), 1)]
    examples, _, _ = read_labelled(write("a\tsentence\tb\tlabel\nx\ts\ty\t1\n"), TASKS["cola"])
    assert rows(examples) == [(("s",), 1)]


@pytest.mark.parametrize("spelling", ["non-entailment", "not_entailment"])
def test_hans_is_folded_for_mnli_and_plain_for_rte(write, spelling):
    path = write(HANS + f"{spelling}\t( a\tA.\tB.\tex0\nentailment\t( a\tC.\tD.\tex1\n")
    expected = [(("A.", "B."), 1), (("C.", "D."), 0)]
    for name, folds in (("mnli", True), ("rte", False)):
        examples, skipped, folded = read_labelled(path, TASKS[name])
        assert rows(examples) == expected and (skipped, folded) == (0, folds)
    assert fold([0, 1, 2, 0]) == [0, 1, 1, 0]


@pytest.mark.parametrize("exact", ["neutral", "contradiction"])
@pytest.mark.parametrize("order", [1, -1])
def test_folded_and_exact_labels_do_not_mix(write, refuses, exact, order):
    labels = [exact, "entailment", "non-entailment"][::order]
    path = write(HANS + "".join(f"{label}\t( a\tA.\tB.\tex0\n" for label in labels))
    refuses(lambda: read_labelled(path, TASKS["mnli"]), path, "line 4", "'non-entailment'")


# Labels as other programs write them.


def test_snli_rows_of_five_annotators_have_their_label_last(write, refuses):
    """In GLUE's SNLI, the header names one annotator's label, followed by gold_label."""
    start = "0\tc\tp\t( a\t( b\t(ROOT\t(ROOT\tA.\tB.\t"
    header = MNLI_HEADER.replace("promptID pairID genre", "captionID pairID").replace(" ", "\t")
    labels = ["neutral\tentailment", "neutral\tneutral\t-\tneutral\tentailment\tcontradiction"]
    path = write(header + "\n" + "".join(f"{start}{label}\n" for label in labels))
    assert [example.label for example in read_labelled(path, TASKS["mnli"])[0]] == [0, 2]
    path = write(header + "\n" + f"{start}neutral\tneutral\n{start}a tab\tin the text\tneutral\n")
    refuses(lambda: read_labelled(path, TASKS["mnli"]), path, "line 3", "has 12 columns, not 11")


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"stsb"}))
def test_integer_labels_are_the_classes_in_tsv_as_in_json(write, name):
    *texts, label = next(columns for columns in TASKS[name].columns if columns[-1] == "label")
    classes = range(len(TASKS[name].labels))
    header = "\t".join([*texts, label, "idx"])
    tsv = write(header + "\n" + "".join("\t".join(["a"] * len(texts) + [str(k), "7"]) + "\n" for k in classes))
    assert [example.label for example in read_labelled(tsv, TASKS[name])[0]] == list(classes)
    path = write(json_lines(*(dict.fromkeys(texts, "a") | {label: k} for k in classes)), "data.jsonl")
    assert [example.label for example in read_labelled(path, TASKS[name])[0]] == list(classes)


@pytest.mark.parametrize("name", TASKS)
def test_hidden_labels_are_left_out_and_counted_in_every_task(write, refuses, name):
    columns = TASKS[name].columns[-1]
    right = "1.5" if name == "stsb" else "1"
    for hidden in ("-1", "-1.0", "-1.000") if name == "stsb" else ("-1", "-"):
        lines = ["\t".join(columns), *("\t".join(["a"] * (len(columns) - 1) + [label]) for label in (right, hidden))]
        examples, skipped, _ = read_labelled(write("\n".join(lines)), TASKS[name])
        assert (len(examples), skipped) == (1, 1)
        path = write("\n".join([lines[0], lines[2]]))
        refuses(lambda path=path: read_labelled(path, TASKS[name]), path, "no rows with a label", "1 without", name)
    for hidden in (-1, -1.0):
        row = dict.fromkeys(columns[:-1], "a")
        rows = [row | {columns[-1]: float(right) if name == "stsb" else 1}, row | {columns[-1]: hidden}]
        assert read_labelled(write(json_lines(*rows)), TASKS[name])[1] == 1


def test_minus_one_may_be_a_custom_class(write):
    task = custom_task(write("t\ty\na\t-1\nb\t0\nc\t1\n"), ["t"], "y")
    assert task.labels == ("-1", "0", "1")
    assert [example.label for example in read_labelled(write("t\ty\na\t-1\n"), task)[0]] == [0]
    task = custom_task(write("t\ty\nb\t0\nc\t1\n"), ["t"], "y")
    assert read_labelled(write("t\ty\na\t-1\nb\t1\n"), task)[1] == 1


@pytest.mark.parametrize(
    ("name", "row", "label"),
    [
        ("mnli", {"uid": "x", "context": "a", "hypothesis": "b", "label": "c", "reason": "r"}, 2),  # ANLI, as published
        ("mnli", {"uid": "x", "premise": "a", "hypothesis": "b", "label": 1, "reason": ""}, 1),  # and on the Hub
        ("cola", {"sentence": "a", "label": "unacceptable"}, 0),
        ("sst2", {"text": "a", "label": "neg"}, 0),
        ("mrpc", {"sentence1": "a", "sentence2": "b", "label": "equivalent"}, 1),
        ("qqp", {"question1": "a", "question2": "b", "label": "not_duplicate"}, 0),
        ("wnli", {"sentence1": "a", "sentence2": "b", "label": "entailment"}, 1),
        ("sst2", {"sentence": None, "text": 5, "label": 1, "other": None}, 1),  # of concatenated sets
    ],
)
def test_other_published_labels_are_read(write, name, row, label):
    (example,), skipped, _ = read_labelled(write(json_lines(row)), TASKS[name])
    assert (example.label, skipped) == (label, 0)
    assert name != "sst2" or example.texts in (("a",), ("5",))


@pytest.mark.parametrize("labels", [["0.5", "3"], ["1.0", "0.0"], ["2.5e-1", ".5"]])
def test_scores_in_a_custom_task_are_refused_in_tsv_as_in_json(write, refuses, labels):
    tsv = write("t\ty\n" + "".join(f"a\t{label}\n" for label in labels))
    refuses(lambda: custom_task(tsv, ["t"], "y"), tsv, "'y'", "fraction", "scores", "--task stsb")
    path = write(json_lines(*({"t": "a", "y": float(label)} for label in labels)), "data.jsonl")
    refuses(lambda: custom_task(path, ["t"], "y"), path, "line 1", "float", "--task stsb")


@pytest.mark.parametrize("label", [1.0, "1.0"])
def test_a_class_may_be_written_as_a_whole_float(write, label):
    """As pandas writes it if its column had an empty cell."""
    contents = json_lines({"sentence": "a", "label": label}), f"sentence\tlabel\na\t{label}\n"
    for content in contents:
        assert rows(read_labelled(write(content), TASKS["sst2"])[0]) == [(("a",), 1)]


# Custom data.


@pytest.mark.parametrize(
    "values, names",
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([10, 9, 9], ("9", "10")),
        ([3, "3", "1"], ("1", "3")),
        ([True, False], ("False", "True")),
    ],
)
def test_custom_classes_are_the_labels_in_order(write, values, names):
    path = write(json_lines(*({"t": "x", "y": value} for value in values)))
    task = custom_task(path, ["t"], "y")
    assert (task.name, task.labels, task.metrics) == ("custom", names, ("accuracy",))
    examples, _, _ = read_labelled(path, task)
    assert [task.labels[example.label] for example in examples] == list(map(str, values))
    if all(isinstance(value, str) for value in values):
        assert custom_task(write("y\tt\n" + "".join(f"{value}\tx\n" for value in values)), ["t"], "y") == task


def test_custom_pairs_and_a_dev_file_with_fewer_classes(write):
    task = custom_task(write("a\tb\tc\n1\tx\tp\n2\ty\tq\n"), ["c", "a"], "b")
    assert rows(read_labelled(write("b\tc\ta\ny\tp\tq\n"), task)[0]) == [(("p", "q"), 1)]


@pytest.mark.parametrize(
    "content, parts",
    [
        ("t\ty\na\tx\nb\tx\n", ["'y'", "1 different"]),
        ("t\ty\n", ["'y'", "0 different"]),
        ("t\ty\na\tpos\nb\tneg\nc\tpos \n", ["'pos'", "'pos '", "spaces"]),
        ('{"t": "a", "y": true}\n{"t": "a", "y": "true"}\n{"t": "a", "y": "no"}', ["'True'", "'true'", "case"]),
        ("t\ty\na\tcaf\u00e9\nb\tcafe\u0301\n", ["caf", "Unicode"]),
        ("t\ty\ty\na\tx\tz\n", ["line 1", "two columns 'y'"]),
        ("t\tz\na\tx\n", ["line 1", "'t', 'z'", "custom's t, y", "test file"]),
        ('{"t": "a", "y": 1.5}', ["line 1", "1.5", "float", "stsb"]),
        ('{"t": "a", "y": "x"}\n{"t": "a", "y": [1, 0]}', ["line 2", "[1, 0]", "list"]),
        ('{"t": "a", "y": "x"}\n{"t": "a", "y": null}', ["line 2", "None"]),
        ("t\ty\na\t2.5\nb\t4\nc\t.5\n", ["'y'", "fraction (.5)", "scores", "stsb"]),
    ],
)
def test_custom_data_without_classes_is_refused(write, refuses, content, parts):
    path = write(content)
    refuses(lambda: custom_task(path, ["t"], "y"), path, *parts)


@pytest.mark.parametrize("fields", [(["y"], "y"), (["t", "t"], "y")])
def test_a_field_that_is_named_twice_is_refused(write, refuses, fields):
    refuses(lambda: custom_task(write("t\ty\na\tx\nb\tz\n"), *fields), "--text-field", fields[0][0], "twice")


@pytest.mark.parametrize("label", ["", 1.5, None, ["a"], "other", True, 0])
def test_an_invalid_custom_class_is_refused_with_its_line(write, refuses, label):
    path = write(json_lines({"t": "x", "y": "a\n"}, {"t": "x", "y": "b"}, {"t": "x", "y": label}))
    task = replace(
        TASKS["sst2"], name="custom", columns=(("t", "y"),), labels=("a\n", "b"), spellings={"a\n": 0, "b": 1}
    )
    refuses(lambda: read_labelled(path, task), path, "line 3", "'a\\n', 'b'")
    if label in ("", None):
        refuses(lambda: read_labelled(path, custom_task(path, ["t"], "y")), path, "line 3")


# Bad files.

SST2, MRPC = "sentence\tlabel\n", '{"sentence1": "a", "sentence2": "b", "label": 1}\n'


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("sst2", "", ["no rows", "sst2"]),
        ("sst2", "\n\r\n", ["no rows"]),
        ("sst2", "[]", ["no rows"]),
        ("sst2", SST2, ["no rows"]),
        ("sst2", SST2 + "a\t1\nb\n", ["line 3", "has 1 columns, not 2"]),
        ("sst2", SST2 + "a\t1\n\nb\t2\n", ["line 4", "'2'", "sst2's '0', '1', 'negative', 'neg', 'positive'"]),
        ("sst2", SST2 + "a\t\n", ["line 2", "the label ''"]),
        ("sst2", SST2 + f"a\t{'x' * 500}\u2028\n", ["line 2", "xxx...xxx"]),
        ("cola", "gj04\t1\t\tx\ngj04\t*\t\tx\n", ["line 2", "'*'", "'0', '1'"]),
        ("cola", "gj04\t*\t\tx\n", ["line 1", "'*'", "'0', '1'"]),
        ("cola", "gj04\t1\tx\n", ["line 1", "'gj04', '1', 'x'", "without a header, source, label"]),
        ("cola", "index\tsentence\n0\tx\n", ["line 1", "test file"]),
        (
            "rte",
            GLUE_FILES["wnli"][0].replace("1\n", "2\n"),
            ["line 2", "'2'", "'entailment', 'not_entailment', 'non-"],
        ),
        ("sst2", SST2 + "a\t1\tb\n", ["line 2", "has 3 columns, not 2"]),
        ("mnli", MNLI_HEADER.replace(" ", "\t").replace("\tgold_label", ""), ["line 1", "test file"]),
        ("mnli", '{"premise": "a", "hypothesis": "b", "label": -1}', ["no rows with a label"]),
        ("mrpc", MRPC + '{"sentence1": "a", "sentence2": "b"}', ["line 2", "test file"]),
        ("mrpc", MRPC + '{"sentence1": "a", "label": 1}', ["line 2", "'sentence1', 'label'", "sentence1, sentence2"]),
        ("mrpc", MRPC + "{}", ["line 2", "none"]),
        ("mrpc", MRPC + "5", ["line 2", "int"]),
        ("mrpc", MRPC.replace('"a"', "null"), ["line 1", "NoneType"]),
        ("mrpc", MRPC.replace('"a"', '"\\ud800"'), ["line 1", "half of a character"]),
        ("mrpc", MRPC.replace("1}", "true}"), ["line 1", "True"]),
        ("mrpc", MRPC.replace("1}", "1.5}"), ["line 1", "1.5"]),
        ("mrpc", MRPC.replace("1}", "null}"), ["line 1", "None"]),
        ("mrpc", MRPC.replace("1}", '["1"]}'), ["line 1", "['1']"]),
        ("mrpc", MRPC + "{", ["line 2", "broken JSON"]),
        ("mrpc", b"[\xff]", ["line 1", "UTF-8"]),
        ("sst2", SST2.encode() + b"a\t1\n\xff\t1\n", ["line 3", "UTF-8"]),
        ("sst2", SST2.encode("utf-16"), ["line 1", "UTF-8"]),
        ("sst2", "sentence,label\na,1\n", ["line 1", "'sentence,label'", "tabs"]),
        ("sst2", "\u2028a\nb\t1\n", ["line 1", "\\u2028a"]),
    ],
)
def test_a_bad_file_is_refused_with_its_line(write, refuses, name, content, parts):
    path = write(content)
    refuses(lambda: read_labelled(path, TASKS[name]), path, *parts)


@pytest.mark.parametrize("name, other", [(a, b) for a in TASKS for b in TASKS if a != b])
def test_another_task_s_file_is_named_or_refused_for_its_labels(write, refuses, name, other):
    path = write(GLUE_FILES[other][0])
    alike = [
        ("rte", "wnli"),
        ("wnli", "rte"),
        ("mrpc", "wnli"),
        ("qqp", "wnli"),
        ("stsb", "wnli"),
        ("cola", "sst2"),
    ]  # nothing tells these apart
    if (name, other) not in alike:
        part = "none of" if (name, other) in [("rte", "mnli")] else ""
        refuses(lambda: read_labelled(path, TASKS[name]), path, "line", part)


@pytest.mark.parametrize(
    "name, other, named",
    [
        ("cola", "mrpc", "mrpc"),
        ("sst2", "mnli", "mnli"),
        ("mnli", "qnli", "qnli"),
        ("qnli", "rte", "rte or wnli"),
        ("rte", "stsb", "stsb"),
        ("stsb", "qqp", "qqp"),
    ],
)
def test_the_other_task_is_named(write, refuses, name, other, named):
    path = write(GLUE_FILES[other][0])
    refuses(lambda: read_labelled(path, TASKS[name]), path, "line 1", "not " + name, f"those of {named}")


@pytest.mark.parametrize("score", ["nan", "inf", "", "high", "1e999"])
def test_a_score_is_a_finite_number(write, refuses, score):
    path = write(f"sentence1\tsentence2\tscore\na\tb\t1\na\tb\t{score}\n")
    refuses(lambda: read_labelled(path, TASKS["stsb"]), path, "line 3", score, "not a finite number")


@pytest.mark.parametrize("score", ["NaN", "true", "null", "[1]", "9" * 400])
def test_a_score_in_json_is_a_finite_number(write, refuses, score):
    path = write(f'{{"sentence1": "a", "sentence2": "b", "score": {score}}}')
    refuses(lambda: read_labelled(path, TASKS["stsb"]), path, "line 1", "not a finite number")


def test_a_path_that_is_not_a_file_is_refused(tmp_path, refuses):
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300)):
        refuses(lambda path=path: read_labelled(path, TASKS["rte"]), path, "JSON Lines, Parquet or TSV")


# Folders.


def test_a_glue_folder_has_a_training_file_and_dev_files(tmp_path, refuses):
    refuses(lambda: glue_files(tmp_path / "absent", TASKS["rte"]), tmp_path / "absent", "no such folder")
    refuses(lambda: glue_files(tmp_path, TASKS["rte"]), tmp_path / "train.tsv", "[]")
    (tmp_path / "train.tsv").touch()
    refuses(lambda: glue_files(tmp_path, TASKS["rte"]), tmp_path / "dev.tsv", "'train.tsv'", "rte")
    (tmp_path / "dev.tsv").touch()
    assert glue_files(str(tmp_path), TASKS["rte"]) == (tmp_path / "train.tsv", [tmp_path / "dev.tsv"])
    refuses(lambda: glue_files(tmp_path, TASKS["mnli"]), tmp_path / "dev_matched.tsv", "'dev.tsv'")
    (tmp_path / "dev_matched.tsv").touch(), (tmp_path / "dev_mismatched.tsv").touch()
    dev = [tmp_path / "dev_matched.tsv", tmp_path / "dev_mismatched.tsv"]
    assert glue_files(tmp_path, TASKS["mnli"]) == (tmp_path / "train.tsv", dev)


# Changes to a training set.


def test_a_class_without_a_row_is_refused(refuses):
    check_classes(labelled(2, 0, 1), TASKS["mnli"], "here")
    check_classes(labelled(0.5), TASKS["stsb"], "here")
    refuses(lambda: check_classes(labelled(0, 1, 0), TASKS["mnli"], "here"), "here", "'contradiction'")


@given(st.integers(2, 5).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k - 1), max_size=40))),
       st.floats(0, 1, allow_subnormal=False), st.integers(0, 2**62))  # fmt: skip
def test_label_noise_changes_exactly_its_share_to_another_class(classes_and_labels, share, seed):
    classes, labels = classes_and_labels
    examples = labelled(*labels)
    noisy = with_label_noise(examples, share, classes, seed)
    assert sum(a.label != b.label for a, b in zip(examples, noisy, strict=True)) == round(share * len(examples))
    assert all(0 <= example.label < classes and type(example.label) is int for example in noisy)
    assert [replace(example, label=0) for example in noisy] == [replace(example, label=0) for example in examples]
    assert with_label_noise(examples, share, classes, seed) == noisy and examples == labelled(*labels)


def test_label_noise_is_uniform_over_other_classes_and_depends_on_the_seed():
    examples = labelled(*[1] * 3000)
    counts = Counter(example.label for example in with_label_noise(examples, 1, 4, 0))
    assert counts.keys() == {0, 2, 3}
    assert all(abs(count - 1000) < 130 for count in counts.values())  # five standard deviations
    changed = {
        tuple(example.line for example in with_label_noise(examples, 0.1, 4, seed) if example.label != 1)
        for seed in range(3)
    }
    assert len(changed) == 3


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(1, 8), st.integers(0, 2**62))
def test_imbalance_keeps_the_largest_class_and_cuts_the_others(labels, ratio, seed):
    examples, before = labelled(*labels), Counter(labels)
    largest = max(sorted(before), key=before.get)
    most = round(before[largest] / ratio)
    if most == 0 and len(before) > 1:
        return
    kept = with_imbalance(examples, ratio, seed)
    after = Counter(example.label for example in kept)
    assert after == {k: n if k == largest else min(n, most) for k, n in before.items()}
    assert set(kept) <= set(examples) and [e.line for e in kept] == sorted(e.line for e in kept)
    assert with_imbalance(examples, ratio, seed) == kept


def test_imbalance_draws_by_the_seed():
    examples = labelled(*[0, 1] * 100)
    assert len({tuple(with_imbalance(examples, 10, seed)) for seed in range(3)}) == 3
    assert with_imbalance(examples, 1, 0) == examples


def test_an_imbalance_that_leaves_a_class_empty_is_refused(refuses):
    refuses(lambda: with_imbalance(labelled(0, 0, 0, 1), 7, 0), "imbalance of 7", "3 rows", "at most 3")
    assert len(with_imbalance(labelled(0, 0, 0, 1), 3, 0)) == 4
    assert len(with_imbalance(labelled(0, 0), 50, 0)) == 2


def test_hans_has_integers_of_its_own(write):
    rows = [{"premise": "A.", "hypothesis": "B.", "label": label, "heuristic": "lexical"} for label in (0, 1)]
    examples, _, is_folded = read_labelled(write("".join(json.dumps(row) + "\n" for row in rows)), TASKS["mnli"])
    assert [example.label for example in examples] == [0, 1] and is_folded
