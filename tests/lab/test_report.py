"""Tests of the laboratory's tables and pictures, on made-up runs."""

import random

import pytest

from minibalora.evaluation.plot_style import COLOURS
from minibalora.lab import minilm
from minibalora.lab.grid import FULL, TASKS, sweeps_of
from minibalora.lab.pictures import save_pictures, with_palette
from minibalora.lab.report import TITLES, table, write_tables
from minibalora.sweep.intervals import interval_in_words


def made_up_runs() -> list[dict]:
    """Return a run for each sweep and seed of the whole experiment. dora is 0.1 better than pissa, with every seed."""
    runs, rng = [], random.Random(0)
    for sweep in sweeps_of(FULL):
        for seed in sweep.seeds:
            by_seed = random.Random(f"{sweep.pretraining} {sweep.finetuning} {seed}").gauss(0, 0.05)
            test = 0.7 + by_seed + (0.1 if sweep.arm.name == "dora" else 0)
            test += 0 if sweep.arm.name in ("dora", "pissa") else rng.gauss(0, 0.04)
            scores = {"test": test, "other": test - 0.2, "recall of negative": 0.9, "recall of neutral": test}
            scores |= {"recall of positive": test - 0.3, "effective rank": 2.0}
            if sweep.task.name == "llama":
                scores = {"test": 100 * test, "other": 50 * test, "larger numbers": 1.0}
                scores |= {"forgotten": 0.01, "KL": None if sweep.arm.name == "full" else 0.01 + test**2 / 10}
                scores |= {"loss on wrong answers": 0.5, "typical error": 0.3 - test / 5}
            run = {"task": sweep.task.name, "pretraining": sweep.pretraining, "finetuning": sweep.finetuning}
            run |= {"arm": sweep.arm.name, "factor": sweep.factor, "lr": 1e-3, "seed": seed}
            runs.append(run | {"counts": True, "tunes": False, "scores": scores})
    return runs


CELL = {
    "task": "bert",
    "pretraining": "clean",
    "finetuning": "clean",
    "factor": 1,
    "lr": 1e-3,
    "counts": True,
    "tunes": False,
}


def test_the_table_has_means_paired_differences_and_counts():
    def run(arm: str, seed: int, test: float) -> dict:
        return CELL | {"arm": arm, "seed": seed, "scores": {"test": test}}

    runs = [run("pissa", 1, 0.5), run("pissa", 2, 0.7), run("lora", 1, 0.6), run("lora", 2, 0.8), run("lora", 3, 0.0)]
    excluded = {}
    lines = table(runs, "pretraining", "test", excluded).splitlines()
    assert lines[0] == "| | clean: mean | minus pissa | runs |" and lines[1] == "|---|---|---|---|"
    # t of 1 degree of freedom is 12.7, so the interval is 0.6 ± 12.7 · 0.1; the differences are 0.1 and 0.1
    assert lines[2] == "| pissa | 0.600 (-0.671 to 1.871) | - | 2 |"
    assert lines[3].startswith("| lora | 0.467 (") and lines[3].endswith(" | +0.100 (+0.100 to +0.100)* | 3 |")
    table(runs, "factor", "test", excluded)  # the same difference in another table counts once
    assert list(excluded.values()) == [True]


def test_intervals_with_one_or_no_run():
    assert interval_in_words([50.0, 50.0], 1) == "50.0 (50.0 to 50.0)"
    assert interval_in_words([], 1) == "-" and interval_in_words([0.25], 3, "+") == "+0.250"


