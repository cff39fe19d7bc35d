"""Choose the pictures that a sweep's runs allow, and save them."""

from pathlib import Path

import numpy as np

from minibalora.evaluation.plot_style import MOST, save_picture
from minibalora.evaluation.plot_sweep import Point, frontier, score_over
from minibalora.sweep.comparison import Measurements, Row, is_lower_better, label_of, scores_of
from minibalora.sweep.intervals import mean_interval
from minibalora.sweep.results import Result


def save_pictures(out: Path, rows: list[Row], varied: list[str], measurements: Measurements) -> list[str]:
    """Save frontier.png and a picture of the score over each setting that varies. Returns what to say about them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return [f"no pictures ({error}): pip install '.[plots]'"]
    pictures = {f"score-over-{name}": (score_over, lines_over(name, rows), name) for name in varied}
    pictures["frontier"] = (frontier, frontier_points(rows, measurements), f"rise of the {measurements.forgotten}")
    said = []
    for name, (draw, groups, quantity) in pictures.items():
        if len(groups) > MOST:
            said.append(f"no picture {name}: {len(groups)} methods, but at most {MOST} can be told apart")
        elif groups:
            path = out / f"{name}.png"
            what = groups, quantity, measurements.score, is_lower_better(measurements.score)
            save_picture(path, lambda draw=draw, what=what: draw(*what))
            said.append(f"saved to {path}")
    if measurements.forgotten is None:
        said.append("no picture of the frontier: the runs did not measure what they forgot")
    return said


def frontier_points(rows: list[Row], measurements: Measurements) -> dict[str, np.ndarray]:
    """Return (forgotten, score) of all runs of each method that count, (n, 2), whatever their learning rate."""
    points = {}
    for row in rows:
        for result in (result for results in row.rates.values() for result in results):
            pair = result.forgotten(measurements.forgotten), result.after.get(measurements.score)
            if None not in pair:
                points.setdefault(row.method, []).append(pair)
    return {method: np.array(pairs) for method, pairs in points.items()}


def lines_over(name: str, rows: list[Row]) -> dict[str, list[Point]]:
    """Return the points of each method over a setting; {} unless two values or more are numbers.

    Over the learning rate, each rate that was tried has a point, from the runs that choose it. Over another setting,
    each value has its best rate.
    """
    lines = {}
    for row in rows:
        label = label_of(row.method, {key: value for key, value in row.others.items() if key != name})
        for results in row.tuning.values() if name == "lr" else [row.chosen]:
            value = value_of(results[0], name) if results else None
            scores = scores_of(results, row.measurements.score)
            if isinstance(value, int | float) and not isinstance(value, bool) and scores:
                lines.setdefault(label, []).append((value, *mean_interval(list(scores.values()))))
    values = {value for points in lines.values() for value, _, _ in points}
    return lines if name != "seed" and len(values) > 1 else {}


def value_of(result: Result, name: str) -> object:
    """Return a run's setting. The weights of the objective have a value, often 0, even if no flag gives one."""
    return result.settings["objective"].get(name, result.given.get(name))
