"""Classes as published checkpoints and files have them, to the end of a run: heads of other classes or in another
order, fine-tuned teachers, texts in unknown words, hidden labels, Parquet."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import minibalora as mb
from minibalora.checkpoints import export
from minibalora.data import labelled
from minibalora.data.glue import TASKS, LabelledText
from minibalora.data.sets import EvalSet, class_order
from minibalora.evaluation import class_scoring, classify

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_nlu  # noqa: E402

MNLI = ["entailment", "neutral", "contradiction"]
WORDS = "the a tea bed film meal was very good fine bad poor".split()
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A BERT with a head for three classes, and a tokenizer with one token per word."""
    folder = Path(shutil.copytree(GOLDEN / "bert", tmp_path_factory.mktemp("models") / "tuned"))
    vocabulary = {word: index for index, word in enumerate(["[CLS]", "[SEP]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy(tuned, tmp_path):
    """copy(name, names, order) is `tuned` with these classes, and the rows of its head in this order."""

    def make(name, names, order=(0, 1, 2)):
        folder = Path(shutil.copytree(tuned, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(names))}))
        tensors = load_file(folder / "model.safetensors")
        for key in ("classifier.weight", "classifier.bias"):
            tensors[key] = tensors[key][list(order)].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def pairs(count, labels):
    texts = [f"the {WORDS[2 + index % 4]} was {WORDS[8 + index % 4]}" for index in range(count)]
    return [
        {"sentence1": text, "sentence2": "the tea was fine", "label": labels[index % len(labels)], "idx": index}
        for index, text in enumerate(texts)
    ]


@pytest.fixture
def train(tmp_path, in_command):
    """train(name, model, task, rows, *flags) -> status, output, errors of a run into the folder `name`."""

    def run(name, model, task, rows, *flags):
        data = tmp_path / f"{name}.jsonl"
        renamed = {"sentence1": "premise", "sentence2": "hypothesis"} if task == "mnli" else {}
        rows = [{renamed.get(key, key): value for key, value in row.items()} for row in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = "--max-length 16 --batch-size 4 --max-steps 2 --device cpu".split()
        common += [] if "full" in flags else ["--rank", "2", "--init", "pissa"]
        source = ("--model", model, "--task", task, "--data", data, "--eval", data, "--out", tmp_path / name)
        return in_command(train_nlu.main, *source, *common, *flags)

    return run


def refused(outcome, *parts):
    status, _, error = outcome
    assert status == 2 and len(error.splitlines()) == 1 and all(part in error for part in parts), error


# Heads.


@pytest.mark.parametrize(("task", "labels", "classes"), [("rte", [0, 1], 2), ("stsb", [1.5, 4.0, 0.2], 1)])
def test_a_head_with_another_number_of_classes_is_replaced_and_named(
    task, labels, classes, copy, train, tmp_path, in_command
):
    """RTE and STS-B often start from a checkpoint tuned on MNLI."""
    base = copy("base", MNLI)
    status, out, _ = train("run", base, task, pairs(8, labels))
    assert status == 0 and "no classifier in the checkpoint for these classes: new, from seed 42" in out
    model = mb.load_adapter(mb.load_model(base, "classifier", classes), tmp_path / "run")
    inputs = torch.tensor([[0, 3, 5, 1]])
    with torch.no_grad():
        logits = model(inputs)
    arguments = ("--model", base, "--adapter", tmp_path / "run", "--out", tmp_path / "merged")
    assert logits.shape == (1, classes) and in_command(export.main, *arguments)[0] == 0
    with torch.no_grad():
        assert torch.allclose(
            mb.load_model(tmp_path / "merged", "classifier")(inputs), logits, atol=3e-3
        )  # in bfloat16
    names = json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]
    assert task == "stsb" or names == {"0": "entailment", "1": "not_entailment"}


def test_a_head_in_another_order_is_permuted_by_its_names(copy, train, tmp_path):
    """The run equals the run from a checkpoint in the task's order. The head is saved in the base's order."""
    rows = pairs(8, [0, 1, 2])
    for name, names, order in (
        ("ours", MNLI, (0, 1, 2)),
        ("theirs", ["CONTRADICTION", "Entailment", "neutral"], (2, 0, 1)),
        ("silent", ["LABEL_0", "LABEL_1", "LABEL_2"], (0, 1, 2)),
    ):
        status, out, error = train(f"run_{name}", copy(name, names, order), "mnli", rows)
        assert status == 0, error
        assert ("in the task's order by id2label" in out) == (name == "theirs") and "no classifier" not in out
    ours, theirs, silent = (load_file(tmp_path / f"run_{name}" / ADAPTER) for name in ("ours", "theirs", "silent"))
    heads = {key for key in ours if "classifier" in key}
    assert len(heads) == 2 and all(torch.equal(ours[key], silent[key]) for key in ours)
    assert all(torch.equal(ours[key][[2, 0, 1]] if key in heads else ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("form", ["adapter", "without run.json", "smaller adapter", "merged", "full"])
def test_all_that_is_saved_of_a_head_in_another_order_names_the_same_class(form, copy, train, tmp_path, in_command):
    """Other tools take the names from the base's config.json."""
    base = copy("base", ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], (2, 1, 0))
    run, out = tmp_path / "run", tmp_path / "out"
    flags = ["--method", "full"] if form == "full" else []
    status, _, error = train("run", base, "mnli", pairs(8, [0, 1, 2]), "--lr", "1e-9", *flags)
    assert status == 0, error
    text = pairs(1, [0])[0]
    row = {"premise": text["sentence1"], "hypothesis": text["sentence2"]}
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n")
    export_flags = ["--model", base, "--adapter", run, "--out", out]
    if form == "without run.json":
        (run / "run.json").unlink()
    elif form == "smaller adapter":
        assert in_command(export.main, *export_flags, "--adapter-rank", "1")[0] == 0
    elif form == "merged":
        assert in_command(export.main, *export_flags)[0] == 0
    source = {
        "merged": ["--model", out],
        "full": ["--model", run / "model"],
        "smaller adapter": ["--model", base, "--adapter", out],
    }.get(form, ["--model", base, "--adapter", run])
    flags = ["--data", tmp_path / "new.jsonl", "--text-field", "premise", "hypothesis", "--max-length", "16"]
    status, printed, error = in_command(classify.main, *source, *flags)
    assert status == 0, error
    found = json.loads(printed)
    tok = mb.load_tokenizer(base)
    rows, _ = labelled.encode([LabelledText((row["premise"], row["hypothesis"]), 0, 1)], tok, 16)
    logits = class_scoring.answers(mb.load_model(base, "classifier"), rows, 1, "cpu")[0]
    assert found["label"].lower() == ["contradiction", "neutral", "entailment"][int(logits.argmax())]
    assert sorted(found["probabilities"].values()) == pytest.approx(logits.softmax(0).sort().values.tolist(), abs=1e-3)


def test_label2id_alone_names_the_classes_too(copy):
    folder = copy("turned", ["entailment", "neutral", "contradiction"])
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]
    config["label2id"] = {"contradiction": 0, "entailment": 1, "neutral": 2}
    (folder / "config.json").write_text(json.dumps(config))
    assert class_order(folder, TASKS["mnli"]) == [1, 2, 0]


def test_labels_that_are_numbers_are_the_rows_of_the_checkpoints_head(copy, train):
    base = copy("base", ["World", "Sports", "Business"])
    flags = ["--text-field", "sentence1", "sentence2", "--label-field", "label"]
    status, out, error = train("run", base, "custom", pairs(9, [0, 1, 2]), *flags, "--teacher", base)
    assert status == 0, error
    assert "the checkpoint's head, where 0 is World, 1 is Sports, 2 is Business" in out and "new, from seed" not in out


def test_a_head_for_other_classes_is_replaced_and_named(copy, train):
    status, out, _ = train("run", copy("base", ["negative", "neutral", "positive"]), "mnli", pairs(8, [0, 1, 2]))
    assert status == 0 and "no classifier in the checkpoint for these classes: new" in out


def test_a_pooler_that_was_never_trained_is_trained_saved_and_named(copy, train, tmp_path):
    folder = copy("base", MNLI)
    tensors = load_file(folder / "model.safetensors")
    pooler = {name: torch.zeros_like(tensors[name]) for name in tensors if name.endswith("pooler.dense.bias")}
    save_file(tensors | pooler, folder / "model.safetensors", metadata={"format": "pt"})
    status, out, _ = train("run", folder, "rte", pairs(8, [0, 1]))
    assert status == 0 and len(pooler) == 1
    assert "bert.pooler in the checkpoint was never trained (its biases are 0): trained with the classifier" in out
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]