def test_tables_tell_the_arm_that_differs_from_chance(tmp_path):
    text = write_tables(tmp_path, made_up_runs())
    assert text == (tmp_path / "tables.md").read_text()
    # bert's scores on three data sets, of which one has rare classes, llama's on two; both over the weights in one cell
    assert text.count("###") == 3 + 2 + 2 + 2 * 7 + 2
    (section,) = (part for part in text.split("### ") if part.startswith("bert, fine-tuned on imbalanced data: recall"))
    (dora,) = (line for line in section.splitlines() if line.startswith("| dora"))
    assert "+0.100 (+0.100 to +0.100)* | 8 |" in dora
    # Every star is counted: those of larger weights too, those of the published weights once although they stand twice.
    starred = sum(line.count("*") for section in text.split("### ")[1:] for line in section.splitlines()
                  if line.startswith("|") and " weights times" not in section.splitlines()[0])  # fmt: skip
    larger = sum("*" in cell for section in text.split("### ")[1:] if " weights times" in section.splitlines()[0]
                 for line in section.splitlines() if line.startswith("|") for cell in line.split("|")[5:])  # fmt: skip
    # bert: two scores in six cells, three in the seventh; llama: seven scores in two cells, but full has no KL
    intervals = 10 * (3 + 12) + 2 * (7 * 10 - 1) + 2 * 7 * 2
    assert f"{starred + larger} of {intervals} differences" in text


def test_tables_of_a_part_of_the_runs(tmp_path):
    assert "0 of 0 differences" in write_tables(tmp_path, [])
    some = [run for run in made_up_runs() if run["task"] == "bert" and run["arm"] != "pissa" and run["seed"] < 3]
    text = write_tables(tmp_path, some)
    assert "llama" not in text and "| 2 |" in text and "0 of 0 differences" in text


def test_pictures_are_small_and_follow_from_what_is_there(tmp_path):
    pytest.importorskip("matplotlib")
    runs = made_up_runs()
    said = save_pictures(tmp_path, runs)
    names = {path.name for path in tmp_path.iterdir()}
    frontiers = {f"llama-{cell}-frontier.png" for cell in ("noisy-wrong", "noisy-clean")}
    others = {"bert-differences.png", "llama-differences.png", "rare-recall.png", "bert-over-weights.png"}
    assert names == frontiers | others | {"llama-over-weights.png"} and len(said) == len(names)
    assert sum((tmp_path / name).stat().st_size for name in others) < 110_000
    few = [run for run in runs if run["task"] == "bert" and run["factor"] == 1 and run["finetuning"] != "imbalanced"]
    (tmp_path / "few").mkdir()
    assert save_pictures(tmp_path / "few", few[:1]) == []  # a single run of full: nothing to compare with
    pair = [run for run in few if run["arm"] in ("pissa", "lora")]
    assert save_pictures(tmp_path / "few", pair) == [f"saved to {tmp_path / 'few' / 'bert-differences.png'}"]


def test_runs_that_lack_scores_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [run for run in made_up_runs() if run["task"] == "bert" and run["finetuning"] == "imbalanced"]
    lacking = [run | {"scores": {"test": 0.5}} if run["arm"] == "lora" else run for run in runs]
    rare = next(part for part in write_tables(tmp_path, lacking).split("### ") if "data: recall" in part)
    assert "| lora | - | - | 0 |" in rare
    assert f"saved to {tmp_path / 'rare-recall.png'}" in save_pictures(tmp_path, lacking)


def test_small_pictures_keep_the_colours_of_the_arms_apart(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    picture = image.new("RGB", (900, 100), "white")
    for place, colour in enumerate(COLOURS):
        picture.putpixel((place, 0), tuple(bytes.fromhex(colour[1:])))
    picture.save(tmp_path / "a.png")
    with_palette(tmp_path / "a.png")
    with image.open(tmp_path / "a.png") as small:
        row = [small.convert("RGB").getpixel((place, 0)) for place in range(len(COLOURS))]
    assert small.mode == "P" and [f"#{bytes(colour).hex().upper()}" for colour in row] == list(COLOURS)


def test_every_task_has_titles_and_a_run_without_a_score_is_named(tmp_path):
    assert TITLES.keys() == {*TASKS, *minilm.CELLS}
    runs = [
        CELL | {"task": "cola", "arm": "pissa", "seed": seed, "scores": {"test": test, "other": 0.1}}
        for seed, test in ((1, 0.2), (2, None), (3, 0.4))
    ]
    text = write_tables(tmp_path, runs)
    assert "cola, clean, pissa, seed 2." in text and "0.300 (" in text and "| 2 |" in text
    assert "undefined" not in write_tables(tmp_path, runs[:1])
