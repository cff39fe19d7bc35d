"""Tests of the laboratory's grid, data and command."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import rows_of

from minibalora.base.errors import InputError
from minibalora.lab import command, data, grid, results
from minibalora.lab.grid import ARMS, FULL, QUICK, sweeps_of, words_of
from minibalora.sweep.grid import plan_runs
from minibalora.sweep.results import Result
from minibalora.toy import problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lab")
    data.write_data(out / "data")
    return out


def test_every_sweep_is_accepted_by_its_script_and_has_a_folder_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(grid, "model_of", lambda task, pretraining, out: task.model)
    sweeps = sweeps_of(FULL) + sweeps_of(QUICK)
    assert len({sweep.folder(folder) for sweep in sweeps}) == len(sweeps)
    for sweep in (replace(sweep, seeds=sweep.seeds[:1]) for sweep in sweeps):  # all seeds take half a minute more
        words = words_of(sweep, folder)
        script, training = Path(words[1]), words[words.index("--model") :]
        if "--tune" in training:
            place = training.index("--tune")
            del training[place : place + 2]
        runs = plan_runs(script, training, sweep.folder(folder), list(sweep.tune_seeds))
        assert len(runs) == len(sweep.rates) * (len(sweep.tune_seeds) + len(sweep.seeds))
        assert {run.settings["method"] for run in runs} == {sweep.arm.method}


def test_the_factor_multiplies_the_published_weights_and_an_arm_keeps_only_its_own():
    sweeps = {(sweep.task.name, sweep.arm.name, sweep.factor): grid.weights_of(sweep) for sweep in sweeps_of(FULL)}
    assert sweeps["bert", "pissa", 1] == sweeps["llama", "full", 1] == []
    words = ["--recipe", "iclr2026", "--lambda1", "1.5", "--lambda2", "0.3", "--lambda3", "0.3"]
    assert sweeps["bert", "ba-lora iclr2026", 10] == words
    assert sweeps["bert", "ba-lora iclr2026", 1] == ["--recipe", "iclr2026"]
    words = ["--recipe", "iclr2026", "--lambda1", "0", "--lambda2", "0.5", "--lambda3", "0"]
    assert sweeps["llama", "pissa + diversity", 100] == words
    assert sweeps["llama", "lora + non-target KL", 1] == ["--non-target-kl", "0.1"]
    assert sweeps["bert", "pissa + spectral", 1][-2:] == ["--svd-k", 1]
    assert ("bert", "lora", 10) not in sweeps


def test_the_whole_experiment_has_the_arms_cells_and_seeds_that_it_promises():
    sweeps = sweeps_of(FULL)
    first = [sweep for sweep in sweeps if sweep.factor == 1]
    assert sweeps[: len(first)] == first and len(first) == 11 * (7 + 2) and len(ARMS) == 11
    assert all(len(sweep.seeds) == 8 and not set(sweep.seeds) & set(sweep.tune_seeds) for sweep in sweeps)
    assert {len(sweep.tune_seeds) for sweep in first if sweep.finetuning == "imbalanced"} == {3}
    cells = {(sweep.task.name, sweep.pretraining, sweep.finetuning) for sweep in first}
    assert {("bert", name, ft) for name in ("clean", "noisy", "imbalanced") for ft in ("clean", "wrong")} <= cells


def test_the_whole_is_sized_for_three_hours_on_two_cores():
    sweeps = sweeps_of(FULL)
    models = [task.seconds_of_pretraining for task, _ in grid.models_of(sweeps, Path("out")).values()]
    runs = [sweep.run_count * sweep.task.seconds for sweep in sweeps]
    assert len(models) == 6 and sum(models) + sum(runs) <= 2 * 3 * 3600


def test_the_data_are_disjoint_and_as_described(folder):
    train, dev, test, other = (rows_of(folder / "data" / "bert" / f"{name}.jsonl")
                               for name in ("train", "dev", "test", "other"))  # fmt: skip
    assert [len(rows) for rows in (train, dev, test, other)] == [data.ROWS, data.DEV, data.TEST, data.TEST]
    texts = [{row["text"] for row in rows} for rows in (train, dev, test, other)]
    assert len(texts[0] & (texts[1] | texts[2])) < 15 and not texts[3] & texts[0]  # short texts: a few coincide
    imbalanced = rows_of(folder / "data" / "bert" / "imbalanced.jsonl")
    labels = [row["label"] for row in imbalanced]
    assert len(labels) == data.ROWS and 9 < labels.count("negative") / labels.count("positive") < 11
    wrong, right = (rows_of(folder / "data" / "llama" / f"{name}.jsonl") for name in ("wrong", "train"))
    assert [row["query"] for row in wrong] == [row["query"] for row in right]
    assert 0.15 < sum(row not in right for row in wrong) / len(wrong) < 0.25
    held_out = rows_of(folder / "data" / "llama" / "test.jsonl")
    assert f"({sum(row['type'] == data.DEV_KIND for row in held_out)})" in grid.TASKS["llama"].tune
    assert {row["type"] for row in held_out} == {*problems.KINDS, data.DEV_KIND, *data.OTHERS}


def test_data_of_another_version_are_not_replaced(tmp_path):
    data.write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    data.write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="a.jsonl: was written by another version of the laboratory"):
        data.write_rows(tmp_path / "a.jsonl", [{"text": "b"}])
    assert rows_of(tmp_path / "a.jsonl") == [{"text": "a"}]


def test_only_runs_at_the_chosen_rate_count(tmp_path, monkeypatch):
    def result(lr: float, seed: int, dev: float) -> Result:
        settings = {"lr": lr, "seed": seed, "method": "pissa"}
        return Result(f"{lr} {seed}", {}, settings, ["accuracy"], {}, {"dev": dev, "test.jsonl: accuracy": dev})

    sweep = next(sweep for sweep in sweeps_of(FULL) if sweep.arm.name == "pissa")
    tuning = [result(rate, seed, dev) for rate, dev in zip(sweep.rates, (0.5, 0.9, 0.7, 0.6), strict=True)
              for seed in sweep.tune_seeds]  # fmt: skip
    runs = [result(sweep.rates[1], seed, 0.8) for seed in sweep.seeds]
    other_rate = result(sweep.rates[2], 8, 1.0)  # from before a tuning run was done again
    monkeypatch.setattr(results, "finished", lambda sweep, out: [*tuning, *runs[:-1], other_rate])
    assert results.row_of(results.finished(sweep, tmp_path), sweep).chosen == runs[:-1] and not results.is_complete(
        sweep, tmp_path
    )
    monkeypatch.setattr(results, "finished", lambda sweep, out: [*tuning, *runs, other_rate])
    assert results.row_of(results.finished(sweep, tmp_path), sweep).chosen == runs and results.is_complete(
        sweep, tmp_path
    )
    monkeypatch.setattr(results, "finished", lambda sweep, out: [*tuning[:-1], *runs])
    assert not results.is_complete(sweep, tmp_path)


def test_the_typical_error_is_the_sum_of_all_numbers(tmp_path):
    def record(kind: str, numbers: str, answer: str, right: str) -> dict:
        prompt = f"Below is 1 task.\n\n### Instruction:\nAda has {numbers}.\n\n### Response:"
        return {
            "kind": kind,
            "prompt": prompt,
            "answer": answer,
            "reference": f"...\n#### {right}\nThe answer is: {right}",
        }

    records = [record("subtraction", "9 and 3", "12", "6"), record("multiplication", "2 and 5", "10", "10")]
    records += [record("addition", "9 and 3", "12", "12"), record("multiplication", "2 and 2", "4", "4")]
    records += [record("other sentences", "9 and 3", "12", "6")]
    (tmp_path / "eval-after.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert results.typical_error(tmp_path / "eval-after.jsonl") == 0.5  # additions, equal sums and others do not count


def test_the_command_repeats_nothing_and_refuses_runs_of_another_command(tmp_path, monkeypatch, capsys, refuses):
    monkeypatch.setattr(data, "ROWS", 64)
    monkeypatch.setattr(data, "TEST", 60)
    bert = grid.TASKS["bert"]
    two_rates = {method: rates[:2] for method, rates in bert.rates.items()}
    monkeypatch.setitem(grid.TASKS, "bert", replace(bert, rates=two_rates))
    monkeypatch.setattr(command, "QUICK", replace(QUICK, arms=("lora", "pissa"), seeds=(1, 2)))
    words = ["lab", "--quick", "--task", "bert", "--out", str(tmp_path / "lab"), "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "0 models to pre-train, 2 of 2 sweeps with up to 8 runs: about" in said
    assert "4 runs count; failed: none" in said and re.search(r"\| lora \| 0\.\d+ \(", said)
    runs = json.loads((tmp_path / "lab" / "results.json").read_text())
    counting = [(run["arm"], run["seed"]) for run in runs if run["counts"]]
    assert counting == [("lora", 1), ("lora", 2), ("pissa", 1), ("pissa", 2)]
    assert [run["seed"] for run in runs if run["tunes"]] == 4 * [grid.TUNE_SEEDS[0]]
    rates = {rate for two in two_rates.values() for rate in two}
    assert all(
        run["lr"] in rates and 0 <= run["scores"]["dev"] <= 1 and 0 <= run["scores"]["test"] <= 1 for run in runs
    )
    assert json.loads((tmp_path / "lab" / "inherited.json").read_text())["bert-built-in"]["accuracy"] > 0.9
    assert command.main() == 0 and "0 of 2 sweeps with up to 0 runs" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--report"])
    assert command.main() == 0 and "4 runs count" in capsys.readouterr().out
    monkeypatch.setitem(grid.TASKS, "bert", replace(grid.TASKS["bert"], words=(*bert.words, "--batch-size", "8")))
    monkeypatch.setattr(sys, "argv", words)
    refuses(command.main, "lora.jsonl: was written by another version", "give another --out")
