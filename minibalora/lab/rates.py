"""What the runs that choose the rates tell: whether the ranges are wide enough, and how arms compare at the same rate.

Two arms may differ because they got different rates. These runs, which do not count, have every rate.
"""

from statistics import fmean

from minibalora.lab.results import CELL, grouped
from minibalora.sweep.intervals import interval_in_words

SWEEP = ("task", *CELL, "arm", "factor")


def choices_in_words(runs: list[dict]) -> list[str]:
    """Say how many sweeps chose the rate at an end of their range; [] if no run chose between rates.

    runs: as `results.read_runs` returns them.
    """
    lowest = highest = tied = complete = 0
    for sweep in grouped(runs, SWEEP).values():
        rates = grouped([run for run in sweep if run["tunes"]], ("lr",))
        chosen = {(run["lr"],) for run in sweep if run["counts"]}
        if len(rates) > 1 and chosen:
            complete += 1
            lowest += chosen == {min(rates)}
            highest += chosen == {max(rates)}
            tied += len({tuple(run["scores"]["dev"] for run in runs) for runs in rates.values()}) == 1
    words = (
        f"Of {complete} sweeps, {highest} chose the highest of their rates and {lowest} the lowest. In {tied} of them, "
        "all rates had the same dev score, so that the lowest was taken."
    )
    return [words] if complete else []


def table_at_same_rates(runs: list[dict], baseline: str, digits: int) -> str:
    """Return a Markdown table of the test scores minus the baseline's at the same rate and seed, of the arms that have
    its rates, and the mean of the cells with its 95 % interval; "" without such runs. runs: of one task and factor."""
    cells = grouped([run for run in runs if run["tunes"]], CELL)
    lines = []
    for arm in dict.fromkeys(run["arm"] for run in runs if run["arm"] != baseline):
        differences = [differences_at_same_rates(cell, arm, baseline) for cell in cells.values()]
        if any(differences):
            words = [range_in_words(values, digits) for values in differences]
            words.append(interval_in_words([fmean(values) for values in differences if values], digits, "+"))
            lines.append(f"| {arm} | " + " | ".join(words) + " |")
    names = [*map(", ".join, cells), "all cells, 95 % interval"]
    heading = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    return "\n".join(heading + lines) if lines else ""


def differences_at_same_rates(runs: list[dict], arm: str, baseline: str) -> list[float]:
    """Return the differences of an arm from the baseline, one for each rate and seed at which both are defined; [] if
    their rates differ."""
    own, base = ({(run["lr"], run["seed"]): run["scores"]["test"] for run in runs if run["arm"] == name}
                 for name in (arm, baseline))  # fmt: skip
    pairs = [(own[key], base[key]) for key in own] if own.keys() == base.keys() else []
    return [one - other for one, other in pairs if None not in (one, other)]


def range_in_words(values: list[float], digits: int) -> str:
    """Return the mean, the lowest and the highest value, such as +0.012 (-0.001 to +0.030)."""
    if not values:
        return "-"
    return f"{fmean(values):+.{digits}f} ({min(values):+.{digits}f} to {max(values):+.{digits}f})"
