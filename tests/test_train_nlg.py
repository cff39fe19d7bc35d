"""The training script as a user runs it, and the properties of its step."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GOLDEN,
    distance,
    gradients_of_a_step,
    kill_before,
    padded_rows,
    predicted_rows,
    random_rows,
    status_of,
    stop_within,
    stretch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minibalora as mb
from minibalora.data.batches import micro_batches
from minibalora.objective import NLG_RECIPES, lambdas, nlg_loss
from minibalora.run import checkpoint, init_cache, loop
from minibalora.run.cache import Cache
from minibalora.run.checkpoint import trained_parameters
from minibalora.run.hardware import checkpoint_blocks
from minibalora.run.loop import Run
from minibalora.run.settings import Hardware, Optimisation, Output
from minibalora.toy import MODEL
from minibalora.toy.problems import clean_problems

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_nlg.py"
sys.path.insert(0, str(ROOT))
import train_nlg  # noqa: E402

ADAPTER = "adapter_model.safetensors"
FILES = {"adapter_config.json", ADAPTER, "log.jsonl", "run.json", "report.json", "checkpoint"}
LOG_KEYS = "step loss task consistency diversity svd non_target_kl lr tokens_per_s memory_bytes".split()


@settings(deadline=None, max_examples=10)
@given(count=st.integers(2, 12), size=st.integers(1, 5), seed=st.integers(0, 99), adaptive=st.booleans())
def test_a_step_is_the_same_whatever_the_micro_batch_size(count, size, seed, adaptive):
    """Holds in float64, up to rounding, for every term that is a mean over tokens."""
    objective = dataclasses.replace(
        NLG_RECIPES["iclr2026"], lambda3=0.0, non_target_kl=0.3, lambda1=0.5, lambda2=0.1, adaptive_lambda1=adaptive
    )
    torch.manual_seed(seed)
    model = mb.adapt(mb.load_model(GOLDEN / "llama3", dtype=torch.float64), rank=3)
    with torch.no_grad():
        for _, layer in mb.lowrank.adapted_layers(model):
            layer.B += 0.1 * torch.randn_like(layer.B)
    rows = random_rows(count, seed)
    whole, *expected = gradients_of_a_step(model, rows, count, objective)
    parts, *got = gradients_of_a_step(model, rows, size, objective)
    # float32 at the factors, the norms and the cross-entropy: 6e-8 a rounding
    assert (parts - whole).norm() < 1e-5 * whole.norm()
    assert got[0] == pytest.approx(expected[0], rel=1e-5) and got[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["llama3", "gemma", "gpt2"])
@pytest.mark.parametrize("recipe", ["2024", "iclr2026"])
def test_a_packed_step_without_whole_logits_equals_a_padded_step_with_them(name, recipe):
    """float32: 6e-8 a rounding, and a few hundred of them in a row; T² = 4 of them in a KL, which may be small."""
    model, rows, objective = mb.adapt(mb.load_model(GOLDEN / name), rank=3), random_rows(7, 0), NLG_RECIPES[recipe]
    stretch(model)
    gradient, loss, terms = gradients_of_a_step(model, rows, 7, objective)
    input_ids, labels = padded_rows(rows)
    with mb.pretrained(model):
        teacher, _ = predicted_rows(model(input_ids), labels)
    student, targets = predicted_rows(model(input_ids), labels)
    expected, terms_of_whole = nlg_loss(student, teacher, targets, objective, lambdas(objective, 5, 10))
    model.zero_grad()
    expected.backward()
    padded = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert distance(gradient, padded) < 1e-5
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert terms == pytest.approx({name: term.item() for name, term in terms_of_whole.items()}, rel=1e-4, abs=1e-6)


def test_the_spectral_term_is_averaged_by_tokens():
    objective = dataclasses.replace(NLG_RECIPES["2024"], lambda1=0.0, lambda2=0.0, lambda3=1.0)
    model, rows = mb.adapt(mb.load_model(GOLDEN / "llama3"), rank=3), random_rows(7, 0)
    terms = gradients_of_a_step(model, rows, 3, objective)[2]
    alone = [gradients_of_a_step(model, micro, 3, objective)[2]["svd"] for micro in micro_batches(rows, 3)]
    tokens = [sum(len(row.ids) - row.prompt_length for row in micro) for micro in micro_batches(rows, 3)]
    assert terms["svd"] == pytest.approx(np.average(alone, weights=tokens), rel=1e-5)


def test_consistency_starts_at_zero_and_the_teacher_stays_while_the_student_trains():
    model, rows = mb.adapt(mb.load_model(GOLDEN / "gemma"), rank=3), random_rows(6, 1)
    input_ids, _ = padded_rows(rows)
    base = mb.load_model(GOLDEN / "gemma")(input_ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    consistency = []
    for _ in range(3):
        consistency.append(gradients_of_a_step(model, rows, 4, NLG_RECIPES["iclr2026"])[2]["consistency"])
        optimizer.step()
    assert consistency[0] == 0 and consistency[1] > 0
    assert not torch.allclose(model(input_ids), base)
    with mb.pretrained(model):
        assert torch.equal(model(input_ids), base)


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_checkpointing_blocks_does_not_change_gradients(name):
    rows, objective = random_rows(5, 2), NLG_RECIPES["iclr2026"]
    plain, checkpointed = (mb.adapt(mb.load_model(GOLDEN / name), rank=3) for _ in range(2))
    checkpoint_blocks(checkpointed)
    seen = []
    checkpointed.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    expected, got = (gradients_of_a_step(model, rows, 3, objective)[0] for model in (plain, checkpointed))
    assert torch.equal(got, expected)
    assert seen == [False, False, True, True, True, True]  # two micro-batches: the teacher, then twice the student


def train_a_network(out: Path, start: int = 0, until: int = 6, seed: int = 7) -> tuple[list[Tensor], list[dict]]:
    """Train a network with dropout, from a checkpoint if start > 0, stopped within step `until` if it is below 6."""
    settings = Optimisation(0.1, "linear", 0.0, 1.0, 6, None, 1, 1, seed)
    hardware = Hardware(torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    model = mb.adapt(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), rank=2, init="lora")
    optimizer = torch.optim.AdamW(trained_parameters(model).values())
    out.mkdir(exist_ok=True)
    torch.manual_seed(start)  # must not matter
    with Run(Output(out, 100, False), settings, hardware, model, optimizer, 6, start or None) as run:
        for step, (part,) in run.steps(random_rows(1, 0)):
            if step == until:
                signal.raise_signal(signal.SIGTERM)
            loss = model(torch.ones(4, 6)).square().mean()
            (part.share * loss).backward()
            run.note(part, loss, {"task": loss})
            run.update()
            run.entry["dev"] = run.step
    assert (run.step, run.signal) == (until, signal.SIGTERM if until < 6 else 0)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return list(trained_parameters(model).values()), entries


def test_a_resumed_run_repeats_dropout_exactly(tmp_path):
    whole, _ = train_a_network(tmp_path / "whole")
    train_a_network(tmp_path / "parts", until=3)
    parts, _ = train_a_network(tmp_path / "parts", start=3)
    other, _ = train_a_network(tmp_path / "other", seed=8)
    assert all(map(torch.equal, parts, whole)) and not any(map(torch.equal, other, whole))


def test_dropout_differs_from_step_to_step_and_seed_to_seed():
    masks = set()
    for seed, step in ((7, 0), (7, 1), (8, 0), (8, 1)):
        loop.seed_step(seed, step)
        masks.add(tuple(F.dropout(torch.ones(64)).tolist()))
    assert len(masks) == 4


def test_entries_made_after_a_step_are_logged_with_it(tmp_path):
    _, entries = train_a_network(tmp_path / "out")
    assert all(list(entry) == [*LOG_KEYS, "dev"] for entry in entries)
    assert [entry["dev"] for entry in entries] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in clean_problems(48, seed=0)))
    return str(path)


@pytest.fixture(scope="module")
def flags_of(tiny, small_data):
    """flags_of(out, *more): of a run on `tiny`; a later --model takes the place of the first."""
    fixed = ["--model", tiny, "--data", small_data, "--device", "cpu", "--rank", 4, "--lr", 1e-3]
    return lambda out, *more: [*fixed, "--batch-size", 8, "--micro-batch-size", 4, "--out", out, *more]


@pytest.fixture
def train(in_command, flags_of):
    """train(out, *flags) -> status, standard output, standard error of train_nlg.py, run in this process."""
    return lambda out, *flags: in_command(train_nlg.main, *flags_of(out, *flags))


RESUMABLE = ("--epochs", 2, "--save-every", 2)


@pytest.fixture(scope="module")
def uninterrupted(flags_of, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert status_of(train_nlg.main, *flags_of(out, *RESUMABLE)) == 0
    return out


def logged(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in LOG_KEYS if key not in ("tokens_per_s", "memory_bytes")} for entry in entries]


def test_a_run_leaves_exactly_the_promised_files(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == FILES
    entries = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert all(list(entry) == LOG_KEYS for entry in entries)
    assert entries[0]["consistency"] == 0 and entries[-1]["svd"] < 0
    record = json.loads((uninterrupted / "run.json").read_text())
    assert record["settings"]["rank"] == 4 and record["settings"]["objective"]["lambda1"] == 0.025
    assert record["versions"]["torch"] == str(torch.__version__)


def test_tf32_is_the_same_before_and_after_training_and_off_for_the_svds(train, small_data, tmp_path, monkeypatch):
    used = []
    for owner, name in ((train_nlg, "adapt_model"), (train_nlg.records, "measure")):
        function = getattr(owner, name)

        def noting(*arguments, function=function, name=name):
            used.append((name, torch.backends.cuda.matmul.allow_tf32))
            return function(*arguments)

        monkeypatch.setattr(owner, name, noting)
    try:
        assert train(tmp_path / "out", "--max-steps", "1", "--eval", small_data, "--tf32")[0] == 0
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert used == [("adapt_model", False), ("measure", True), ("measure", True)]


@pytest.fixture
def set_torch():
    """set_torch(threads, flushes): how torch computes, until the test ends; flushes: denormal numbers become 0."""
    threads, flushed = torch.get_num_threads(), (torch.tensor(1e-310, dtype=torch.float64) * 1).item() == 0

    def apply(threads: int, flushes: bool) -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes)

    yield apply
    apply(threads, flushed)


@pytest.mark.parametrize(("number", "threads", "flushes"), [
    (signal.SIGINT, 1, False), (signal.SIGTERM, 2, False), (signal.SIGTERM, 4, True),
])  # fmt: skip
def test_stopped_and_resumed_ends_byte_for_byte_like_uninterrupted(
    number, threads, flushes, train, tmp_path, monkeypatch, set_torch
):
    """Holds with any number of threads, because both runs do the same operations in the same order."""
    set_torch(threads, flushes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *RESUMABLE)[0] == 0
    with monkeypatch.context() as patch:
        stop_within(patch, train_nlg, 5, number)
        assert train(parts, *RESUMABLE)[0] == 128 + number
    assert len(logged(parts)) == 5 and {path.name for path in parts.iterdir()} == FILES - {"report.json"}
    assert train(parts, *RESUMABLE, "--resume")[0] == 0
    assert (parts / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes() and logged(parts) == logged(whole)
    assert {path.name for path in parts.iterdir()} == FILES


def test_killed_and_resumed_ends_byte_for_byte_like_uninterrupted(train, flags_of, uninterrupted, tmp_path):
    out = tmp_path / "out"
    kill_before(5, SCRIPT, *flags_of(out, *RESUMABLE))
    assert not (out / ADAPTER).exists() and len(logged(out)) == 5
    assert train(out, *RESUMABLE, "--resume")[0] == 0
    assert (out / ADAPTER).read_bytes() == (uninterrupted / ADAPTER).read_bytes()
    assert logged(out) == logged(uninterrupted)
    assert {path.name for path in out.iterdir()} == FILES


def test_a_run_killed_before_its_first_checkpoint_starts_over(train, uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    for file in (out / "checkpoint").iterdir():
        file.unlink()
    (out / ADAPTER).unlink()
    assert train(out, *RESUMABLE, "--resume")[0] == 0
    assert (out / ADAPTER).read_bytes() == (uninterrupted / ADAPTER).read_bytes()


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "ba-lora"])
def test_every_method_trains(method, in_command, flags_of, tmp_path):
    flags = flags_of(tmp_path / "out", "--method", method, "--epochs", 3, "--lr", 1e-2)
    if method == "full":
        del flags[flags.index("--rank") : flags.index("--rank") + 2]
    assert in_command(train_nlg.main, *flags)[0] == 0
    tasks = [entry["task"] for entry in logged(tmp_path / "out")]
    assert sum(tasks[-4:]) < sum(tasks[:4])
    regularized = [key for key in ("consistency", "diversity", "svd") if logged(tmp_path / "out")[-1][key] is not None]
    assert regularized == (["consistency", "diversity", "svd"] if method == "ba-lora" else [])
    if method == "full":
        mb.load_model(tmp_path / "out" / "model")
    else:
        rank = load_file(tmp_path / "out" / ADAPTER).popitem()[1].shape
        assert min(rank) == (4 if method == "lora" else 8)


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe", "2024", "--init", "pissa_niter_4", "--grad-checkpoint"],
        ["--method", "lora", "--non-target-kl", "0.1", "--targets", "q_proj", "v_proj", "--schedule", "linear"],
        ["--adaptive-lambda1", "--alpha", "7", "--top-k", "0", "--dtype", "bfloat16"],
    ],
)
def test_flags_that_change_the_method_run(flags, train, tmp_path):
    status, *_ = train(tmp_path / "out", "--max-steps", "3", *flags)
    assert status == 0 and len(logged(tmp_path / "out")) == 3
    assert all(np.isfinite(entry["loss"]) for entry in logged(tmp_path / "out"))


@pytest.mark.parametrize("recipe", ["2024", "iclr2026"])
def test_the_plain_layer_and_loss_give_the_same_run_up_to_rounding(recipe, train, tmp_path):
    flags = ("--max-steps", "4", "--seed", "3", "--recipe", recipe, "--adaptive-lambda1", "--non-target-kl", "0.1")
    for name, more in (("lean", ()), ("plain", ("--plain",))):
        assert train(tmp_path / name, *flags, *more)[0] == 0
    lean, plain = (logged(tmp_path / name) for name in ("lean", "plain"))
    for entry, expected in zip(lean, plain, strict=True):
        known = {name: value for name, value in expected.items() if value is not None}
        assert {name: value for name, value in entry.items() if value is not None} == pytest.approx(known, 1e-4, 1e-6)
    trained, expected = (load_file(tmp_path / name / ADAPTER) for name in ("lean", "plain"))
    assert all(distance(trained[name], expected[name]) < 1e-3 for name in expected)  # Adam divides by numbers near 0


@pytest.mark.parametrize("init", ["pissa", "pissa_krylov_1"])
def test_a_sweep_with_a_cache_computes_its_start_once(init, train, tmp_path, monkeypatch):
    flags = ("--max-steps", "1", "--alpha", "7", "--init", init)
    cached = (*flags, "--init-cache", str(tmp_path / "init"))
    assert train(tmp_path / "plain", *flags)[0] == 0
    assert train(tmp_path / "first", *cached)[0] == 0
    monkeypatch.setattr(init_cache, "factors_of", None)
    assert train(tmp_path / "second", *cached)[0] == 0
    assert train(tmp_path / "third", *cached, "--seed", "1")[0] == 0
    first, *others = ((tmp_path / run / ADAPTER).read_bytes() for run in ("plain", "first", "second"))
    assert others == [first, first]


def test_a_teacher_cache_changes_nothing_and_saves_the_teacher(train, tmp_path, monkeypatch):
    """Exact in the first epoch, which computes the same states. In the second, a row's states come from the first,
    where the row was in another micro-batch: a matrix product of another height may round differently, by about 2^-24
    per number, and Adam's two steps divide numbers near 0 by their own size.
    """
    flags = ("--epochs", "2", "--max-steps", "8", "--seed", "3")
    cached = (*flags, "--teacher-cache", str(tmp_path / "cache"))
    written = []
    write = Cache.write
    monkeypatch.setattr(Cache, "write", lambda self, tensors: written.append(len(tensors)) or write(self, tensors))
    for name, run_flags in (("plain", flags), ("first", cached), ("second", (*cached, "--rank", "5"))):
        assert train(tmp_path / name, *run_flags)[0] == 0
    plain, first = ([entry["loss"] for entry in logged(tmp_path / name)] for name in ("plain", "first"))
    assert plain[:6] == first[:6]
    np.testing.assert_allclose(first[6:], plain[6:], rtol=1e-5)
    trained, expected = (load_file(tmp_path / name / ADAPTER) for name in ("first", "plain"))
    assert all(distance(trained[name], expected[name]) < 1e-4 for name in expected)
    assert written == [8] * 6  # 48 rows; none in the second epoch, and none in the second run, of another rank


@pytest.mark.parametrize("flags", [["--quantize", "nf4"], ["--quantize", "nf4", "--method", "lora"]])
def test_a_quantised_run_learns_and_resumes_exactly(flags, train, tiny, tmp_path, monkeypatch):
    more = "--epochs 2 --save-every 2 --dtype bfloat16 --lr 1e-2 --micro-batch-size 8"
    flags = [*flags, *more.split()]
    assert train(tmp_path / "whole", *flags)[0] == 0
    tasks = [entry["task"] for entry in logged(tmp_path / "whole")]
    assert sum(tasks[-4:]) < sum(tasks[:4])

    with monkeypatch.context() as patch:
        stop_within(patch, train_nlg, 5, signal.SIGTERM)
        assert train(tmp_path / "parts", *flags)[0] == 128 + signal.SIGTERM
    assert len(logged(tmp_path / "parts")) == 5
    assert train(tmp_path / "parts", *flags, "--resume")[0] == 0
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    mb.load_adapter(mb.load_model(tiny), tmp_path / "parts")  # it is one of the original base


def test_a_bfloat16_run_learns_what_a_float32_run_learns(train, tmp_path):
    """The factors stay float32 and the weights are not rounded again: PEFT 0.21, which rounds both, learns less."""
    for dtype in ("float32", "bfloat16"):
        flags = ("--model", MODEL, "--micro-batch-size", "8", "--epochs", "2", "--lr", "5e-4", "--dtype", dtype)
        assert train(tmp_path / dtype, *flags)[0] == 0
    exact, rounded = (
        np.array([entry["task"] for entry in logged(tmp_path / dtype)]) for dtype in ("float32", "bfloat16")
    )
    epoch = len(exact) // 2
    gained = exact[:epoch].mean() - exact[epoch:].mean()
    assert gained > 0.1 * exact[:epoch].mean()
    assert abs(exact[epoch:].mean() - rounded[epoch:].mean()) < 0.05 * gained


@pytest.mark.parametrize("recipe, term", [("2024", "nuclear share: always -1"), ("iclr2026", "frobenius share: a sum")])
def test_the_plan_warns_once_of_a_spectral_term_of_fewer_tokens_than_its_k(recipe, term, train, tmp_path):
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps({"query": f"Is {n} even?", "response": "y"}) + "\n" for n in range(8)))
    status, printed, _ = train(tmp_path / "out", "--data", data, "--recipe", recipe, "--micro-batch-size", 2)
    lines = [line for line in printed.splitlines() if line.startswith("warning ")]
    assert status == 0 and len(lines) == 1 and lines[0].startswith(f"warning {term}")
    assert "svd" in logged(tmp_path / "out")[0]


def test_eval_adds_a_before_and_after_table(train, small_data, tmp_path):
    at_once = ("--batch-size", "48", "--micro-batch-size", "48")
    status, printed, _ = train(tmp_path / "out", "--max-steps", "1", "--eval", small_data, *at_once)
    assert status == 0
    assert "before     after" in printed and "exact match, addition (12)" in printed
    assert "95 % Wilson interval of the exact match of all: " in printed
    for moment in ("before", "after"):
        lines = (tmp_path / "out" / f"eval-{moment}.jsonl").read_text().splitlines()
        assert len(lines) == 48 and json.loads(lines[0])["prompt"].endswith("### Response:")


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_retained_text_is_in_the_table_the_report_and_the_log(method, in_command, flags_of, small_data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Ada has 3 apples. " * 30)
    flags = flags_of(tmp_path / "out", "--method", method, "--max-steps", 4, "--lr", 1e-2, "--retain", text, small_data)
    if method == "full":
        del flags[flags.index("--rank") : flags.index("--rank") + 2]
    status, printed, error = in_command(train_nlg.main, *flags, "--retain-every", 2)
    assert status == 0, error
    assert f"retain {text}, " in printed and f"\nloss on {text} " in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kinds = ["loss on", "KL(pre-trained ‖ tuned) on"] if method == "pissa" else ["loss on"]
    assert list(report["before"]) == [f"{kind} {path}" for path in (text, small_data) for kind in kinds]
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [name in entry for entry in entries for name in report["after"]] == len(report["after"]) * [False] + (
        len(report["after"]) * [True] + len(report["after"]) * [False] + len(report["after"]) * [True]
    )
    assert {name: entries[-1][name] for name in report["after"]} == pytest.approx(report["after"], rel=1e-5)
    if method == "pissa":
        name = f"KL(pre-trained ‖ tuned) on {text}"
        assert report["before"][name] == pytest.approx(0, abs=1e-5) and report["after"][name] > 1e-3


def test_an_eval_task_uses_the_benchmarks_prompt_and_judge_and_a_stopped_evaluation_resumes(train, tmp_path):
    held_out = tmp_path / "gsm8k.jsonl"
    rows = [
        {"question": f"What is {n} + 2?", "answer": f"{n} + 2 = <<{n}+2={n + 2}>>{n + 2}\n#### {n + 2}"}
        for n in range(5)
    ]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", MODEL, "--max-steps", "1", "--eval", held_out, "--eval-task", "gsm8k")
    assert train(tmp_path / "out", *flags)[0] == 0
    path = tmp_path / "out" / "eval-after.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    assert len(records) == 5 and all(record["prompt"].endswith("Let's think step by step.") for record in records)
    path.write_text("".join(lines[:3]))  # killed during the evaluation after training
    assert train(tmp_path / "out", *flags, "--resume")[0] == 0
    again = path.read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    assert sorted(json.loads(line)["prompt"] for line in again) == sorted(record["prompt"] for record in records)


@pytest.mark.parametrize("rank", ["3", "50"])
def test_the_adapter_is_saved_with_the_requested_rank(rank, train, tiny, tmp_path):
    assert train(tmp_path / "out", "--max-steps", "2", "--adapter-rank", rank)[0] == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == min(int(rank), 2 * 4)
    mb.load_adapter(mb.load_model(tiny), tmp_path / "out")


@pytest.mark.parametrize("recipe", ["2024", "iclr2026"])  # with the spectral term from the first step on, and without
def test_a_loss_that_is_not_finite_stops_with_step_and_rows_and_keeps_the_checkpoint(recipe, train, tmp_path):
    out = tmp_path / "out"
    flags = ("--save-every", "1", "--lr", "1e30", "--grad-clip", "1e30", "--recipe", recipe)
    status, _, error = train(out, *flags)
    assert status == 2
    last = error.splitlines()[-1]
    assert last.startswith("error: step 2: the loss is not finite (data lines ") and "--lr" in last
    assert load_file(out / "checkpoint" / "state.safetensors") and not (out / ADAPTER).exists()


def test_a_full_disk_is_status_1_and_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, calls = checkpoint.save_file, []

    def save_file(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) > 3:  # the initial factors and two checkpoints fit
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    status, _, error = train(out, "--save-every", "2")
    assert status == 1 and "the disk is full" in error.splitlines()[-1]
    assert {path.name for path in (out / "checkpoint").iterdir()} == {"initial.safetensors", "state.safetensors"}
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert train(out, "--save-every", "2", "--resume")[0] == 0


def test_no_argument_trains_the_built_in_model(tmp_path):
    """Runs one step of the README's command."""
    result = subprocess.run([sys.executable, SCRIPT, "--max-steps", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in out.iterdir()} == FILES | {"eval-before.jsonl", "eval-after.jsonl"}
    assert "loss on pre-training text" in result.stdout


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(train, tmp_path):
    adapters = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(tmp_path / name, "--max-steps", "2", "--method", "lora", "--seed", seed)[0] == 0
        adapters.append((tmp_path / name / ADAPTER).read_bytes())
    assert adapters[0] == adapters[1] != adapters[2]


def test_a_pad_token_beyond_the_vocabulary_is_harmless(train, tiny, small_data, tmp_path):
    """There are copies of LLaMA-2 with an added <pad> = 32000 but only 32000 embeddings."""
    model = shutil.copytree(tiny, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    contents = [f"<extra {n}>" for n in range(first, 512)] + ["<pad>"]
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][0] | {"id": first + index, "content": content}
        for index, content in enumerate(contents)
    ]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert mb.load_tokenizer(model).pad_id == 512
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(Path(small_data).read_text().splitlines(keepends=True)[:4]))
    assert train(tmp_path / "out", "--model", model, "--max-steps", "2", "--eval", held_out)[0] == 0


