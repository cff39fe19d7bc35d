"""Draw the laboratory's pictures: differences from PiSSA, the rare classes, the weights, the frontier."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minibalora.base.files import replacing
from minibalora.evaluation.plot_style import COLOURS, FIGURE, LINES, SMALL, WIDTH, add_legend, save_picture
from minibalora.evaluation.plot_sweep import frontier
from minibalora.lab.report import (
    BASELINE,
    RARE,
    TITLES,
    differences_of,
    excludes_zero,
    main_score,
    scores_of,
    value_of,
    with_weights,
)
from minibalora.lab.results import CELL, grouped
from minibalora.sweep.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100  # small, because pictures are committed
SMALLER = FIGURE | {"dpi": DPI}


def save_pictures(out: Path, runs: list[dict]) -> list[str]:
    """Save the pictures that the runs allow into `out`. Returns what to say about them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return [f"no pictures ({error}): pip install '.[plots]'"]
    pictures = {}
    for task in TITLES:
        part = [run for run in runs if run["task"] == task and run["counts"]]
        published = [run for run in part if run["factor"] == 1]
        if any(differences_of(cell, run["arm"], "test") for cell in grouped(published, CELL).values() for run in cell):
            pictures[f"{task}-differences"] = lambda runs=published, task=task: differences(runs, TITLES[task]["test"])
        if rare := [run for run in published if run["finetuning"] == "imbalanced"]:
            pictures["rare-recall"] = lambda runs=rare: recalls(runs)
        if any(run["factor"] != 1 for run in part):
            pictures[f"{task}-over-weights"] = lambda runs=part: over_weights(runs)
        for cell, here in grouped(published, CELL).items():
            own = [run for run in here if value_of(run["scores"], "KL") is not None]
            if own:
                pictures[f"{task}-{'-'.join(cell)}-frontier"] = lambda runs=own: forgetting(runs)
    for name, draw in pictures.items():
        save_picture(out / f"{name}.png", draw)
        with_palette(out / f"{name}.png")
    return [f"saved to {out / name}.png" for name in pictures]


def with_palette(path: Path) -> None:
    """Store a PNG with few colours, those of the pictures, their tints and greys: a third of the size.

    The palette is fixed, because one that is fitted to a picture merges colours of few pixels, such as two arms' lines.
    """
    from matplotlib.colors import to_rgb
    from PIL import Image  # matplotlib needs it, too

    own = np.array([to_rgb(colour) for colour in COLOURS])
    tints = np.concatenate([1 - share * (1 - own) for share in (1, 0.75, 0.5, 0.3, 0.1)])
    greys = np.linspace(0, 1, 16)[:, None].repeat(3, axis=1)
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * np.concatenate([tints, greys])).round().astype(int).ravel().tolist())
    with Image.open(path) as image:
        small = image.convert("RGB").reduce(image.width // (WIDTH * DPI))  # the frontier is drawn larger
        few = small.quantize(palette=palette, dither=Image.Dither.NONE)
    with replacing(path) as temporary:
        few.save(temporary, format="png", optimize=True)


def panels_for(
    count: int, columns: int, margin: float, height: float, is_shared: bool
) -> tuple["Figure", list["Axes"]]:
    """Return a figure and its panels, at most `columns` a row, the last row perhaps with empty places.

    margin, height: of the figure's edges and of a row, in inches. is_shared: the panels have the same axes.
    """
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, margin + rows * height), **SMALLER)
    panels = list(figure.subplots(rows, columns, sharex=is_shared, sharey=is_shared, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def add_title(axes: "Axes", cell: tuple[str, str], runs: list[dict]) -> None:
    """Say above a panel what was done, and how many seeds the arms have."""
    counts = [len({run["seed"] for run in runs if run["arm"] == arm}) for arm in {run["arm"] for run in runs}]
    seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else counts[0]
    axes.set_title(f"pre-trained: {cell[0]}\nfine-tuned: {cell[1]}\nseeds: {seeds}", fontsize=8)


def differences(runs: list[dict], title: str) -> "Figure":
    """Draw each arm's difference from PiSSA with its 95 % interval, a panel for each pre-training and fine-tuning."""
    from matplotlib.ticker import MaxNLocator

    cells = grouped(runs, CELL)
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in runs) if arm != BASELINE]
    figure, panels = panels_for(len(cells), 4, 0.6, 0.9 + 0.19 * len(arms), is_shared=True)
    for axes, (cell, here) in zip(panels, cells.items(), strict=True):
        for place, arm in enumerate(reversed(arms)):
            if pairs := differences_of(here, arm, "test"):
                mean, half = mean_interval(pairs)
                colour = "#999999" if not excludes_zero(pairs) else COLOURS[0] if mean > 0 else COLOURS[1]
                axes.errorbar(mean, place, xerr=0 if math.isnan(half) else half, fmt="o", color=colour, markersize=4,
                              capsize=2)  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelbottom=True)  # also above an empty place
        axes.set_yticks(range(len(arms)), reversed(arms))
        add_title(axes, cell, here)
    figure.supxlabel(f"difference from PiSSA in {title}\nmean and 95 % interval, paired by seed; right of the line: "
                     "better; blue or orange: the interval does not contain 0", **SMALL)  # fmt: skip
    return figure


