"""Tests of the laboratory's experiment with MiniLM."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import GOLDEN, rows_of

from minibalora.lab import command, grid, minilm
from minibalora.lab.grid import words_of
from minibalora.sweep.grid import plan_runs
from minibalora.toy import BERT

HEADER = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()


@pytest.fixture(scope="module")
def stsb(tmp_path_factory) -> Path:
    """A folder as GLUE's STS-B: 120 captions, 9 pairs from forums and 60 from the news in each file."""
    folder, rng = tmp_path_factory.mktemp("glue") / "STS-B", random.Random(0)
    folder.mkdir()
    for part in ("train", "dev"):
        genres = 120 * ["main-captions"] + 9 * ["main-forums"] + 60 * ["main-news"]
        rows = [
            [str(i), genre, "-", "-", "-", "-", "-", f'{part} {genre} {i} "', "b", f"{rng.randint(0, 50) / 10}"]
            for i, genre in enumerate(genres)
        ]
        (folder / f"{part}.tsv").write_text("".join("\t".join(row) + "\n" for row in [HEADER, *rows]))
    return folder


@pytest.fixture(autouse=True)
def few_rows_to_choose_by(monkeypatch):
    monkeypatch.setattr(minilm, "DEV", 40)


def test_the_sets_share_no_row_and_a_fifth_of_the_wrong_scores_is_another_pairs(stsb, tmp_path):
    minilm.write_data(BERT, stsb, tmp_path)
    counts = {"train": 80, "wrong": 80, "dev": 40, "test": 120, "other": 60}
    scores = {name: rows_of(tmp_path / "stsb-scores" / f"{name}.jsonl") for name in counts}
    assert {name: len(rows) for name, rows in scores.items()} == counts
    texts = {name: {row["sentence1"] for row in rows} for name, rows in scores.items()}
    assert texts["train"] == texts["wrong"] and not texts["train"] & texts["dev"]
    assert all("dev main-captions" in text for text in texts["test"]) and all("news" in text for text in texts["other"])
    changed = [new != old for new, old in zip(scores["wrong"], scores["train"], strict=True)]
    assert 12 <= sum(changed[:16]) and not any(changed[16:])  # a few scores equal those of the pair before
    assert sorted(row["label"] for row in scores["wrong"]) == sorted(row["label"] for row in scores["train"])


def test_scores_are_rounded_to_classes_and_halves_upwards(stsb, tmp_path):
    minilm.write_data(BERT, stsb, tmp_path)
    for name in ("train", "dev", "test", "other"):
        scores, classes = (rows_of(tmp_path / f"stsb-{task}" / f"{name}.jsonl") for task in ("scores", "classes"))
        assert [row["sentence1"] for row in scores] == [row["sentence1"] for row in classes]
        differences = [one["label"] - two["label"] for one, two in zip(classes, scores, strict=True)]
        assert all(-0.5 < difference <= 0.5 for difference in differences)
    assert {type(row["label"]) for row in classes} == {int} and not (tmp_path / "stsb-classes" / "wrong.jsonl").exists()


def test_other_files_and_another_model_in_the_same_folder_are_refused(stsb, tmp_path, refuses):
    few, out = tmp_path / "few", tmp_path / "out"
    few.mkdir()
    (few / "train.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t1.5\n")
    refuses(lambda: minilm.write_data(BERT, few, out), "0 pairs of genre main-captions and 0 of main-news")
    minilm.write_data(BERT, stsb, out)
    refuses(lambda: minilm.write_data(GOLDEN / "bert", stsb, out), "laboratory, or model: give another --out")


def test_every_sweep_is_accepted_by_its_script(stsb, tmp_path):
    minilm.write_data(BERT, stsb, tmp_path / "data")
    sweeps = [replace(sweep, seeds=sweep.seeds[:1]) for sweep in minilm.sweeps_with(BERT)]
    assert len({sweep.folder(tmp_path) for sweep in sweeps}) == len(sweeps) == 3 * 3  # cells, arms
    for sweep in sweeps:
        words = words_of(sweep, tmp_path)
        training = words[words.index("--model") :]
        runs = plan_runs(Path(words[1]), training, sweep.folder(tmp_path), list(grid.TUNE_SEEDS))
        assert len(runs) == len(sweep.rates) * (len(grid.TUNE_SEEDS) + 1)
        is_wrong, has_classes = sweep.finetuning == "wrong", sweep.task.name == "stsb-classes"
        for run in runs:
            assert Path(run.settings["data"]).stem == ("wrong" if is_wrong and not has_classes else "train")
            assert run.settings["label_noise"] == (0.2 if is_wrong and has_classes else 0)
            assert [Path(path).stem for path in run.settings["eval"]] == ["dev", "other", "test"]


def test_the_command_reports_both_tasks_and_repeats_nothing(stsb, tmp_path, monkeypatch, capsys):
    one = {"lora": (1e-3,), "pissa": (5e-4,)}
    sweeps = [
        replace(sweep, seeds=(1,), task=replace(sweep.task, rates=one))
        for sweep in minilm.sweeps_with(BERT)
        if sweep.arm.name in one and sweep.finetuning == "wrong"
    ]
    monkeypatch.setattr(minilm, "sweeps_with", lambda model: sweeps)
    words = ["lab", "--minilm", str(BERT), str(stsb), "--out", str(tmp_path / "lab"), "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "0 models to pre-train, 4 of 4 sweeps with up to 8 runs: about" in said
    assert "4 runs count; failed: none" in said
    assert "stsb-scores, fine-tuned on wrong data: correlation with the scores of captions (Pearson)" in said
    runs = json.loads((tmp_path / "lab" / "results.json").read_text())
    assert {(run["task"], run["arm"]) for run in runs} == {(task, arm) for task in minilm.WORDS for arm in one}
    assert all(run["scores"].keys() == {"test", "other"} for run in runs)
    assert command.main() == 0 and "0 of 4 sweeps with up to 0 runs" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--report"])
    assert command.main() == 0 and "4 runs count" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "part"), [
    (["--quick"], "leave out --quick and --task"),
    (["--task", "bert"], "leave out --quick and --task"),
    (["--report"], "holds no finished runs"),
])  # fmt: skip
def test_flags_of_the_other_experiment_and_a_report_on_nothing_are_refused(flags, part, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(sys, "argv", ["lab", "--minilm", str(BERT), "stsb", "--out", str(tmp_path / "lab"), *flags])
    refuses(command.main, part)
    assert not (tmp_path / "lab").exists()
