"""Read what the runs of a sweep reached."""

from dataclasses import dataclass
from pathlib import Path

from minibalora.base.errors import InputError
from minibalora.base.files import read_json_object, recorded_settings, write_json
from minibalora.sweep.grid import CHANGE_NO_RESULT, PlannedRun, read_record
from minibalora.sweep.processes import is_finished

AGAIN = "remove the folder, and give the sweep's command again"
DEV = "dev"  # the score that chooses a classifier's best epoch


@dataclass(frozen=True)
class Result:
    """A finished run."""

    name: str  # of its folder
    given: dict  # the values of its flags
    settings: dict  # from run.json
    dev_metric: list[str]  # a classifier's metrics, the first of which is reported; [] for a language model
    before: dict[str, float | None]  # measurements before training, as in the script's table
    after: dict[str, float | None]

    def forgotten(self, measurement: str | None) -> float | None:
        """Return how much training raised a measurement; None if it was not measured."""
        before, after = self.before.get(measurement), self.after.get(measurement)
        return None if before is None or after is None else after - before


def record_runs(out: Path, script: str, runs: list[PlannedRun], tune_seeds: list[int] = ()) -> None:
    """Add the runs to sweep.json. Raises InputError if `out` holds runs of the other script."""
    record = read_record(out)
    if record["script"] not in (None, script):
        raise InputError(f"{out}: holds a sweep of {record['script']}: give another --out")
    seeds = sorted({*record["tune_seeds"], *tune_seeds})
    given = record["runs"] | {run.name: run.given for run in runs}
    write_json(out / "sweep.json", {"script": script, "tune_seeds": seeds, "runs": given})


def recorded_runs(out: Path) -> dict[str, dict]:
    """Return the flags of every run of the sweeps in `out`, by the name of its folder."""
    if not (out / "sweep.json").is_file():
        raise InputError(f"{out}: holds no sweep: give the --out of one")
    runs = read_record(out)["runs"]
    if not runs:
        raise InputError(f"{out / 'sweep.json'}: names no runs: give the sweep's command again")
    return runs


def varied_flags(runs: dict[str, dict]) -> list[str]:
    """Return the flags that have not the same value in all runs."""
    names = list(dict.fromkeys(name for given in runs.values() for name in given if name not in CHANGE_NO_RESULT))
    return [name for name in names if any(given.get(name) != next(iter(runs.values())).get(name)
                                          for given in runs.values())]  # fmt: skip


def read_results(out: Path, runs: dict[str, dict]) -> list[Result]:
    return [read_result(out / name, given) for name, given in runs.items() if is_finished(out / name)]


def read_result(folder: Path, given: dict) -> Result:
    """Read a run's report.json and run.json. Raises InputError for what no training script has written."""
    report, settings = read_json_object(folder / "report.json"), recorded_settings(folder)
    try:
        before, after = (flat(report.get(column, {})) for column in ("before", "after"))
        scores = [epoch["dev"] for epoch in report.get("epochs") or [] if epoch["dev"] is not None]
        if report.get("epochs"):
            after[DEV] = max(scores, default=None)
        measured = [*before.items(), *after.items()]
        wrong = [name for name, value in measured if not isinstance(value, int | float | None)]
    except (AttributeError, KeyError, TypeError):
        wrong = ["before, after or epochs"]
    if wrong:
        raise InputError(f"{folder / 'report.json'}: {wrong[0]} is damaged: {AGAIN}")
    if not isinstance(settings.get("objective"), dict) or not {"method", "lr", "seed"} <= settings.keys():
        raise InputError(f"{folder / 'run.json'}: the run's settings are missing: {AGAIN}")
    return Result(folder.name, given, settings, report.get("dev_metric", []), before, after)


def flat(column: dict) -> dict[str, float | None]:
    """Return a classifier's scores, which are grouped by evaluation set, as one column; any other column as it is."""
    numbers = {}
    for name, value in column.items():
        if isinstance(value, dict):
            numbers |= {f"{name}: {key}": score for key, score in value.items()}
        else:
            numbers[name] = value
    return numbers
