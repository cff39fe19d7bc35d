"""Tests of the laboratory's experiment with MiniLM."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import GOLDEN, rows_of

from minibalora.lab import command, glue_data, minilm
from minibalora.lab.grid import words_of
from minibalora.sweep.grid import plan_runs
from minibalora.toy import BERT


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    """A folder as GLUE's: STS-B with 120 captions, 9 pairs from forums and 60 from the news in each file, CoLA with
    sentences from two books and in dev.tsv from a third, MRPC and RTE with 60 pairs in each file."""
    folder, rng = tmp_path_factory.mktemp("glue"), random.Random(0)
    for part in ("train", "dev"):
        genres = 120 * ["main-captions"] + 9 * ["main-forums"] + 60 * ["main-news"]
        rows = [[i, genre, f'{part} {genre} {i} "', "b", rng.randint(0, 50) / 10] for i, genre in enumerate(genres)]
        write_tsv(folder / "STS-B" / f"{part}.tsv", [["index", "genre", "sentence1", "sentence2", "score"], *rows])
        books = ("gj04", "bc01") if part == "train" else ("gj04", "swb04")
        rows = [[books[i % 2], i % 3 % 2, "*", f"{part} {books[i % 2]} {i}"] for i in range(60)]
        write_tsv(folder / "CoLA" / f"{part}.tsv", rows)
        rows = [[i % 2, i, i, f"{part} mrpc {i}", "same" if i % 2 else "not"] for i in range(60)]
        write_tsv(folder / "MRPC" / f"{part}.tsv", [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], *rows])
        rows = [[i, f"{part} rte {i}", "not" if i % 2 else "same", i % 2 * "not_" + "entailment"] for i in range(60)]
        write_tsv(folder / "RTE" / f"{part}.tsv", [["index", "sentence1", "sentence2", "label"], *rows])
    return folder


def write_tsv(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def few_rows_to_choose_by(monkeypatch):
    monkeypatch.setattr(glue_data, "DEV", 40)


def test_the_sets_share_no_row_and_a_fifth_of_the_wrong_scores_is_another_pairs(glue):
    sets = glue_data.stsb_scores(glue)
    assert {name: len(pairs) for name, pairs in sets.items()} == {
        "train": 80, "wrong": 80, "dev": 40, "test": 120, "other": 60
    }  # fmt: skip
    texts = {name: {pair.texts[0] for pair in pairs} for name, pairs in sets.items()}
    assert texts["train"] == texts["wrong"] and not texts["train"] & texts["dev"]
    assert all("dev main-captions" in text for text in texts["test"]) and all("news" in text for text in texts["other"])
    old, new = ([pair.label for pair in sets[name]] for name in ("train", "wrong"))
    changed = [one != two for one, two in zip(old, new, strict=True)]
    assert 12 <= sum(changed[:16]) and not any(changed[16:])  # a few scores equal those of the pair before
    assert sorted(old) == sorted(new)


def test_scores_are_rounded_to_classes_and_halves_upwards(glue):
    scores, classes = glue_data.stsb_scores(glue), glue_data.stsb_classes(glue)
    assert classes.keys() == scores.keys() - {"wrong"}
    for name, pairs in classes.items():
        assert [pair.texts for pair in pairs] == [pair.texts for pair in scores[name]]
        differences = [one.label - two.label for one, two in zip(pairs, scores[name], strict=True)]
        assert all(-0.5 < difference <= 0.5 for difference in differences)
        assert {type(pair.label) for pair in pairs} == {int}


def test_out_of_domain_are_sentences_of_other_books_and_pairs_of_another_task(glue, tmp_path):
    glue_data.write_glue_data(BERT, glue, ["cola", "mrpc", "rte"], tmp_path)
    rows = {(task, name): rows_of(tmp_path / task / f"{name}.jsonl")
            for task in ("cola", "mrpc", "rte") for name in ("train", "dev", "test", "other")}  # fmt: skip
    assert {name: len(rows["cola", name]) for name in ("train", "dev", "test", "other")} == {
        "train": 20, "dev": 40, "test": 30, "other": 30
    }  # fmt: skip
    assert all(row["sentence"].startswith("dev gj04") for row in rows["cola", "test"])
    assert all(row["sentence"].startswith("dev swb04") for row in rows["cola", "other"])
    for task, other in (("mrpc", "rte"), ("rte", "mrpc")):
        assert not {row["sentence1"] for row in rows[task, "train"]} & {row["sentence1"] for row in rows[task, "dev"]}
        assert all(f"dev {task}" in row["sentence1"] for row in rows[task, "test"])
        assert all(f"dev {other}" in row["sentence1"] for row in rows[task, "other"])
        same = 1 if task == "mrpc" else 0  # equivalent, or entailment
        for name in ("train", "dev", "test", "other"):
            assert all((row["label"] == same) == (row["sentence2"] == "same") for row in rows[task, name])


def test_other_files_and_another_model_in_the_same_folder_are_refused(glue, tmp_path, refuses):
    few, out = tmp_path / "few", tmp_path / "out"
    for name in ("train.tsv", "dev.tsv"):
        rows = [["index", "genre", "sentence1", "sentence2", "score"], [0, "main-news", "a", "b", 1.5]]
        write_tsv(few / "STS-B" / name, rows)
    refuses(
        lambda: glue_data.write_glue_data(BERT, few, ["stsb-scores"], out),
        "STS-B: has 0 rows to learn from, but more than 40",
    )
    write_tsv(few / "CoLA" / "train.tsv", [["sentence", "label"], ["a tea", 1]])
    refuses(lambda: glue_data.cola(few), "CoLA/train.tsv: has no column 'source': give GLUE's own file")
    write_tsv(few / "MRPC" / "train.tsv", [["sentence1", "sentence2", "label"], ["a", "b", 1], ["a", "b", -1]])
    refuses(lambda: glue_data.mrpc(few), "MRPC/train.tsv: 1 rows have no label")
    glue_data.write_glue_data(BERT, glue, ["mrpc"], out)
    refuses(
        lambda: glue_data.write_glue_data(GOLDEN / "bert", glue, ["mrpc"], out), "for another model: give another --out"
    )


def test_every_sweep_is_accepted_by_its_script(glue, tmp_path):
    glue_data.write_glue_data(BERT, glue, list(minilm.CELLS), tmp_path / "data")
    sweeps = [replace(sweep, seeds=sweep.seeds[:1]) for sweep in minilm.sweeps_with(BERT)]
    assert len({sweep.folder(tmp_path) for sweep in sweeps}) == len(sweeps) == 5 * 2 * 3  # tasks, labels, arms
    for sweep in sweeps:
        words = words_of(sweep, tmp_path)
        training = words[words.index("--model") :]
        runs = plan_runs(Path(words[1]), training, sweep.folder(tmp_path), list(sweep.tune_seeds))
        assert len(runs) == len(sweep.rates) * (len(sweep.tune_seeds) + 1)
        is_wrong, has_classes = sweep.finetuning == "wrong", sweep.task.name != "stsb-scores"
        for run in runs:
            assert Path(run.settings["data"]).stem == ("wrong" if is_wrong and not has_classes else "train")
            assert run.settings["label_noise"] == (0.2 if is_wrong and has_classes else 0)
            assert [Path(path).stem for path in run.settings["eval"]] == ["dev", "other", "test"]


def test_the_command_reports_the_chosen_tasks_and_repeats_nothing(glue, tmp_path, monkeypatch, capsys):
    one = {"lora": (1e-3,), "pissa": (5e-4,)}
    sweeps = [
        replace(sweep, seeds=(1,), task=replace(sweep.task, rates=one))
        for sweep in minilm.sweeps_with(BERT)
        if sweep.arm.name in one and sweep.finetuning == "wrong"
    ]
    monkeypatch.setattr(minilm, "sweeps_with", lambda model: sweeps)
    words = ["lab", "--minilm", str(BERT), str(glue), "--out", str(tmp_path / "lab"), "--jobs", "2"]
    words += ["--task", "stsb-scores", "cola"]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "0 models to pre-train, 4 of 4 sweeps with up to 8 runs: about" in said
    assert "4 runs count; failed: none" in said
    assert "stsb-scores, fine-tuned on wrong data: correlation with the scores of captions (Pearson)" in said
    assert "cola, fine-tuned on wrong data: Matthews correlation on sentences from other publications" in said
    runs = json.loads((tmp_path / "lab" / "results.json").read_text())
    assert {(run["task"], run["arm"]) for run in runs} == {
        (task, arm) for task in ("stsb-scores", "cola") for arm in one
    }
    assert all(run["scores"].keys() == {"dev", "test", "other"} for run in runs)
    assert command.main() == 0 and "0 of 4 sweeps with up to 0 runs" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--report"])
    assert command.main() == 0 and "4 runs count" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "part"), [
    (["--quick"], "leave out --quick"),
    (["--task", "bert"], "mrpc, cola, rte: give one of these, or leave out --minilm"),
    (["--report"], "holds no finished runs"),
])  # fmt: skip
def test_flags_of_the_other_experiment_and_a_report_on_nothing_are_refused(flags, part, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(sys, "argv", ["lab", "--minilm", str(BERT), "glue", "--out", str(tmp_path / "lab"), *flags])
    refuses(command.main, part)
    assert not (tmp_path / "lab").exists()
