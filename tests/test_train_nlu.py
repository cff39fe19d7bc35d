"""The classification script as a user runs it, its errors, and the properties of its step."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GOLDEN, headless, kill_before, status_of, stop_within
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import minibalora as mb
from minibalora.data import labelled
from minibalora.data.batches import micro_batches
from minibalora.data.glue import TASKS, read_labelled
from minibalora.data.labelled import ClassRow
from minibalora.evaluation import class_scoring
from minibalora.objective import NLU_RECIPES, entropy_share, lambdas, nlu_loss
from minibalora.run import checkpoint

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_nlu.py"
sys.path.insert(0, str(ROOT))
import train_nlu  # noqa: E402

ADAPTER = "adapter_model.safetensors"
FILES = {"adapter_config.json", ADAPTER, "log.jsonl", "run.json", "report.json", "checkpoint"}
STATE = {"initial.safetensors", "state.safetensors", "best.safetensors"}
LOG_KEYS = "step loss task consistency diversity svd non_target_kl lr tokens_per_s memory_bytes".split()
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = "the a was very film meal bed tea good fine great bad poor awful not and".split()
STEPS = 12  # an epoch of `data` in batches of 4


# Models, data and commands


def write_tokenizer(folder: Path, is_encoder: bool = True, shift: int = 0) -> Path:
    """tokenizer.json, a token a word; `shift` moves the words' ids, as in another family's vocabulary."""
    words = SPECIALS + WORDS[shift:] + WORDS[:shift]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(SPECIALS)
    if is_encoder:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    backend.save(str(folder / "tokenizer.json"))
    return folder


def base_model(name: str, folder: Path, **config) -> Path:
    """Return a golden checkpoint without its head, with a tokenizer. config: changes to config.json."""
    write_tokenizer(headless(name, folder), is_encoder=name not in ("gpt2_classifier", "llama_classifier"))
    return configure(folder, **config)


def configure(folder: Path, **config) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def reviews(count: int, seed: int) -> list[tuple[str, int]]:
    """Return texts of 3 to 9 words; the adjective decides the class."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        adjectives = (WORDS[11:14], WORDS[8:11])[index % 2]
        text = ["the", rng.choice(WORDS[4:8]), "was", *["very"] * int(rng.integers(0, 5)), rng.choice(adjectives)]
        rows.append((" ".join(text[-9:]), index % 2))
    return rows


def write_sst2(path: Path, rows: list[tuple[str, int]]) -> str:
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return str(path)


def write_json_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """The golden config has a dropout of 0.1."""
    return base_model("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder as GLUE distributes it, with 46 training rows, so that the last step of an epoch has 2."""
    folder = tmp_path_factory.mktemp("sst2")
    write_sst2(folder / "train.tsv", reviews(46, seed=0))
    write_sst2(folder / "dev.tsv", reviews(10, seed=1))
    return folder


def flags_of(model: Path, data: object, out: Path, *flags: str, task: str = "sst2") -> list[str]:
    common = ["--max-length", "16", "--batch-size", "4", "--lr", "1e-2", "--epochs", "1", "--device", "cpu"]
    return ["--model", str(model), "--data", str(data), "--task", task, "--out", str(out), *common, *flags]


@pytest.fixture
def train(in_command):
    """train(flags) -> status, standard output, standard error of train_nlu.py, run in this process."""
    return lambda flags: in_command(train_nlu.main, *flags)


def entries_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out: Path) -> list[dict]:
    timed = ("tokens_per_s", "memory_bytes")
    return [{key: value for key, value in entry.items() if key not in timed} for entry in entries_of(out)]


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def result_of(out: Path) -> bytes:
    """Return the bytes of a run's adapter, or of the model with --method full."""
    return next(path for path in (out / ADAPTER, out / "model" / "model.safetensors") if path.exists()).read_bytes()


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# The step


def random_rows(count: int, seed: int) -> list[ClassRow]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 14, count)
    return [
        ClassRow(rng.integers(0, 61, n).astype(np.int32), np.zeros(n, np.int32), int(rng.integers(3)), index, index)
        for index, n in enumerate(lengths)
    ]


def trained_bert(dtype: torch.dtype = torch.float32):
    """Without dropout, which would differ between cuts of the step."""
    model = mb.adapt(mb.load_model(GOLDEN / "bert", head="classifier", dtype=dtype), rank=3)
    with torch.no_grad():
        for _, layer in mb.lowrank.adapted_layers(model):
            layer.B += 0.1 * torch.randn_like(layer.B)
        model.classifier.weight += 0.1 * torch.randn_like(model.classifier.weight)
    return model


def gradients_of_a_step(model, rows, size, objective):
    with mb.pretrained(model):
        teacher = class_scoring.answers(model, rows, 4, "cpu")
    model.zero_grad()
    unsure = float(entropy_share(teacher, objective.temperature).mean()) if objective.adaptive_lambda1 else None
    weights, total, sums = lambdas(objective, 5, 10, unsure), 0.0, {}
    for part in micro_batches(rows, size):
        inputs, labels = labelled.padded(part, model, "cpu")
        loss, terms = nlu_loss(model(*inputs), teacher[[row.index for row in part]], labels, objective, weights)
        share = len(part) / len(rows)
        (share * loss).backward()
        total += share * loss.item()
        sums = {name: sums.get(name, 0.0) + share * term.item() for name, term in terms.items()}
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return gradient, total, sums


