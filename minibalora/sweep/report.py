"""Write the comparison of a sweep's runs as a table in text and as CSV files."""

import csv
import math
from pathlib import Path

from minibalora.base.files import replacing
from minibalora.sweep.comparison import Measurements, Row, baseline_of, is_lower_better, scores_of
from minibalora.sweep.intervals import mean_interval
from minibalora.sweep.results import DEV, Result

COLUMNS = ["method", "lr", "rates", "runs", "mean", "low", "high", "forgotten"]
COLUMNS += ["difference", "difference low", "difference high", "pairs"]


def table_of(rows: list[Row], baseline: str | None) -> list[dict]:
    """Return a dict of COLUMNS for each row, with None for what can't be said."""
    return [line_of(row, None if baseline is None else baseline_of(row, rows, baseline)) for row in rows]


def line_of(row: Row, base: Row | None) -> dict:
    scores = row.scores
    line = dict.fromkeys(COLUMNS) | {"method": row.label, "lr": row.lr, "rates": len(row.tuning), "runs": len(scores)}
    line |= dict(zip(("mean", "low", "high"), bounds(list(scores.values())), strict=True))
    line["forgotten"] = bounds(row.forgotten)[0]
    if base is not None and base is not row:
        pairs = [score - base.scores[seed] for seed, score in scores.items() if seed in base.scores]
        names = "difference", "difference low", "difference high"
        line |= dict(zip(names, bounds(pairs), strict=True)) | {"pairs": len(pairs)}
    return line


def bounds(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Return the mean and the ends of its 95 % interval; None for what there are too few values for."""
    if not values:
        return None, None, None
    mean, half = mean_interval(values)
    return (mean, None, None) if math.isnan(half) else (mean, mean - half, mean + half)


def in_words(table: list[dict], rows: list[Row], baseline: str | None, measurements: Measurements) -> str:
    """Return the table as text, below a line that says what was measured and how the rates were chosen."""
    largest = max((abs(line[name]) for line in table for name in ("mean", "difference") if line[name] is not None),
                  default=0)  # fmt: skip
    digits = 2 if largest >= 10 else 4
    headings = ["", "lr", "runs", "mean", "95 % interval", "forgotten"]
    headings += [f"minus {baseline}", "95 % interval", "pairs"] if baseline else []
    cells = [headings] + [cells_of(line, row, digits, baseline) for line, row in zip(table, rows, strict=True)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([explanation(rows, measurements), "", *lines])


def cells_of(line: dict, row: Row, digits: int, baseline: str | None) -> list[str]:
    def number(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.{digits}f}"

    def interval(low: float | None, high: float | None, sign: str = "") -> str:
        return "-" if low is None else f"{number(low, sign)} to {number(high, sign)}"

    ends = {min(row.tuning): "lowest", max(row.tuning): "highest"} if len(row.tuning) > 1 else {}
    cells = [line["method"], ", ".join([f"{line['lr']:g}", *filter(None, [ends.get(row.lr)])]), str(line["runs"])]
    cells += [number(line["mean"]), interval(line["low"], line["high"])]
    cells.append("-" if line["forgotten"] is None else f"{line['forgotten']:.4f}")
    if baseline:
        difference = interval(line["difference low"], line["difference high"], "+")
        cells += [number(line["difference"], "+"), difference, "-" if line["pairs"] is None else str(line["pairs"])]
    return cells


def explanation(rows: list[Row], measurements: Measurements) -> str:
    score, tune = measurements.score, measurements.tune
    lines = [f"{score}{', lower is better' if is_lower_better(score) else ''}; mean and 95 % interval over seeds by "
             "Student's t"]  # fmt: skip
    if measurements.forgotten is not None:
        lines.append(f"forgotten: mean rise of the {measurements.forgotten} by training")
    tuned = [row for row in rows if row.has_tune_seeds]
    if tuned:
        seeds = sorted({seed for row in tuned for results in row.tuning.values() for seed in scores_of(results, tune)})
        others = ", ".join(row.label for row in rows if not row.has_tune_seeds and len(row.rates) > 1)
        lines.append(f"rates chosen with {seeds_in_words(seeds)}, which do not count"
                     + (f", except for {others}: with the seeds that count" if others else ""))  # fmt: skip
    if any(len(row.tuning) > 1 for row in rows):
        lines.append(f"lr: of those tried, the one with the best mean of {tune}; lowest or highest: try one beyond it")
        sets = {name.partition(": ")[0] for row in rows for result in row.tuning[row.lr] for name in result.after
                if ": " in name}  # fmt: skip
        if tune == score or (tune == DEV and len(sets) == 1):
            lines.append("the rates were chosen on the rows that give the score, which flatters it")
    return "\n".join(lines)


def seeds_in_words(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def write_csv(path: Path, columns: list[str], lines: list[dict]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def write_runs(path: Path, results: list[Result], varied: list[str], tune_seeds: set[int]) -> None:
    """Write a line for each run: its folder, whether it only chose a rate, the settings that vary, and every
    measurement before and after."""
    lines = []
    for result in results:
        line = {"run": result.name} | {name: result.given.get(name) for name in varied}
        line |= {"tuning": result.settings["seed"] in tune_seeds} if tune_seeds else {}
        line |= {f"before: {name}": value for name, value in result.before.items()}
        lines.append(line | {f"after: {name}": value for name, value in result.after.items()})
    write_csv(path, list(dict.fromkeys(name for line in lines for name in line)), lines)