def test_a_resumed_run_may_take_smaller_micro_batches_and_needs_no_second_svd(train, tmp_path, monkeypatch):
    def small_svd(matrix, full_matrices):
        assert min(matrix.shape) <= 4, "the checkpoint has the factors"
        return real(matrix, full_matrices=full_matrices)

    real = torch.linalg.svd
    out = tmp_path / "out"
    assert train(out, "--recipe", "2024")[0] == 0
    monkeypatch.setattr(torch.linalg, "svd", small_svd)
    before = (out / ADAPTER).read_bytes()
    assert train(out, "--recipe", "2024", "--micro-batch-size", "2", "--resume")[0] == 0
    assert (out / ADAPTER).read_bytes() == before  # it had ended; its adapter is written once more


def test_a_damaged_log_is_cut_back_on_resume(train, tmp_path):
    out = tmp_path / "out"
    assert train(out, "--max-steps", "3")[0] == 0
    expected = logged(out)
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'3\n\xff\n{"a": 1}\n{"step": 9, "lo')
    assert train(out, "--max-steps", "3", "--resume")[0] == 0
    assert logged(out) == expected


def test_resuming_without_the_rest_of_the_command_is_reported(train, in_command, tmp_path):
    out = tmp_path / "out"
    assert train(out, "--max-steps", "1")[0] == 0
    status, _, error = in_command(train_nlg.main, "--out", out, "--resume")
    assert status == 2 and "had --model and --data" in error and len(error.splitlines()) == 1


def test_a_checkpoint_beyond_the_run_is_refused(train, tmp_path):
    out = tmp_path / "out"
    assert train(out, "--max-steps", "1")[0] == 0
    state = out / "checkpoint" / "state.safetensors"
    save_file(load_file(state), state, metadata={"step": "400"})
    status, _, error = train(out, "--max-steps", "1", "--resume")
    assert status == 2 and "step 400" in error and len(error.splitlines()) == 1


def test_files_that_are_not_ours_are_left_alone(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path, "--max-steps", "1")[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path / "checkpoint")