@settings(deadline=None, max_examples=10)
@given(
    count=st.integers(2, 12),
    size=st.integers(1, 5),
    seed=st.integers(0, 99),
    recipe=st.sampled_from(["2024", "iclr2026"]),
    adaptive=st.booleans(),
)
def test_a_step_is_the_same_whatever_the_micro_batch_size(count, size, seed, recipe, adaptive):
    """Holds for every term that is a mean over rows; the last micro-batch may have one row."""
    additive = dict(lambda1=0.5, lambda2=0.0, lambda3=0.0, non_target_kl=0.3)
    objective = dataclasses.replace(NLU_RECIPES[recipe], adaptive_lambda1=adaptive, **additive)
    torch.manual_seed(seed)
    model, rows = trained_bert(torch.float64), random_rows(count, seed)
    whole, *expected = gradients_of_a_step(model, rows, count, objective)
    parts, *got = gradients_of_a_step(model, rows, size, objective)
    # float32 at the factors, the head and the losses: 6e-8 a rounding
    assert (parts - whole).norm() < 1e-5 * whole.norm()
    assert got[0] == pytest.approx(expected[0], rel=1e-5) and got[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["diversity", "svd"])
def test_the_terms_of_a_micro_batch_are_averaged_by_rows(name):
    weights = dict(lambda1=0.0, lambda2=float(name == "diversity"), lambda3=float(name == "svd"))
    objective = dataclasses.replace(NLU_RECIPES["2024"], **weights)
    model, rows = trained_bert(), random_rows(7, 0)
    term = gradients_of_a_step(model, rows, 3, objective)[2][name]
    micro = micro_batches(rows, 3)
    assert [len(part) for part in micro] == [3, 3, 1]
    alone = []
    for part in micro:
        part = [dataclasses.replace(row, index=index) for index, row in enumerate(part)]
        alone.append(gradients_of_a_step(model, part, 3, objective)[2][name])
    assert term == pytest.approx(np.average(alone, weights=[3, 3, 1]), rel=1e-5)


# Files of a run


