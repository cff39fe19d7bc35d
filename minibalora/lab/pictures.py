"""Draw the laboratory's pictures: differences to PiSSA, the rare classes, the weights, the frontier."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minibalora.evaluation.plot_style import COLOURS, FIGURE, LINES, SMALL, WIDTH, add_legend, save_picture
from minibalora.evaluation.plot_sweep import frontier
from minibalora.lab.report import BASELINE, RARE, TITLES, scores_of, value_of, with_weights
from minibalora.sweep.intervals import mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLER = FIGURE | {"dpi": 100}  # a few pictures that are committed
FAMILIES = ("full", "lora", "pissa", "dora", "ba-lora", "lora + iclr2026", "lora + non-target KL")  # of the frontier


def save_pictures(out: Path, runs: list[dict]) -> list[str]:
    """Save the pictures that the runs allow into `out`. Returns what to say about them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return [f"no pictures ({error}): pip install 'minibalora[plots]'"]
    bert, llama = ([run for run in runs if run["task"] == task] for task in TITLES)
    imbalanced = [run for run in bert if run["finetuning"] == "imbalanced"]
    pictures = {}
    for task, part in (("bert", bert), ("llama", llama)):
        if published := [run for run in part if run["factor"] == 1]:
            pictures[f"{task}-differences"] = lambda runs=published, task=task: differences(runs, TITLES[task]["test"])
    if imbalanced:
        pictures["rare-recall"] = lambda: dots([run for run in imbalanced if run["factor"] == 1], RARE)
    if len({run["factor"] for run in imbalanced}) > 1:
        pictures["over-weights"] = lambda: over_weights(with_weights(imbalanced), RARE)
    for pretraining in dict.fromkeys(run["pretraining"] for run in llama):
        own = [run for run in llama if run["pretraining"] == pretraining and run["factor"] == 1]
        if any(value_of(run["scores"], "KL") is not None for run in own):
            pictures[f"llama-{pretraining}-frontier"] = lambda runs=own: forgetting(runs)
    for name, draw in pictures.items():
        save_picture(out / f"{name}.png", draw)
    return [f"saved to {out / name}.png" for name in pictures]


def differences(runs: list[dict], title: str) -> "Figure":
    """Draw each arm's difference to PiSSA with its 95 % interval, a panel for each pre-training and fine-tuning."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys((run["finetuning"], run["pretraining"]) for run in runs))
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in runs) if arm != BASELINE]
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + rows * (0.8 + 0.19 * len(arms))), **SMALLER)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (finetuning, pretraining) in zip(panels.flat, cells, strict=False):
        here = [run for run in runs if (run["finetuning"], run["pretraining"]) == (finetuning, pretraining)]
        base = scores_of(here, BASELINE, "test")
        for place, arm in enumerate(reversed(arms)):
            own = scores_of(here, arm, "test")
            pairs = [own[seed] - base[seed] for seed in own if seed in base]
            if pairs:
                mean, half = mean_interval(pairs)
                colour = COLOURS[0] if mean - half > 0 else COLOURS[1] if mean + half < 0 else "#999999"
                axes.errorbar(mean, place, xerr=0 if math.isnan(half) else half, fmt="o", color=colour, markersize=4,
                              capsize=2)  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"pre-trained: {pretraining}\nfine-tuned: {finetuning}", fontsize=8)
        axes.set_yticks(range(len(arms)), reversed(arms))
    for axes in list(panels.flat)[len(cells) :]:
        axes.set_axis_off()
    seeds = len({run["seed"] for run in runs})
    figure.supxlabel(f"difference to PiSSA in {title}\nmean and 95 % interval of up to {seeds} seeds, paired; right of "
                     "the line: better; coloured: the interval does not contain 0", **SMALL)  # fmt: skip
    return figure


def dots(runs: list[dict], score: str) -> "Figure":
    """Draw the score of every run, a line for each arm, with the mean and its 95 % interval."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(WIDTH, 0.8 + 0.26 * len(arms)), **SMALLER)
    axes = figure.subplots()
    for place, arm in enumerate(reversed(arms)):
        values = list(scores_of(runs, arm, score).values())
        mean, half = mean_interval(values)
        axes.plot(values, [place] * len(values), "o", color=COLOURS[5], markersize=4, alpha=0.7)
        axes.errorbar(
            mean, place, xerr=0 if math.isnan(half) else half, fmt="D", color=COLOURS[0], markersize=5, capsize=3
        )
    axes.set_yticks(range(len(arms)), reversed(arms))
    axes.set_xlabel(f"{score}, 0 to 1")
    figure.supxlabel("a dot a run; diamond: their mean with its 95 % interval", **SMALL)
    return figure


def over_weights(runs: list[dict], score: str) -> "Figure":
    """Draw the score of each arm over the factor of its published weights."""
    from matplotlib.figure import Figure

    factors = sorted({run["factor"] for run in runs})
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(WIDTH, 4), **SMALLER)
    axes = figure.subplots()
    for index, arm in enumerate(arms):
        values = [list(scores_of([run for run in runs if run["factor"] == factor], arm, score).values())
                  for factor in factors]  # fmt: skip
        means, halves = zip(*(mean_interval(part) if part else (math.nan, math.nan) for part in values), strict=True)
        places = np.arange(len(factors)) + 0.03 * (index - (len(arms) - 1) / 2)
        axes.errorbar(places, means, np.nan_to_num(halves), **LINES[index], marker="o", markersize=4, capsize=3)
    axes.set_xticks(range(len(factors)), [f"published x {factor}" for factor in factors])
    axes.set(ylabel=score)
    figure.supxlabel(f"weights of the terms; mean and 95 % interval over seeds; {BASELINE} has no terms", **SMALL)
    add_legend(figure, arms, LINES)
    return figure


def forgetting(runs: list[dict]) -> "Figure":
    """Draw what runs from one pre-trained model learned against what they forgot, with a hull for each family of arms.
    A model that was tuned in full has no KL."""
    points = {}
    for run in runs:
        family = next(name for name in reversed(FAMILIES) if run["arm"].startswith(name))
        if (kl := value_of(run["scores"], "KL")) is not None:
            points.setdefault(family, []).append((kl, run["scores"]["test"]))
    title = "KL(pre-trained ‖ tuned) on its corpus without errors"
    return frontier({name: np.array(pairs) for name, pairs in points.items()}, title, "exact match, percent", False)