# Teachers.


def test_the_plan_says_on_which_share_of_the_rows_a_teacher_is_right(copy, train):
    """A teacher with meaningless names and its rows in another order has another share."""
    shares = {}
    for name, names, order in (
        ("ours", MNLI, (0, 1, 2)),
        ("theirs", ["contradiction", "entailment", "neutral"], (2, 0, 1)),
        ("silent", ["LABEL_0", "LABEL_1", "LABEL_2"], (2, 0, 1)),
    ):
        student = copy(f"student_{name}", MNLI)
        teacher = copy(name, names, order)
        status, out, error = train(f"run_{name}", student, "mnli", pairs(12, [0, 0, 0, 1, 1, 2]), "--teacher", teacher)
        assert status == 0, error
        (line,) = [line for line in out.splitlines() if "teacher" in line and "right on" in line]
        shares[name] = line.partition("right on ")[2].partition("%")[0]
    assert shares["ours"] == shares["theirs"] != shares["silent"]


def test_the_teachers_share_is_measured_on_the_training_rows(copy, train):
    model = mb.load_model(copy("model", MNLI), "classifier")
    tok, rows = mb.load_tokenizer(copy("same", MNLI)), pairs(8, [0])
    with torch.no_grad():
        ids = [tok.encode(row["sentence1"], row["sentence2"]) for row in rows]
        lengths = [(torch.arange(len(row)) > row.index(1)).long()[None] for row in ids]
        answers = [
            int(model(torch.tensor([row]), None, types).argmax()) for row, types in zip(ids, lengths, strict=True)
        ]
    rows = [row | {"label": answer} for row, answer in zip(rows, answers, strict=True)]
    others = [row | {"label": label} for row in rows[:2] for label in range(3)]  # each right once in three
    _, out, error = train("run", copy("student", MNLI), "mnli", rows + others, "--teacher", copy("teacher", MNLI))
    assert f"right on {10 / 14:.1%} of the training rows" in out, error


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["negative", "neutral", "positive"], ["names other classes (id2label) than mnli"]),
        (["entailment", "neutral", "LABEL_2"], []),
        (["entailment", "contradiction", "LABEL_2"], ["names other classes"]),
    ],
)
def test_a_teacher_whose_classes_cannot_be_matched_is_refused(names, parts, copy, train):
    teacher = copy("teacher", names)
    outcome = train("run", copy("base", MNLI), "mnli", pairs(8, [0, 1, 2]), "--teacher", teacher)
    assert outcome[0] == 0 if not parts else refused(outcome, "--teacher", *parts) is None