@pytest.fixture(scope="module")
def whole_runs(bert, data, tmp_path_factory) -> dict[str, Path]:
    """A run of three epochs with each method, never stopped."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for method in ("ba-lora", "pissa", "full", "adalora", "deltalora"):
        out = runs[method] = folder / method
        flags = flags_of(bert, data, out, "--method", method, "--epochs", "3", "--save-every", "5")
        assert status_of(train_nlu.main, *flags) == 0
    return runs


def test_a_run_leaves_exactly_the_promised_files(whole_runs):
    out = whole_runs["ba-lora"]
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in (out / "checkpoint").iterdir()} == STATE
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["bert.pooler", "classifier"]
    names = {name for name in load_file(out / ADAPTER) if "lora_" not in name}
    prefix = "base_model.model"
    assert names == {f"{prefix}.{m}.{p}" for m in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["objective"]["lambda1"] == 0.15 and record["settings"]["labels"] == ["0", "1"]


def test_every_step_is_logged_and_dev_at_the_end_of_an_epoch(whole_runs):
    entries = entries_of(whole_runs["ba-lora"])
    assert [entry["step"] for entry in entries] == list(range(1, 3 * STEPS + 1))
    for entry in entries:
        assert list(entry) == LOG_KEYS + (["dev"] if entry["step"] % STEPS == 0 else [])
    assert all(entry["non_target_kl"] is None and entry["svd"] < 0 for entry in entries)


def test_the_report_has_every_epoch_and_the_scores_of_before_and_after(whole_runs):
    for out in whole_runs.values():
        report = report_of(out)
        assert [epoch["step"] for epoch in report["epochs"]] == [STEPS, 2 * STEPS, 3 * STEPS]
        best = max(epoch["dev"] for epoch in report["epochs"])
        assert report["best_step"] == next(epoch["step"] for epoch in report["epochs"] if epoch["dev"] == best)
        assert report["after"]["dev.tsv"]["accuracy"] == best
        assert list(report["before"]["dev.tsv"]) == list(report["after"]["dev.tsv"])


def test_the_adapter_on_the_base_has_the_reported_scores(whole_runs, bert, data):
    model = tuned(bert, whole_runs["ba-lora"])
    assert accuracy_of(model, bert, data) == report_of(whole_runs["ba-lora"])["after"]["dev.tsv"]["accuracy"]


@torch.no_grad()
def tuned(base: Path, out: Path):
    return mb.load_adapter(mb.load_model(base, head="classifier", num_labels=2), out)


def accuracy_of(model, folder: Path, data: Path) -> float:
    rows, _ = labelled.encode(read_labelled(data / "dev.tsv", TASKS["sst2"])[0], mb.load_tokenizer(folder), 16)
    logits = class_scoring.answers(model, rows, 4, "cpu")
    return class_scoring.class_scores(logits, rows, TASKS["sst2"], False, 4)["accuracy"]


def test_full_writes_a_model_with_the_classes_names_that_loads_again(bert, tmp_path, train, monkeypatch):
    rows = [{"premise": text, "hypothesis": "the tea", "label": index % 3} for index, (text, _) in
            enumerate(reviews(12, seed=0))]  # fmt: skip
    file, kept = write_json_lines(tmp_path / "mnli.jsonl", rows), []
    real = mb.save_model
    monkeypatch.setattr(mb, "save_model", lambda model, *rest: (kept.append(model), real(model, *rest)))
    flags = flags_of(bert, file, tmp_path / "out", "--eval", file, "--method", "full", task="mnli")
    assert train(flags)[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"adapter_config.json", ADAPTER} | {"model"}
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "entailment", "1": "neutral", "2": "contradiction"}
    again = mb.load_model(tmp_path / "out" / "model", head="classifier")
    tok = mb.load_tokenizer(tmp_path / "out" / "model")
    encoded, _ = labelled.encode(read_labelled(file, TASKS["mnli"])[0], tok, 16)
    expected, got = (class_scoring.answers(model, encoded, 5, "cpu") for model in (kept[0], again))
    assert torch.equal(got, expected) and got.shape == (12, 3)


# Stopped and resumed


@pytest.mark.parametrize(("method", "number", "step"), [
    ("ba-lora", signal.SIGINT, STEPS + 3), ("full", signal.SIGTERM, 2 * STEPS), ("pissa", signal.SIGTERM, 3),
    ("adalora", signal.SIGINT, STEPS + 3), ("deltalora", signal.SIGTERM, 3),
])  # fmt: skip
def test_stopped_and_resumed_ends_byte_for_byte_like_uninterrupted(
    method, number, step, whole_runs, bert, data, tmp_path, train, monkeypatch
):
    """Stops, with dropout, in the middle and at the end of an epoch, after a best epoch and before the first."""
    out, whole = tmp_path / "out", whole_runs[method]
    flags = flags_of(bert, data, out, "--method", method, "--epochs", "3", "--save-every", "5")
    with monkeypatch.context() as patch:
        stop_within(patch, train_nlu, step, number)
        status, printed, _ = train(flags)
    assert status == 128 + number and f"stopped after step {step} of {3 * STEPS}" in printed
    assert not (out / "report.json").exists() and len(entries_of(out)) == step
    assert train([*flags, "--resume"])[0] == 0
    assert result_of(out) == result_of(whole)
    assert logged(out) == logged(whole) and report_of(out) == report_of(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_killed_and_resumed_ends_byte_for_byte_like_uninterrupted(whole_runs, bert, data, tmp_path, train):
    out, whole = tmp_path / "out", whole_runs["ba-lora"]
    flags = flags_of(bert, data, out, "--epochs", "3", "--save-every", "5")
    kill_before(STEPS + 2, SCRIPT, *flags)
    assert not (out / ADAPTER).exists() and len(entries_of(out)) == STEPS + 2
    assert train([*flags, "--resume"])[0] == 0
    assert result_of(out) == result_of(whole)
    assert logged(out) == logged(whole) and report_of(out) == report_of(whole)


@pytest.mark.parametrize("later", [2 * STEPS, 3 * STEPS])
def test_killed_between_the_best_epochs_file_and_the_checkpoint_changes_nothing(
    later, whole_runs, bert, data, tmp_path, train, monkeypatch
):
    """The resumed run must not end with the file of a later step, whose score is out of reach."""
    out, whole = tmp_path / "out", whole_runs["ba-lora"]
    flags = flags_of(bert, data, out, "--epochs", "3", "--save-every", "5")
    with monkeypatch.context() as patch:
        stop_within(patch, train_nlu, 3, signal.SIGTERM)
        assert train(flags)[0] == 128 + signal.SIGTERM
    best = load_file(whole / "checkpoint" / "best.safetensors")
    best = {name: torch.zeros_like(tensor) for name, tensor in best.items()}
    save_file(best, out / "checkpoint" / "best.safetensors", metadata={"step": str(later), "score": "2.0"})
    assert train([*flags, "--resume"])[0] == 0
    assert result_of(out) == result_of(whole) and report_of(out) == report_of(whole)


def falling(monkeypatch, values: list[float]) -> dict[int, torch.Tensor]:
    """Give the epochs these dev scores. Returns the head's weight after each epoch."""
    heads, real, scores = {}, checkpoint.keep_best, iter(values)

    def keep_best(out, model, step, score):
        heads[step] = model.classifier.weight.detach().clone()
        real(out, model, step, score)

    monkeypatch.setattr(class_scoring, "dev_metric", lambda *_: next(scores))
    monkeypatch.setattr(checkpoint, "keep_best", keep_best)
    return heads


@pytest.mark.parametrize(("values", "best"), [
    ([0.9, 0.5, 0.1], 1), ([0.1, 0.9, 0.5], 2), ([0.5, 0.5, 0.5], 1), ([float("nan"), -1.0, float("nan")], 2),
    ([float("nan")] * 3, 1),
])  # fmt: skip
def test_the_best_epoch_is_saved_and_a_tie_goes_to_the_first(values, best, bert, data, tmp_path, train, monkeypatch):
    heads = falling(monkeypatch, values)
    status, printed, _ = train(flags_of(bert, data, tmp_path / "out", "--epochs", "3"))
    assert status == 0 and f"best on dev.tsv: step {best * STEPS}\n" in printed
    saved = load_file(tmp_path / "out" / ADAPTER)["base_model.model.classifier.weight"]
    assert torch.equal(saved, heads[best * STEPS]) and len(heads) == 3
    assert all(not torch.equal(saved, head) for step, head in heads.items() if step != best * STEPS)
    report = report_of(tmp_path / "out")
    expected = [None if value != value else value for value in values]
    assert report["best_step"] == best * STEPS and [epoch["dev"] for epoch in report["epochs"]] == expected