def recalls(runs: list[dict]) -> "Figure":
    """Draw the recall of the rare classes of every run, a line for each arm, with the mean and its 95 % interval."""
    cells, arms = grouped(runs, CELL), list(dict.fromkeys(run["arm"] for run in runs))
    figure, panels = panels_for(len(cells), len(cells), 1.1, 0.26 * len(arms), is_shared=True)
    for axes, (cell, here) in zip(panels, cells.items(), strict=True):
        for place, arm in enumerate(reversed(arms)):
            if values := list(scores_of(here, arm, RARE).values()):
                mean, half = mean_interval(values)
                axes.plot(values, [place] * len(values), "o", color=COLOURS[5], markersize=4)
                axes.errorbar(mean, place, xerr=0 if math.isnan(half) else half, fmt="D", color=COLOURS[0],
                              markersize=5, capsize=3)  # fmt: skip
        axes.set_yticks(range(len(arms)), reversed(arms))
        add_title(axes, cell, here)
    figure.supxlabel(f"{RARE}, 0 to 1, higher is better\na dot: a run; diamond: their mean with its 95 % interval",
                     **SMALL)  # fmt: skip
    return figure


def over_weights(runs: list[dict]) -> "Figure":
    """Draw the score of each arm over the factor of its published weights, a panel for each cell that has several.

    runs: of one task.
    """
    parts = {}
    for finetuning in dict.fromkeys(run["finetuning"] for run in runs):
        several = with_weights([run for run in runs if run["finetuning"] == finetuning])
        parts |= {(pretraining, finetuning): part for pretraining, part in several.items()}
    arms = list(dict.fromkeys(run["arm"] for part in parts.values() for run in part))
    figure, panels = panels_for(len(parts), 2, 1.2, 3, is_shared=False)
    for axes, (cell, part) in zip(panels, parts.items(), strict=True):
        factors, score = sorted({run["factor"] for run in part}), main_score(cell[1])
        for index, arm in enumerate(arms):
            values = [list(scores_of([run for run in part if run["factor"] == factor], arm, score).values())
                      for factor in factors]  # fmt: skip
            means, halves = zip(*(mean_interval(one) if one else (math.nan, math.nan) for one in values), strict=True)
            places = np.arange(len(factors)) + 0.03 * (index - (len(arms) - 1) / 2)
            axes.errorbar(places, means, np.nan_to_num(halves), **LINES[index], marker="o", markersize=4, capsize=3)
        axes.set_xticks(range(len(factors)), [f"x {factor}" for factor in factors])
        title = score if score == RARE else TITLES[part[0]["task"]][score]
        axes.set_ylabel(f"{title}\n(higher is better)", fontsize=8)
        add_title(axes, cell, part)
    figure.supxlabel(f"factor of the weights; mean and 95 % interval over seeds; {BASELINE} has no terms", **SMALL)
    add_legend(figure, arms, LINES)
    return figure


def family_of(arm: str) -> str:
    """Return the hull of the frontier that an arm is in."""
    if arm.startswith("pissa +"):
        return "pissa + one term"
    return "ba-lora" if arm.startswith("ba-lora") else arm


def forgetting(runs: list[dict]) -> "Figure":
    """Draw what the runs of one cell learned against what they forgot, with a hull for each family of arms.

    runs: without those in full, which have no KL.
    """
    points = {}
    for run in runs:
        points.setdefault(family_of(run["arm"]), []).append((value_of(run["scores"], "KL"), run["scores"]["test"]))
    cell = f"pre-trained: {runs[0]['pretraining']}, fine-tuned: {runs[0]['finetuning']}"
    forgotten = f"KL(pre-trained ‖ tuned) on its corpus without errors, nats a token ({cell})"
    score = "exact match, percent (higher is better)"
    return frontier({name: np.array(pairs) for name, pairs in points.items()}, forgotten, score, False)