def test_a_teacher_of_another_number_of_classes_is_refused(copy, train):
    outcome = train("run", copy("base", MNLI), "rte", pairs(8, [0, 1]), "--teacher", copy("teacher", MNLI))
    refused(outcome, "--teacher", "has 3 classes, but rte has 2")


# Words and rows.


@pytest.mark.parametrize(("words", "told"), [(0, ""), (1, "20% of the tokens are unknown"), (5, "")])
def test_unknown_words_are_reported_or_refused(words, told, copy, train):
    known = "the tea was very good".split()
    text = " ".join(["nevermore"] * words + known[words:])
    rows = [{"sentence1": text, "sentence2": text, "label": index % 2} for index in range(6)]
    outcome = train("run", copy("base", MNLI), "rte", rows)
    if words == 5:
        refused(outcome, "run.jsonl", "100% of the tokens are unknown to the tokenizer in", "base")
    else:
        assert outcome[0] == 0 and ("tokens are unknown" in outcome[1]) == (words > 0) and told in outcome[1]


def test_hidden_labels_are_counted_in_training_and_evaluation_sets(copy, train):
    rows = [*pairs(8, [0, 1]), *pairs(3, [-1])]
    status, out, _ = train("run", copy("base", MNLI), "rte", rows)
    assert status == 0 and "8 rows: 4 of class entailment" in out and "3 rows without a label" in out
    assert "measured on run.jsonl, 8 rows, 3 without a label left out" in out
    refused(
        train("test", copy("other", MNLI), "rte", pairs(3, [-1])), "test.jsonl", "no rows with a label", "3 without"
    )


def test_texts_that_are_cut_are_counted_in_evaluation_sets(copy):
    texts = [LabelledText((" ".join(["tea"] * words), "good"), 0, words) for words in (3, 12, 13, 14)]
    eval_set = EvalSet("dev.tsv", texts, False).encoded(mb.load_tokenizer(copy("base", MNLI)), 16)
    assert eval_set.in_words() == "dev.tsv, 4 rows, 2 of them cut"  # 3 special tokens and the second text have 4


def test_glue_s_parquet_folder_is_trained_on_and_named(copy, tmp_path, in_command):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "glue" / "rte"
    folder.mkdir(parents=True)
    for name, count in (("train-00000-of-00001", 8), ("validation-00000-of-00001", 4), ("test-00000-of-00001", 2)):
        parquet.write_table(pyarrow.Table.from_pylist(pairs(count, [0, 1])), folder / f"{name}.parquet")
    common = "--max-length 16 --batch-size 4 --max-steps 1 --rank 2 --init pissa --device cpu".split()
    source = ("--model", copy("base", MNLI), "--task", "rte", "--data", tmp_path / "glue", "--out", tmp_path / "run")
    status, out, error = in_command(train_nlu.main, *source, *common)
    assert status == 0, error
    assert "8 rows: 4 of class entailment, 4 of class not_entailment" in out
    assert "measured on validation-*.parquet, 4 rows" in out