def test_the_best_epoch_is_kept_across_a_stop(bert, data, tmp_path, train, monkeypatch):
    flags = flags_of(bert, data, tmp_path / "out", "--epochs", "3")
    with monkeypatch.context() as patch:
        heads = falling(patch, [0.9])
        stop_within(patch, train_nlu, STEPS + 3, signal.SIGINT)
        assert train(flags)[0] == 128 + signal.SIGINT
    falling(monkeypatch, [0.5, 0.1])
    assert train([*flags, "--resume"])[0] == 0
    saved = load_file(tmp_path / "out" / ADAPTER)["base_model.model.classifier.weight"]
    assert torch.equal(saved, heads[STEPS]) and report_of(tmp_path / "out")["best_step"] == STEPS


def test_resuming_an_ended_run_writes_the_same_files_again(whole_runs, bert, data, tmp_path, train):
    out = shutil.copytree(whole_runs["ba-lora"], tmp_path / "out")
    before = contents(out)
    assert train([*flags_of(bert, data, out, "--epochs", "3", "--save-every", "5"), "--resume"])[0] == 0
    assert contents(out) == before


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(bert, data, tmp_path, train):
    results = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = flags_of(bert, data, tmp_path / name, "--max-steps", "2", "--method", "lora", "--seed", seed)
        assert train(flags)[0] == 0
        results.append(result_of(tmp_path / name))
    assert results[0] == results[1] != results[2]


# Tasks and tables


def test_another_evaluation_file_adds_rows_to_the_table_but_does_not_select_the_epoch(bert, data, tmp_path, train):
    other = write_sst2(tmp_path / "other.tsv", [(text, 1 - label) for text, label in reviews(9, seed=2)])
    status, printed, _ = train(flags_of(bert, data, tmp_path / "out", "--epochs", "2", "--eval", other))
    report = report_of(tmp_path / "out")
    assert status == 0 and list(report["after"]) == list(report["before"]) == ["dev.tsv", "other.tsv"]
    assert max(epoch["dev"] for epoch in report["epochs"]) == report["after"]["dev.tsv"]["accuracy"]
    table = printed.partition("before     after\n")[2].splitlines()
    expected = [f"{name}: {key}" for name, scores in report["after"].items() for key in scores]
    assert [line.rsplit(maxsplit=2)[0] for line in table] == expected


def test_two_files_with_the_same_name_stay_apart(bert, data, tmp_path, train):
    (tmp_path / "more").mkdir()
    other = write_sst2(tmp_path / "more" / "dev.tsv", reviews(4, seed=3))
    assert train(flags_of(bert, data, tmp_path / "out", "--max-steps", "1", "--eval", other))[0] == 0
    assert list(report_of(tmp_path / "out")["after"]) == [str(data / "dev.tsv"), other]


def test_if_data_is_a_file_the_first_evaluation_file_selects_the_epoch(bert, data, tmp_path, train):
    files = [write_sst2(tmp_path / f"{name}.tsv", reviews(6, seed=3)) for name in ("first", "second")]
    flags = flags_of(bert, data / "train.tsv", tmp_path / "out", "--max-steps", "1", "--eval", *files)
    status, printed, _ = train(flags)
    assert status == 0 and "best on first.tsv: step 1" in printed


def pairs(count: int, labels: list) -> list[dict]:
    return [{"premise": text, "hypothesis": "the tea was bad", "label": labels[index % len(labels)]}
            for index, (text, _) in enumerate(reviews(count, seed=count))]  # fmt: skip


def test_non_target_kl_of_three_classes_is_a_term(bert, tmp_path, train):
    rows = write_json_lines(tmp_path / "mnli.jsonl", pairs(12, ["entailment", "neutral", "contradiction"]))
    flags = ["--eval", rows, "--max-steps", "3", "--method", "lora", "--non-target-kl", "0.5"]
    assert train(flags_of(bert, rows, tmp_path / "out", *flags, task="mnli"))[0] == 0
    terms = [entry["non_target_kl"] for entry in entries_of(tmp_path / "out")]
    assert terms[-1] > 0 and all(entry["consistency"] is None for entry in entries_of(tmp_path / "out"))


def test_a_file_of_folded_labels_is_evaluated_folded(bert, tmp_path, train):
    rows = write_json_lines(tmp_path / "mnli.jsonl", pairs(12, ["entailment", "neutral", "contradiction"]))
    hans = "gold_label\tsentence1\tsentence2\n" + "".join(
        f"{('entailment', 'non-entailment')[index % 2]}\t{text}\tthe tea\n"
        for index, (text, _) in enumerate(reviews(6, 4))
    )
    (tmp_path / "hans.txt").write_text(hans)
    flags = flags_of(bert, rows, tmp_path / "out", "--eval", rows, str(tmp_path / "hans.txt"), task="mnli")
    assert train(flags)[0] == 0
    after = report_of(tmp_path / "out")["after"]
    assert "recall of neutral" in after["mnli.jsonl"]
    folded = after["hans.txt"]
    assert list(folded)[:3] == ["accuracy", "recall of entailment", "recall of not entailment"]
    assert folded["accuracy"] == pytest.approx(
        (folded["recall of entailment"] + folded["recall of not entailment"]) / 2
    )


