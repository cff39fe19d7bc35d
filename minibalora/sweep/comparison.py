"""Compare methods: choose each one's learning rate, then its mean over seeds and its difference from a baseline."""

import math
from dataclasses import dataclass

from minibalora.base.errors import InputError
from minibalora.sweep.grid import PlannedRun, in_name
from minibalora.sweep.results import DEV, Result

UNGROUPED = ("lr", "seed")  # a rate is chosen, and seeds are averaged
LOSS, KL = "loss on ", "KL("  # how these measurements begin; a file's name, in front of others, may begin with KL


@dataclass(frozen=True)
class Measurements:
    """Which measurements of the runs to compare. Losses and divergences are better if they are lower."""

    score: str  # compared in the end
    tune: str  # chooses the learning rate
    forgotten: str | None  # None: nothing measures it


@dataclass(frozen=True)
class Row:
    """The runs of a method with the same settings except learning rate and seed."""

    method: str
    others: dict  # the flags that vary in the sweep, and are given in these runs
    tuning: dict[float, list[Result]]  # learning rate -> the runs that choose it; the same as `rates` by default
    rates: dict[float, list[Result]]  # learning rate -> the runs that count
    lr: float  # the chosen rate
    measurements: Measurements

    @property
    def label(self) -> str:
        return label_of(self.method, self.others)

    @property
    def has_tune_seeds(self) -> bool:
        return self.tuning is not self.rates

    @property
    def chosen(self) -> list[Result]:
        """The runs that count at the chosen rate."""
        return self.rates.get(self.lr, [])

    @property
    def scores(self) -> dict[int, float]:
        """The score of each seed at the chosen rate."""
        return scores_of(self.chosen, self.measurements.score)

    @property
    def forgotten(self) -> list[float]:
        """What the runs at the chosen rate forgot; [] if nothing measures it."""
        rises = [result.forgotten(self.measurements.forgotten) for result in self.chosen]
        return [rise for rise in rises if rise is not None]


def label_of(method: str, others: dict) -> str:
    return ", ".join([method, *(f"{name} {in_name(value)}" for name, value in others.items())])


def is_lower_better(measurement: str) -> bool:
    return measurement.startswith((LOSS, KL))


def scores_of(results: list[Result], measurement: str) -> dict[int, float]:
    """Return the measurement of each seed, without the runs that lack it."""
    scores = {result.settings["seed"]: result.after.get(measurement) for result in results}
    return {seed: score for seed, score in scores.items() if score is not None}


def choose_measurements(results: list[Result], score: str | None, tune: str | None, forgotten: str | None
                        ) -> Measurements:  # fmt: skip
    """Fill in what is not given. Raises InputError if no run has a measurement.

    score: the first metric of the last evaluation set, or the exact match, or the loss on held-out responses; tune: the
    score on the dev set, or `score`; forgotten: the KL, or a loss on text that was not trained on.
    """
    names = list(dict.fromkeys(name for result in results for name in result.after))
    for flag, name in {"--score": score, "--tune": tune, "--forgotten": forgotten}.items():
        if name is not None and name not in names:
            raise InputError(f"{flag} {name}: not measured: give one of {'; '.join(names)}")
    metric = results[0].dev_metric[:1]
    scores = [name for name in names if metric and name.endswith(f": {metric[0]}")][-1:]
    scores += [name for name in names if name.startswith("exact match, all")]
    scores += [name for name in names if name == "loss on held-out responses"]
    if score is None and not scores:
        raise InputError(f"the runs have no score of their own: give --score, one of {'; '.join(names) or 'none'}")
    score = score or scores[0]
    kept = [name for name in names if name.startswith(KL)]
    kept += [name for name in names if name.startswith(LOSS) and name != "loss on held-out responses"]
    return Measurements(score, tune or (DEV if DEV in names else score), forgotten or next(iter(kept), None))


def rows_of(results: list[Result], varied: list[str], measurements: Measurements, tune_seeds: list[int] = ()
            ) -> list[Row]:  # fmt: skip
    """Group the runs into rows, in the order of the runs, and choose the learning rate of each: by the runs with the
    tune seeds, which do not count, or by all if there are none."""
    groups = {}
    for result in results:
        others = others_of(result, varied)
        tuning, counted = groups.setdefault((result.settings["method"], repr(others)), (others, {}, {}))[1:]
        rates = tuning if result.settings["seed"] in tune_seeds else counted
        rates.setdefault(result.settings["lr"], []).append(result)
    rows = []
    for (method, _), (others, tuning, counted) in groups.items():
        counted = dict(sorted(counted.items()))
        tuning = dict(sorted(tuning.items())) or counted
        rows.append(Row(method, others, tuning, counted, best_rate(tuning, measurements), measurements))
    return rows


def others_of(run: Result | PlannedRun, varied: list[str]) -> dict:
    """Return the flags that tell a run's row from the others of its method."""
    names = [name for name in varied if name not in ("method", *UNGROUPED)]
    return {name: run.given[name] for name in names if run.given.get(name) is not None}


def best_rate(rates: dict[float, list[Result]], measurements: Measurements) -> float:
    """Return the rate with the best mean over seeds, among the rates with the most seeds: where a run has failed, the
    mean of the others would flatter the rate."""
    sign = -1 if is_lower_better(measurements.tune) else 1
    scores = {rate: list(scores_of(results, measurements.tune).values()) for rate, results in rates.items()}
    most = max(map(len, scores.values()))
    means = {rate: sign * math.fsum(values) / max(1, most) for rate, values in scores.items() if len(values) == most}
    return max(means, key=means.get)


def baseline_of(row: Row, rows: list[Row], baseline: str) -> Row | None:
    """Return the row with which to compare a row: the one of this label, or the one of this method that agrees with the
    row in all flags that vary among the method's rows. None if there are several or none."""
    if named := [other for other in rows if other.label == baseline]:
        return named[0] if len(named) == 1 else None
    candidates = [other for other in rows if other.method == baseline]
    if not candidates:
        raise InputError(f"--baseline {baseline}: no finished run: give one of {'; '.join(row.label for row in rows)}")
    names = {name for other in candidates for name in other.others}
    agreeing = [other for other in candidates if all(other.others.get(name) == row.others.get(name) for name in names)]
    chosen = candidates if len(candidates) == 1 else agreeing
    return chosen[0] if len(chosen) == 1 else None
