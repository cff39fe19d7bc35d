"""Choose the learning rate of each row by runs with seeds of their own, before the runs that count."""

from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.sweep.comparison import choose_measurements, label_of, others_of, rows_of
from minibalora.sweep.grid import PlannedRun, read_record
from minibalora.sweep.results import read_results, varied_flags


def check_seeds(runs: list[PlannedRun], tune_seeds: list[int], out: Path) -> None:
    """Raise InputError if a seed that is to count has chosen rates in another sweep of the folder `out`."""
    used = set(read_record(out)["tune_seeds"]).difference(tune_seeds)
    for seed in [run.settings["seed"] for run in runs if run.settings["seed"] in used]:
        raise InputError(f"--seed {seed}: was in --tune-seeds of a sweep in {out}: give other seeds or another --out")


def split_runs(runs: list[PlannedRun], tune_seeds: list[int]) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """Return the runs that choose rates, and those that count."""
    tuning = [run for run in runs if run.settings["seed"] in tune_seeds]
    return tuning, [run for run in runs if run.settings["seed"] not in tune_seeds]


def at_chosen_rates(runs: list[PlannedRun], tune_seeds: list[int], out: Path, measurements: tuple[str | None, ...]
                    ) -> tuple[list[PlannedRun], list[str]]:  # fmt: skip
    """Return the runs that count at the rate that the finished tuning runs choose for their row, and the labels of the
    rows without a finished tuning run, whose runs are left out. Without tune seeds, all runs are returned.

    measurements: what the user gave for --score, --tune and --forgotten.
    """
    tuning, counted = split_runs(runs, tune_seeds)
    if not tuning:
        return counted, []
    varied, results = varied_flags({run.name: run.given for run in runs}), read_results(out, given_of(tuning))
    rows = rows_of(results, varied, choose_measurements(results, *measurements), tune_seeds) if results else []
    rates = {row.label: row.lr for row in rows}
    labels = [label_of(run.settings["method"], others_of(run, varied)) for run in counted]
    chosen = [run for run, label in zip(counted, labels, strict=True) if rates.get(label) == run.settings["lr"]]
    return chosen, [label for label in dict.fromkeys(labels) if label not in rates]


def given_of(runs: list[PlannedRun]) -> dict[str, dict]:
    """Return the flags of each run by the name of its folder."""
    return {run.name: run.given for run in runs}