@pytest.mark.parametrize("recipe", ["2024", "iclr2026"])
def test_a_regression_has_no_terms_of_classes(recipe, bert, tmp_path, train):
    header = "index\tsentence1\tsentence2\tscore\n"
    lines = [f"{n}\t{text}\tthe tea\t{n % 6 * 0.9}\n" for n, (text, _) in enumerate(reviews(9, seed=5))]
    (tmp_path / "train.tsv").write_text(header + "".join(lines))
    (tmp_path / "dev.tsv").write_text(header + "".join(lines[:5]))
    flags = flags_of(bert, tmp_path, tmp_path / "out", "--recipe", recipe, "--features", tmp_path / "f", task="stsb")
    status, printed, _ = train(flags)
    assert status == 0 and "squared error to the teacher" in printed and "covariance" not in printed
    entries = entries_of(tmp_path / "out")
    assert all(entry["diversity"] is entry["svd"] is None and entry["consistency"] >= 0 for entry in entries)
    assert list(report_of(tmp_path / "out")["after"]["dev.tsv"]) == ["pearson", "spearman"]
    assert load_file(tmp_path / "f")["labels"].is_floating_point()


def test_custom_classes_are_learned_and_named(bert, tmp_path, train):
    rows = [{"body": text, "kind": ["spam", "ham"][label]} for text, label in reviews(9, seed=0)]
    file = write_json_lines(tmp_path / "mail.jsonl", rows)
    fields = ["--text-field", "body", "--label-field", "kind"]
    flags = flags_of(bert, file, tmp_path / "out", "--eval", file, *fields, "--method", "full", task="custom")
    status, printed, _ = train(flags)
    assert status == 0 and "9 rows: 4 of class ham, 5 of class spam" in printed and "recall of spam" in printed
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "ham", "1": "spam"}


def test_features_are_the_states_before_and_after_of_the_dev_set_in_its_order(bert, data, tmp_path, train):
    flags = flags_of(bert, data, tmp_path / "out", "--features", tmp_path / "features.safetensors")
    assert train(flags)[0] == 0
    features = load_file(tmp_path / "features.safetensors")
    assert set(features) == {"before", "after", "labels"} and features["labels"].tolist() == [0, 1] * 5
    assert features["before"].shape == features["after"].shape == (10, 24)
    torch.manual_seed(42)
    base = mb.load_model(bert, head="classifier", num_labels=2)
    rows, _ = labelled.encode(read_labelled(data / "dev.tsv", TASKS["sst2"])[0], mb.load_tokenizer(bert), 16)
    assert torch.allclose(
        features["before"], class_scoring.answers(base, rows, 3, "cpu", part=base.features), atol=1e-5
    )
    after = tuned(bert, tmp_path / "out")
    # the saved rank-2r adapter adds up in another order than the residual
    assert torch.allclose(
        features["after"], class_scoring.answers(after, rows, 3, "cpu", part=after.features), atol=1e-4
    )
    assert not torch.allclose(features["before"], features["after"], atol=1e-3)
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(TASKS["sst2"].labels)


def test_noise_and_imbalance_are_printed_recorded_and_seeded(bert, data, tmp_path, train):
    printed, digests = {}, {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2"), ("none", "1")):
        changes = [] if name == "none" else ["--label-noise", "0.25", "--imbalance", "2.3"]
        flags = flags_of(bert, data, tmp_path / name, "--max-steps", "1", "--seed", seed, *changes)
        status, printed[name], _ = train(flags)
        assert status == 0
        digests[name] = json.loads((tmp_path / name / "run.json").read_text())["settings"]["data_digest"]
    assert "46 rows: 23 of class 0, 23 of class 1" in printed["none"]
    assert "left out for the imbalance" not in printed["none"]
    assert "33 rows" in printed["a"] and "13 left out for the imbalance, 8 with another label" in printed["a"]
    assert digests["a"] == digests["b"] and len(set(digests.values())) == 3


# Teachers


def warnings_in(printed: str) -> list[str]:
    """Return the term that each warning of the plan is about."""
    lines = [line.removeprefix("warning ") for line in printed.splitlines() if line.startswith("warning ")]
    return [line.partition(":")[0] for line in lines]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], ["consistency", "nuclear share"]),
        (["--lambda1", "0", "--svd-k", "1"], []),
        (["--recipe", "2024", "--micro-batch-size", "1"], ["consistency", "covariance"]),
        (["--method", "pissa"], []),
    ],
)
def test_the_plan_warns_once_of_each_term_that_cannot_show_anything(flags, expected, bert, data, tmp_path, train):
    status, printed, _ = train(flags_of(bert, data, tmp_path / "out", *flags, "--max-steps", "1"))
    assert status == 0 and warnings_in(printed) == expected


