"""Read the logs of runs and draw each term over the steps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minibalora.base.errors import InputError
from minibalora.base.files import recorded_settings
from minibalora.evaluation.plot_style import FIGURE, LINES, MOST, SMALL, WIDTH, add_legend, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Key in the log -> title of its panel, in the order of the panels. Noisy terms get a moving mean.
NOISY = {"loss": "loss", "task": "task", "consistency": "consistency", "diversity": "diversity"}
NOISY |= {"svd": "singular values", "non_target_kl": "non-target KL", "router_aux": "load balance of experts"}
NOISY |= {"orthogonality": "orthogonality of P and Q"}
PANELS = NOISY | {"lr": "learning rate", "dev": "dev metric"}
FEW = 20  # up to this many steps, a run is drawn as points, without a moving mean


@dataclass(frozen=True)
class Run:
    name: str
    terms: dict[str, np.ndarray]  # from `read_log`
    settings: dict  # from run.json; empty if there is none


def read_runs(folders: list[Path]) -> list[Run]:
    if len(folders) > MOST:
        raise InputError(f"{len(folders)} runs: at most {MOST} can be told apart in one picture")
    named = zip(short_names(folders), folders, strict=True)
    return [Run(name, read_log(folder / "log.jsonl"), recorded_settings(folder)) for name, folder in named]


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Return the steps and values (2, n) of each term in PANELS from a log.jsonl, without the steps that lack the term.

    Text after the last end of line is ignored, because it is still being written. Raises InputError for the first line
    that is not an entry, and if there are no entries.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give the folder of a run, its --out") from None
    terms, last = {key: [] for key in PANELS}, 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step, values = entry["step"], {key: entry[key] for key in PANELS if entry.get(key) is not None}
            is_finite = all(type(value) in (int, float) and abs(value) < 1e300 for value in (step, *values.values()))
            is_good = is_finite and step > last and {"loss", "lr"} <= values.keys()
        except (ValueError, TypeError, KeyError, RecursionError):
            is_good = False
        if not is_good:
            raise InputError(f"{path}, line {number}: not an entry of a run's log: mend it or leave this run out")
        last = step
        for key, value in values.items():
            terms[key].append((step, value))
    if not last:
        raise InputError(f"{path}: holds no step yet: wait for the first, or leave this run out")
    return {key: np.array(pairs, dtype=float).T for key, pairs in terms.items() if pairs}


def curves(runs: list[Run]) -> "Figure":
    """Draw a panel for each term and a line for each run: faint for each step, strong for the moving mean."""
    from matplotlib.figure import Figure

    titles = {key: title for key, title in PANELS.items() if any(key in run.terms for run in runs)}
    if "task" in titles and not any(task_differs(run.terms) for run in runs):
        del titles["task"]
        titles["loss"] = "loss ≈ task"
    keys, columns = list(titles), 2 if len(titles) in (2, 4) else 3
    rows = [keys[start : start + columns] for start in range(0, len(keys), columns)]
    figure = Figure(figsize=(WIDTH, 0.7 + 2.2 * len(rows)), **FIGURE)
    last = max(run.terms["loss"][0, -1] for run in runs)
    # Six columns, so that the last row's panels fill the width even if there are fewer.
    for key, axes in figure.subplot_mosaic([np.repeat(row, 6 // len(row)).tolist() for row in rows]).items():
        draw_term(axes, key, runs)
        axes.set(title=titles[key], xlim=(0, 1.02 * last), xlabel="step" if key in rows[-1] else "")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if any(run.terms["loss"].shape[1] > FEW for run in runs):
        figure.supxlabel("faint: each step; strong: mean of the nearest 5 % of the run's steps", **SMALL)
    add_legend(figure, [run.name for run in runs], LINES)
    return figure


def draw_term(axes: "Axes", key: str, runs: list[Run]) -> None:
    """Draw the term of each run that has it. The axis shows their `main_span`; a note above gives values beyond it."""
    from matplotlib.ticker import StrMethodFormatter

    drawn = {index: run.terms[key] for index, run in enumerate(runs) if key in run.terms}
    for index, (steps, values) in drawn.items():
        look = LINES[index] | {"marker": None if len(steps) > FEW else ".", "label": runs[index].name}
        # Two runs may have the same line, often the learning rate: the earlier one is wider and shows on both sides.
        hiding = sum(np.array_equal(values, later) for other, (_, later) in drawn.items() if other > index)
        width = 1.6 + min(1.2, 4 / len(runs)) * hiding
        if key in NOISY and len(steps) > FEW:
            axes.plot(steps, values, color=LINES[index]["color"], linewidth=0.6, alpha=0.3)
            axes.plot(steps, moving_mean(values), **look, linewidth=width)
        else:
            axes.plot(steps, values, **look, linewidth=width)
    spans = [main_span(values) if key in NOISY else (values.min(), values.max()) for _, values in drawn.values()]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    room = 0.05 * (high - low or abs(low) or 1)
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_formatter(
        StrMethodFormatter("{x:g}")
    )  # 2e-05 instead of 2 with the power at the end of the axis
    every = np.concatenate([values for _, values in drawn.values()])
    beyond = [f"down to {every.min():.3g}"] if every.min() < low - room else []
    beyond += [f"up to {every.max():.3g}"] if every.max() > high + room else []
    axes.set_title(", ".join(beyond), loc="right", **SMALL)
    units = {quantity(key, runs[index].settings) for index in drawn} - {""}
    axes.set_ylabel(units.pop() if len(units) == 1 else "")  # a label with several units would be too long


def task_differs(terms: dict[str, np.ndarray]) -> bool:
    """Return whether task and loss differ visibly: by more than 1 % of the loss panel's height."""
    (steps, loss), (task_steps, task) = terms["loss"], terms.get("task", np.empty((2, 0)))
    low, high = main_span(loss)
    return (abs(loss[np.isin(steps, task_steps)] - task) > 0.01 * (high - low)).any()


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean (n,) of each value and its neighbours, up to 2.5 % of n on either side."""
    half = round(0.025 * len(values))
    sums, counts = (np.convolve(row, np.ones(2 * half + 1)) for row in (values, np.ones(len(values))))
    return (sums / counts)[half : half + len(values)]


def main_span(values: np.ndarray) -> tuple[float, float]:
    """Return the lowest and highest value, but cut the outer 5 % at an end if they need twice the height of the rest.

    This keeps an extreme first step from squashing a run into a flat line.
    """
    low, high = np.quantile(values, 0.05, method="higher"), np.quantile(values, 0.95, method="lower")
    room = 2 * (high - low) if high > low else np.inf
    return max(values.min(), low - room), min(values.max(), high + room)


def quantity(key: str, settings: dict) -> str:
    """Return the unit of a term, which depends on task and recipe; "" if it has none or is unknown."""
    objective = settings.get("objective")
    if not isinstance(objective, dict):
        return ""
    loss = "squared error" if settings.get("labels") == [] else "nats"
    distance = "squared distance" if loss == "nats" and objective.get("consistency") != "kl" else loss
    divisor = "N" if objective.get("svd_norm") is None else "‖Z‖"
    units = {"loss": loss, "task": loss, "consistency": distance, "non_target_kl": "nats"}
    units["diversity"] = "squared covariance" if "labels" in settings else "−entropy, nats"
    units["svd"] = f"−Σ of {objective.get('svd_k')} largest σ / {divisor}"
    return units.get(key, "")
