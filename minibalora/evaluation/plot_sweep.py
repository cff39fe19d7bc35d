"""Draw the runs of a sweep: what was learned against what was forgotten, and the score over a setting."""

import math
from typing import TYPE_CHECKING

import numpy as np

from minibalora.evaluation.plot_style import FIGURE, LINES, POINTS, SMALL, WIDTH, add_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float, float]  # a setting's value, the mean, half the width of its interval (NaN: no interval)


def frontier(points: dict[str, np.ndarray], forgotten: str, score: str, is_lower_better: bool) -> "Figure":
    """Draw each method's points (n, 2), a run's forgotten and score, their convex hull, and the hull's good edge."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.6 * WIDTH), **FIGURE)
    axes = figure.subplots()
    every = np.concatenate(list(points.values()))[:, 0]
    is_log = every.min() > 0 and every.max() > 20 * every.min()
    for index, values in enumerate(points.values()):
        # The hull is convex in the picture, so its axis is logarithmic if that of the picture is.
        seen = np.stack([np.log(values[:, 0]) if is_log else values[:, 0], values[:, 1]], axis=1)
        hull, edge = values[convex_hull(seen)], values[good_edge(seen, -1 if is_lower_better else 1)]
        colour = POINTS[index]["color"]
        axes.scatter(*values.T, **POINTS[index], s=22, linewidths=0)
        axes.fill(*hull.T, color=colour, alpha=0.1, linewidth=0)
        axes.plot(*edge.T, color=colour, linewidth=1.6)
    axes.set(xlabel=f"forgotten: {forgotten}", ylabel=in_direction(score, is_lower_better))
    if is_log:
        axes.set_xscale("log")
    figure.supxlabel("a point a run; area: the convex hull of a method's runs; line: its edge towards a good score and "
                     "little forgotten", **SMALL)  # fmt: skip
    add_legend(figure, list(points), [look | {"linestyle": "-"} for look in POINTS])
    return figure


def score_over(lines: dict[str, list[Point]], setting: str, score: str, is_lower_better: bool) -> "Figure":
    """Draw a line for each method through its means at the values of a setting.

    The values are evenly spaced, because ranks and weights are tried in powers, with 0 among them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.45 * WIDTH + 0.1 * len(lines)), **FIGURE)
    axes = figure.subplots()
    ticks = sorted({value for points in lines.values() for value, _, _ in points})
    for index, points in enumerate(lines.values()):
        aside = min(0.05, 0.3 / len(lines)) * (index - (len(lines) - 1) / 2)  # so that bars do not hide each other
        values, means, halves = zip(*sorted(points), strict=True)
        places = [ticks.index(value) + aside for value in values]
        axes.errorbar(places, means, [0 if math.isnan(half) else half for half in halves], **LINES[index],
                      marker="o", markersize=4, linewidth=1.6, elinewidth=1, capsize=3)  # fmt: skip
    axes.set_xticks(range(len(ticks)), [f"{value:g}" for value in ticks])
    axes.set(xlabel=setting, ylabel=in_direction(score, is_lower_better))
    caption = "mean and 95 % interval over seeds"
    figure.supxlabel(caption if setting == "lr" else f"{caption}, each at its best learning rate", **SMALL)
    add_legend(figure, list(lines), LINES)
    return figure


def in_direction(score: str, is_lower_better: bool) -> str:
    return f"{score} (lower is better)" if is_lower_better else score


def convex_hull(points: np.ndarray) -> list[int]:
    """Return the indices of the corners of the convex hull of points (n, 2), counter-clockwise from the leftmost."""
    order = np.lexsort(points.T[::-1]).tolist()
    return chain(points, order)[:-1] + chain(points, order[::-1])[:-1] or order[:1]


def good_edge(points: np.ndarray, sign: int) -> list[int]:
    """Return the corners of the hull from the leftmost to the best score, the highest for sign 1, the lowest for −1."""
    upwards = points * [1, sign]
    order = np.lexsort([-upwards[:, 1], upwards[:, 0]]).tolist()
    upper = chain(upwards * [1, -1], order)  # mirrored, the upper chain is the lower one
    return upper[: max(range(len(upper)), key=lambda place: upwards[upper[place], 1]) + 1]


def chain(points: np.ndarray, order: list[int]) -> list[int]:
    """Return the corners that turn left when the points are visited in this order (Andrew's monotone chain)."""
    corners = []
    for index in order:
        while len(corners) > 1 and turn(points[corners[-2]], points[corners[-1]], points[index]) <= 0:
            corners.pop()
        corners.append(index)
    return corners


def turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Return twice the area of the triangle (a, b, c): positive if the way turns left at b."""
    return (b[0] - a[0]) * (c[1] - b[1]) - (b[1] - a[1]) * (c[0] - b[0])