def spied_teachers(monkeypatch) -> list[tuple]:
    """Record each model that is asked for the training rows, and its answers: the teacher, once."""
    seen, real = [], class_scoring.answers

    def answers(model, rows, *rest, **named):
        logits = real(model, rows, *rest, **named)
        if len(rows) == 46:
            seen.append((model, logits))
        return logits

    monkeypatch.setattr(class_scoring, "answers", answers)
    return seen


def test_consistency_starts_at_zero_and_the_teacher_stays_while_the_student_trains(tmp_path, data, train, monkeypatch):
    model = base_model("bert", tmp_path / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    teachers = spied_teachers(monkeypatch)
    assert train(flags_of(model, data, tmp_path / "out"))[0] == 0
    consistency = [entry["consistency"] for entry in entries_of(tmp_path / "out")]
    assert consistency[0] == pytest.approx(0, abs=1e-9) and consistency[-1] > 1e-6
    ((student, expected),) = teachers
    rows, _ = labelled.encode(read_labelled(data / "train.tsv", TASKS["sst2"])[0], mb.load_tokenizer(model), 16)
    with mb.pretrained(student):
        assert torch.allclose(class_scoring.answers(student, rows, 16, "cpu"), expected, atol=1e-6)
    assert not torch.allclose(class_scoring.answers(student, rows, 16, "cpu"), expected, atol=1e-2)


@pytest.mark.parametrize("recipe", ["2024", "iclr2026"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_fine_tuned_teacher_is_asked_in_its_own_tokens(family, recipe, bert, data, tmp_path, train, monkeypatch):
    teacher = write_tokenizer(Path(shutil.copytree(GOLDEN / "roberta", tmp_path / "teacher")), shift=5)
    if family == "bert":  # one that this script has fine-tuned
        full = flags_of(bert, data, tmp_path / "first", "--max-steps", "2", "--method", "full")
        assert train(full)[0] == 0
        teacher = tmp_path / "first" / "model"
    teachers = spied_teachers(monkeypatch)
    status, printed, _ = train(flags_of(bert, data, tmp_path / "out", "--teacher", teacher, "--recipe", recipe))
    assert status == 0 and "consistency" not in warnings_in(printed)
    rows, _ = labelled.encode(read_labelled(data / "train.tsv", TASKS["sst2"])[0], mb.load_tokenizer(teacher), 16)
    expected = class_scoring.answers(mb.load_model(teacher, head="classifier"), rows, 5, "cpu")
    assert torch.allclose(teachers[0][1], expected, atol=1e-5)
    assert entries_of(tmp_path / "out")[0]["consistency"] > 1e-6


def test_a_base_checkpoints_label_names_say_nothing(bert, data, tmp_path, train):
    base = configure(Path(shutil.copytree(bert, tmp_path / "base")), id2label={"0": "positive", "1": "negative"})
    assert train(flags_of(base, data, tmp_path / "out", "--max-steps", "1"))[0] == 0


# Flags and families


@pytest.mark.parametrize("flags", [
    ["--recipe", "2024", "--init", "pissa_niter_4", "--micro-batch-size", "3"],
    ["--method", "lora", "--targets", "query", "value", "--schedule", "cosine", "--grad-checkpoint"],
    ["--adaptive-lambda1", "--alpha", "7", "--dtype", "bfloat16", "--temperature", "2"],
    ["--method", "full", "--dtype", "bfloat16", "--micro-batch-size", "1"],
])  # fmt: skip
def test_flags_that_change_the_method_run(flags, bert, data, tmp_path, train):
    assert train(flags_of(bert, data, tmp_path / "out", "--max-steps", "3", *flags))[0] == 0
    entries = entries_of(tmp_path / "out")
    assert len(entries) == 3 and all(np.isfinite(entry["loss"]) for entry in entries)
    assert "dev" in entries[-1] and report_of(tmp_path / "out")["best_step"] == 3  # less than an epoch


def test_a_full_run_saves_the_model_that_it_reports_on(bert, data, tmp_path, train):
    flags = flags_of(bert, data, tmp_path / "out", "--max-steps", "3", "--method", "full", "--dtype", "bfloat16")
    assert train(flags)[0] == 0
    task = TASKS["sst2"]
    rows, _ = labelled.encode(read_labelled(data / "dev.tsv", task)[0], mb.load_tokenizer(bert), 16)
    saved = mb.load_model(tmp_path / "out" / "model", head="classifier", dtype=torch.bfloat16)
    logits = class_scoring.answers(saved, rows, 16, "cpu")
    assert report_of(tmp_path / "out")["after"]["dev.tsv"] == pytest.approx(
        class_scoring.class_scores(logits, rows, task, False, 4)
    )


def test_a_model_that_diverged_is_reported_in_one_line(bert, data, tmp_path, train):
    flags = ["--method", "full", "--lr", "1e30", "--max-steps", "1"]
    refused_late = train(flags_of(bert, data, tmp_path / "out", *flags))
    assert (
        refused_late[0] == 2
        and "not finite: use --dtype float32, or train with a lower --lr" in refused_late[2].splitlines()[-1]
    )


def test_checkpointed_blocks_train_the_same(bert, data, tmp_path, train):
    """With dropout, whose mask must be repeated in the second computation."""
    for name, flags in (("plain", []), ("checkpointed", ["--grad-checkpoint"])):
        assert train(flags_of(bert, data, tmp_path / name, "--max-steps", "3", *flags))[0] == 0
    plain, checkpointed = (load_file(tmp_path / name / ADAPTER) for name in ("plain", "checkpointed"))
    assert all(torch.allclose(checkpointed[name], plain[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("name", ["roberta", "deberta", "gpt2_classifier", "llama_classifier"])
def test_every_family_learns_to_classify(name, data, tmp_path, train):
    """The weights are three times larger than a random model's, so that an encoder's first token sees the others."""
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "embd_pdrop", "attn_pdrop", "resid_pdrop")
    model = base_model(name, tmp_path / "model", **dict.fromkeys(dropouts, 0.0))
    tensors = load_file(model / "model.safetensors")
    tensors = {key: 3 * tensor if tensor.ndim == 2 else tensor for key, tensor in tensors.items()}
    save_file(tensors, model / "model.safetensors")
    flags = ["--max-length", "12", "--batch-size", "16", "--epochs", "12", "--lr", "3e-3", "--method", "pissa"]
    assert train(flags_of(model, data, tmp_path / "out", *flags))[0] == 0
    tasks = [entry["task"] for entry in entries_of(tmp_path / "out")]
    assert sum(tasks[-3:]) < 0.98 * sum(tasks[:3])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize("method", ["ba-lora", "full"])
@pytest.mark.parametrize("recipe", ["2024", "iclr2026"])
def test_a_last_batch_of_one_row_works(recipe, method, bert, data, tmp_path, train):
    recipe = ["--recipe", recipe] if method == "ba-lora" else []
    flags = ["--batch-size", "9", "--max-rows", "10", "--method", method, *recipe, "--epochs", "2"]
    assert train(flags_of(bert, data, tmp_path / "out", *flags))[0] == 0
    assert [np.isfinite(entry["loss"]) for entry in entries_of(tmp_path / "out")] == [True] * 4


def test_no_argument_trains_the_built_in_model(tmp_path):
    """Runs two steps of the README's command."""
    flags = ["--max-steps", "2", "--max-rows", "200"]
    result = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in out.iterdir()} == FILES
    assert "clean reviews: recall of neutral" in result.stdout


# Errors


def refused(outcome: tuple[int, str, str], *parts: str) -> None:
    status, printed, error = outcome
    assert status == 2 and len(error.splitlines()) == 1 and error.startswith("error: "), error
    for part in parts:
        assert part in error


@pytest.fixture
def place(tmp_path, data, bert, monkeypatch) -> Path:
    """Enter a folder with data and models broken in several ways. Checks that nothing is written there."""
    shutil.copy(data / "train.tsv", tmp_path / "train.tsv")
    shutil.copy(data / "dev.tsv", tmp_path / "dev.tsv")
    (tmp_path / "label.tsv").write_text("sentence\tlabel\nthe tea\t1\nthe bed\t7\n")
    (tmp_path / "short.tsv").write_text("sentence\tlabel\nthe tea\t1\nthe bed\n")
    write_sst2(tmp_path / "one_class.tsv", [("the tea", 1)] * 3)
    (tmp_path / "headless.tsv").write_text("sentence\tlabel\n")
    (tmp_path / "no_train").mkdir()
    shutil.copy(data / "dev.tsv", tmp_path / "no_train")
    write_json_lines(tmp_path / "mnli.jsonl", pairs(6, [0, 1, 2]))
    write_tokenizer(Path(shutil.copytree(GOLDEN / "bert", tmp_path / "three_classes")))
    unknown = Path(shutil.copytree(bert, tmp_path / "unknown"))
    configure(unknown, model_type="electra")
    foreign = Path(shutil.copytree(bert, tmp_path / "foreign"))
    backend = json.loads((foreign / "tokenizer.json").read_text())
    backend["model"]["vocab"]["tea"] = 61
    (foreign / "tokenizer.json").write_text(json.dumps(backend))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("flags", "parts"), [
    (["--data", "label.tsv"], ["label.tsv, line 3", "'7'", "sst2"]),
    (["--data", "short.tsv"], ["short.tsv, line 3", "1 columns, not 2"]),
    (["--non-target-kl", "0.1"], ["--non-target-kl", "three classes"]),
    (["--data", "one_class.tsv"], ["one_class.tsv", "class '0'"]),
    (["--data", "headless.tsv"], ["headless.tsv", "no rows"]),
    (["--data", "no_train"], ["no_train/train.tsv", "no such file", "dev.tsv"]),
    (["--data", "absent"], ["absent", "no such file"]),
    (["--data", "mnli.jsonl"], ["mnli.jsonl, line 1", "premise", "not sst2's"]),
    (["--task", "cola", "--data", "mnli.jsonl"], ["mnli.jsonl, line 1", "premise", "not cola's"]),
    (["--task", "mnli", "--data", "train.tsv"], ["train.tsv, line 1", "not mnli's"]),
    (["--eval", "label.tsv"], ["label.tsv, line 3"]),
    (["--eval", "absent.tsv"], ["absent.tsv"]),
    (["--max-length", "21"], ["--max-length 21", "20 positions"]),
    (["--max-length", "2"], ["a length of 2", "2 special tokens"]),
    (["--model", "foreign"], ["foreign", "token 61", "61 tokens"]),
    (["--model", "unknown"], ["unknown/config.json", "electra"]),
    (["--features", "absent/features"], ["--features absent/features"]),
    (["--features", "dev.tsv"], ["--features dev.tsv", "exists already"]),
    (["--features", "out/adapter_model.safetensors"], ["--features out/adapter", "file of the run itself"]),
    (["--features", "/proc/features"], ["--features /proc/features", "can't write there"]),
    (["--teacher", "absent"], ["--teacher absent", "no such folder"]),
    (["--eval", "dev.tsv", "./dev.tsv"], ["--eval names dev.tsv twice"]),
    (["--teacher", "absent"], ["absent"]),
    (["--teacher", "BASE"], ["--teacher", "no trained", "fine-tuned"]),
    (["--teacher", "three_classes"], ["three_classes", "3 classes"]),
    (["--label-noise", "1"], ["--label-noise", "1"]),
    (["--imbalance", "0.5"], ["--imbalance", "0.5"]),
    (["--imbalance", "999"], ["imbalance of 999"]),
    (["--targets", "q_proj"], ["--targets", "q_proj"]),
], ids=lambda value: " ".join(value))  # fmt: skip
def test_a_wrong_flag_or_file_is_refused_and_nothing_is_written(flags, parts, place, bert, train):
    flags = [str(bert) if flag == "BASE" else flag for flag in flags]
    needs_eval = "--data" in flags and flags[flags.index("--data") + 1].count(".") and "--eval" not in flags
    before = contents(place)
    source = "train.tsv" if "--eval" in flags else place
    outcome = train(flags_of(bert, source, Path("out"), *(["--eval", "dev.tsv"] if needs_eval else []), *flags))
    refused(outcome, *parts)
    assert contents(place) == before


def test_a_training_file_without_a_dev_file_is_refused(place, bert, train):
    before = contents(place)
    refused(train(flags_of(bert, "train.tsv", Path("out"))), "--data train.tsv", "needs --eval")
    assert contents(place) == before


def test_a_token_beyond_the_vocabulary_is_refused_with_the_file_that_has_it(place, train):
    write_sst2(place / "tea.tsv", [("the bed", 0), ("the tea", 1)])
    write_sst2(place / "bed.tsv", [("the bed", 0), ("the meal", 1)])
    before = contents(place)
    flags = flags_of(Path("foreign"), "bed.tsv", Path("out"), "--eval", "bed.tsv", "tea.tsv")
    refused(train(flags), "foreign", "token 61", "tea.tsv, line 3")
    assert contents(place) == before


@pytest.mark.parametrize("changes", [
    {"--lr": "1e-3"}, {"--seed": "43"}, {"--epochs": "2"}, {"--label-noise": "0.1"}, {"--rank": "3"},
    {"--max-rows": "45"}, {"--method": "pissa"}, {"--recipe": "2024"},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_resuming_with_other_settings_is_refused_and_changes_nothing(changes, whole_runs, bert, data, tmp_path, train):
    out = shutil.copytree(whole_runs["ba-lora"], tmp_path / "out")
    before = contents(out)
    (name, value), *_ = changes.items()
    flags = flags_of(bert, data, out, "--epochs", "3", "--save-every", "5", "--resume", name, value)
    refused(train(flags), name)
    assert contents(out) == before


def test_resuming_with_another_dev_set_is_refused_by_its_name(whole_runs, bert, data, tmp_path, train):
    out, other = shutil.copytree(whole_runs["ba-lora"], tmp_path / "out"), shutil.copytree(data, tmp_path / "data")
    write_sst2(other / "dev.tsv", [("the bed", 0), ("the meal", 1)])
    flags = flags_of(bert, other, out, "--epochs", "3", "--save-every", "5", "--resume")
    refused(train(flags), "--eval differs", "eval_digest")


@pytest.mark.parametrize("damage", [b"{", b""], ids=["text", "empty"])
def test_a_damaged_file_of_the_best_epoch_is_refused_on_resume(damage, whole_runs, bert, data, tmp_path, train):
    out = shutil.copytree(whole_runs["ba-lora"], tmp_path / "out")
    (out / "checkpoint" / "best.safetensors").write_bytes(damage)
    before = contents(out)
    flags = flags_of(bert, data, out, "--epochs", "3", "--save-every", "5", "--resume")
    refused(train(flags), "checkpoint/best.safetensors", "not a readable checkpoint")
    assert contents(out) == before


def test_resuming_an_ended_run_without_its_best_epoch_writes_nothing(whole_runs, bert, data, tmp_path, train):
    out = shutil.copytree(whole_runs["ba-lora"], tmp_path / "out")
    (out / "checkpoint" / "best.safetensors").unlink()
    before = contents(out)
    status, _, error = train(flags_of(bert, data, out, "--epochs", "3", "--save-every", "5", "--resume"))
    assert status == 2 and "best.safetensors missing" in error.splitlines()[-1]
    assert contents(out) == before


def test_the_files_of_the_best_epoch_record_step_and_score(whole_runs):
    out = whole_runs["ba-lora"]
    with safe_open(out / "checkpoint" / "best.safetensors", "pt") as best:
        report = report_of(out)
        assert int(best.metadata()["step"]) == report["best_step"]
        assert float(best.metadata()["score"]) == report["after"]["dev.tsv"]["accuracy"]
