"""Pictures: the terms of runs over their steps, and t-SNE of features before and after training; see `--help`.

Needs matplotlib, for t-SNE scikit-learn too: pip install 'minibalora[plots]'. Both are imported where they are used, so
that nothing else needs them. Figures are made without pyplot: no window, no backend, no global setting.
"""

import argparse
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_file, replacing
from minibalora.run.run_folder import recorded_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
# Key in the log -> title of its panel, in the order of the panels.
NOISY = {"loss": "loss", "task": "task", "consistency": "consistency", "diversity": "diversity"}
NOISY |= {"svd": "singular values", "non_target_kl": "non-target KL", "router_aux": "load balance of experts"}
PANELS = NOISY | {"lr": "learning rate", "dev": "dev metric"}
# Okabe and Ito's colours, which colour-blind people can tell apart; a brown for their yellow, too pale for a line.
# What is beyond eight gets another line or marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "^", "s", "X")
MOST = len(COLOURS) * len(LINES)
GREY = "#555555"
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.edgecolor": "#999999"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E8E8E8"}
STYLE |= {"axes.axisbelow": True, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
WIDTH, DPI = 9, 200  # inches, for which the font sizes are meant: 1800 pixels, to be shown at 900
NEIGHBOURS = 5


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    check_out(args.out)
    needed = ("matplotlib", "sklearn") if args.features else ("matplotlib",)
    check_installed(*needed)
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = tsne(read_features(args.features, args.max_rows)) if args.features else curves(read_runs(args.runs))
        with replacing(args.out) as temporary:
            figure.savefig(temporary, format=picture_format(args.out))
    print(f"saved to {args.out}")
    return 0


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """InputError in place of argparse's two lines."""
    parser = cli.OneLineParser(
        prog="python -m minibalora plot",
        description="Draw the log of one or more runs, one panel a term; or, with --features, t-SNE of the features "
        "that train_nlu.py --features saved, before and after, as in the paper's figures 5 to 8.",
    )
    add = parser.add_argument
    add("runs", nargs="*", type=cli.path, metavar="run", help="a run's folder, its --out; several are drawn together")
    add("--features", nargs="+", type=cli.path, metavar="FILE", help="what train_nlu.py --features wrote; a row each")
    add("--max-rows", type=cli.positive_int, metavar="N", help="t-SNE of N random rows (default: 2000, half a minute)")
    add("-o", "--out", type=cli.path, required=True, metavar="FILE", help="picture: .png, .pdf or .svg; is replaced")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.features):
        raise InputError("give the folders of runs or --features, one of them: see --help")
    if args.max_rows is not None and not args.features:
        raise InputError("--max-rows is of --features: leave it out, a run's log is drawn whole")
    args.max_rows = 2000 if args.max_rows is None else args.max_rows
    return args


def picture_format(path: Path) -> str:
    return path.suffix[1:].lower()


def check_out(path: Path) -> None:
    """InputError if no picture can be written to `path`, which would be known only after t-SNE."""
    if picture_format(path) not in FORMATS:
        raise InputError(f"--out {path}: no picture's name: end it in .{', .'.join(FORMATS[:-1])} or .{FORMATS[-1]}")
    check_file(path, "--out")


def check_installed(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"can't import {module} ({error}): pip install 'minibalora[plots]'") from None


def short_names(paths: list[Path]) -> list[str]:
    """The shortest end of each path that no other path ends in; InputError if one is named twice."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for path, own in zip(paths, parts, strict=True):
        if parts.count(own) > 1:
            raise InputError(f"{path} is named twice: name it once")

    def shortest(own: tuple[str, ...]) -> str:
        ends = (own[-length:] for length in range(1, len(own) + 1))
        return str(Path(*next(end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)))

    return [shortest(own) for own in parts]


# Runs


@dataclass(frozen=True)
class Run:
    name: str
    entries: list[dict]  # of log.jsonl
    settings: dict  # of run.json; empty if there is none

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and values (n,), without the steps at which the term was not computed."""
        known = [(entry["step"], entry[key]) for entry in self.entries if entry.get(key) is not None]
        return tuple(np.array(known, dtype=float).reshape(-1, 2).T)


def read_runs(folders: list[Path]) -> list[Run]:
    if len(folders) > MOST:
        raise InputError(f"{len(folders)} runs: at most {MOST} can be told apart in one picture")
    runs = []
    for name, folder in zip(short_names(folders), folders, strict=True):
        runs.append(Run(name, read_log(folder / "log.jsonl"), recorded_settings(folder)))
    return runs


def read_log(path: Path) -> list[dict]:
    """The entries of a log.jsonl, without what follows the last end of line: that is still being written.

    InputError if there is none, or names the first line that is not an entry.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give the folder of a run, its --out") from None
    entries, last = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not is_entry(entry) or entry["step"] <= last:
            raise InputError(f"{path}, line {number}: not an entry of a run's log: mend it or leave this run out")
        entries.append(entry)
        last = entry["step"]
    if not entries:
        raise InputError(f"{path}: holds no step yet: wait for the first, or leave this run out")
    return entries


def is_entry(entry: object) -> bool:
    """An object with a step, a loss and a rate, and with a finite number or null for whatever else we draw."""
    if not isinstance(entry, dict):
        return False
    values = [entry.get(key) for key in ("step", *PANELS)]
    are_numbers = all(type(value) in (int, float) and abs(value) < 1e300 for value in values if value is not None)
    return are_numbers and None not in (entry.get("step"), entry.get("loss"), entry.get("lr"))


def curves(runs: list[Run]) -> "Figure":
    """One panel for each term that a run has, one line a run: each step faint, and their moving mean over it."""
    from matplotlib.figure import Figure

    shown = [key for key in PANELS if any(len(run.series(key)[0]) for run in runs)]
    is_task_loss = "task" in shown and not any(task_differs(run) for run in runs)
    if is_task_loss:
        shown.remove("task")
    columns = 2 if len(shown) in (2, 4) else min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.2 * rows), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(rows, 6)
    last = max(run.entries[-1]["step"] for run in runs)
    for index, key in enumerate(shown):
        row, column = divmod(index, columns)
        wide = 6 // min(columns, len(shown) - row * columns)  # the last row's panels share the whole width
        axes = figure.add_subplot(grid[row, column * wide : (column + 1) * wide])
        axes.set_title("loss ≈ task" if key == "loss" and is_task_loss else PANELS[key])
        draw_term(axes, key, runs)
        axes.set_xlim(0, 1.02 * last)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if row == rows - 1:
            axes.set_xlabel("step")
    if any(half_window(len(run.entries)) for run in runs):
        caption = "faint: each step; strong: mean of the nearest 5 % of the run's steps"
        figure.supxlabel(caption, fontsize=8, color=GREY)
    add_legend(figure, [run.name for run in runs], is_line=True)
    return figure


def draw_term(axes: "Axes", key: str, runs: list[Run]) -> None:
    found = []
    for index, run in enumerate(runs):
        steps, values = run.series(key)
        if len(steps) == 0:
            continue
        found.append(values)
        half = half_window(len(steps)) if key in NOISY else 0
        look = {"color": COLOURS[index % len(COLOURS)], "marker": "." if len(steps) < 20 else None}
        if half:
            axes.plot(steps, values, **look, linewidth=0.6, alpha=0.3)
        # Runs may be the same, in their learning rate above all: an earlier one shows on both sides of a later one.
        hiding = sum(np.array_equal(values, other.series(key)[1]) for other in runs[index + 1 :])
        line = {"linestyle": LINES[index // len(COLOURS)], "linewidth": 1.6 + min(1.2, 4 / len(runs)) * hiding}
        axes.plot(steps, moving_mean(values, half) if half else values, **look, **line, label=run.name)
    fit_height(axes, found, [main_span(values) if key in NOISY else (values.min(), values.max()) for values in found])
    units = {quantity(key, run.settings) for run in runs if len(run.series(key)[0])} - {""}
    axes.set_ylabel(units.pop() if len(units) == 1 else "")  # several are too long, and of little use


def fit_height(axes: "Axes", found: list[np.ndarray], spans: list[tuple[float, float]]) -> None:
    """Show all spans; what lies beyond them is told above the panel."""
    from matplotlib.ticker import StrMethodFormatter

    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    room = 0.05 * (high - low or abs(low) or 1)
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 2e-05 in place of 2 with a power elsewhere
    lowest, highest = min(values.min() for values in found), max(values.max() for values in found)
    beyond = [f"down to {lowest:.3g}"] if lowest < low - room else []
    beyond += [f"up to {highest:.3g}"] if highest > high + room else []
    axes.set_title(", ".join(beyond), loc="right", fontsize=8, color=GREY)


def task_differs(run: Run) -> bool:
    """Whether a picture can show it: by more than 1 % of the height that the loss takes."""
    steps, task = run.series("task")
    loss_of = dict(zip(*run.series("loss"), strict=True))
    loss = np.array([loss_of[step] for step in steps])
    low, high = main_span(loss) if len(loss) else (0, 0)
    return bool((abs(loss - task) > 0.01 * (high - low)).any())


def half_window(count: int) -> int:
    """Of the moving mean over `count` steps: 2.5 % of them to each side."""
    return round(0.025 * count)


def moving_mean(values: np.ndarray, half: int) -> np.ndarray:
    """(n,) -> (n,): the mean of each value and `half` on either side, or what there is of them."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def main_span(values: np.ndarray) -> tuple[float, float]:
    """From lowest to highest, unless the outer 5 % at an end would take more than twice the height of the rest.

    So a first step far off cannot squash a run into a flat line.
    """
    low, high = np.quantile(values, 0.05, method="higher"), np.quantile(values, 0.95, method="lower")
    room = 2 * (high - low) if high > low else np.inf
    return max(values.min(), low - room), min(values.max(), high + room)


def quantity(key: str, settings: dict) -> str:
    """What a term is a number of, which depends on the task and the recipe; empty if it says nothing or is unknown."""
    objective = settings.get("objective")
    if not isinstance(objective, dict):
        return ""
    is_nlu, is_regression = "labels" in settings, settings.get("labels") == []
    loss = "squared error" if is_regression else "nats"
    distance = "nats" if objective.get("consistency") == "kl" else "squared distance"
    divisor = "N" if objective.get("svd_norm") is None else "‖Z‖"
    return {
        "loss": loss,
        "task": loss,
        "consistency": loss if is_regression else distance,
        "diversity": "squared covariance" if is_nlu else "−entropy, nats",
        "svd": f"−Σ of {objective.get('svd_k')} largest σ / {divisor}",
        "non_target_kl": "nats",
    }.get(key, "")


def add_legend(figure: "Figure", names: list[str], is_line: bool) -> None:
    """Above the panels, once for all of them."""
    from matplotlib.lines import Line2D

    looks = [(COLOURS[index % len(COLOURS)], index // len(COLOURS)) for index in range(len(names))]
    handles = [
        Line2D([], [], color=colour, linestyle=LINES[more], linewidth=1.6)
        if is_line
        else Line2D([], [], color=colour, marker=MARKERS[more], linestyle="")
        for colour, more in looks
    ]
    columns = max(1, min(len(names), 110 // (8 + max(map(len, names)))))  # about 110 characters fit
    legend = figure.legend(
        handles, ["?"] * len(names), loc="outside upper center", ncols=columns, frameon=False, fontsize=9
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)  # here, for a label that begins with _ would be left out


# Features


@dataclass(frozen=True)
class Features:
    """What is drawn of a file: before, after (N, d) float64; labels (N,), integers are classes, floats are scores."""

    name: str
    before: np.ndarray
    after: np.ndarray
    labels: np.ndarray
    names: list[str]  # of the classes; [] if the file has none
    rows_of_file: int

    @property
    def are_classes(self) -> bool:
        return self.labels.dtype.kind != "f"


def read_features(paths: list[Path], max_rows: int) -> list[Features]:
    if max_rows < 3:
        raise InputError(f"--max-rows {max_rows}: t-SNE needs 3 rows: give more")
    found = [read_file(path, name, max_rows) for path, name in zip(paths, short_names(paths), strict=True)]
    classes = len(all_classes(found))
    if classes > MOST:
        raise InputError(f"--features: {classes} classes: at most {MOST} can be told apart in one picture")
    return found


def read_file(path: Path, name: str, max_rows: int) -> Features:
    """`max_rows` rows drawn with seed 0, the same from each file of that length."""
    again = "give what train_nlu.py --features wrote"
    try:
        stored, names = load_file(path), class_names(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: {again}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}): {again}") from None
    for key in ("before", "after", "labels"):
        if key not in stored:
            raise InputError(f"{path}: has no tensor {key!r}: {again}")
        if not stored[key].isfinite().all():
            raise InputError(f"{path}: {key} has a value that is not finite: {again}")
    before, after, labels = (stored[key] for key in ("before", "after", "labels"))
    shapes = " and ".join(str(list(tensor.shape)) for tensor in (before, after, labels))
    if before.ndim != 2 or before.shape != after.shape or labels.shape != before.shape[:1]:
        raise InputError(f"{path}: before, after and labels are {shapes}, not (N, d), (N, d) and (N,): {again}")
    if before.shape[0] < 3 or before.shape[1] < 2:
        raise InputError(f"{path}: has {shapes}: t-SNE needs 3 rows of 2 numbers: give more")
    kept = np.sort(np.random.default_rng(0).permutation(len(labels))[:max_rows])
    before, after = before.double().numpy()[kept], after.double().numpy()[kept]
    labels = (labels.double() if labels.is_floating_point() else labels.long()).numpy()
    for key, values in (("before", before), ("after", after)):
        if (values == values[0]).all():
            raise InputError(f"{path}: {key}: all rows are the same, so there is nothing to draw")
    return Features(name, before, after, labels[kept], names, len(labels))


def class_names(path: Path) -> list[str]:
    with safe_open(path, "np") as file:
        try:
            names = json.loads((file.metadata() or {}).get("classes", "[]"))
        except ValueError:
            return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def all_classes(found: list[Features]) -> list[int]:
    return sorted({int(label) for features in found if features.are_classes for label in features.labels})


def tsne(found: list[Features]) -> "Figure":
    """Before and after side by side, a row a file, with the same settings and seed; one colour a class or score.

    The features are not standardised: distances are then those that the head's weights see, and a few coordinates of
    large variance, which fine-tuning is apt to make, keep what they mean. A t-SNE picture tells little of how far
    clusters are apart, so above each panel stands what the 5 nearest others of a row *among the features* say of it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.7 + 4.2 * len(found)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False)
    classes = all_classes(found)
    for row, features in zip(grid, found, strict=True):
        for axes, moment in zip(row, ("before", "after"), strict=True):
            values = getattr(features, moment)
            draw_points(axes, embedding(values), features, classes)
            axes.set_title(f"{moment}: {neighbour_score(values, features)}")
        row[0].set_ylabel(f"{features.name}\n{amounts(features)}", parse_math=False)
        if not features.are_classes:
            figure.colorbar(row[1].collections[0], ax=row.tolist(), label="label", pad=0.01)
    caption = f"5-NN: by the {NEIGHBOURS} nearest other rows in the original space, not in the picture"
    figure.supxlabel(caption, fontsize=8, color=GREY)
    if classes:
        names = max((features.names for features in found), key=len)
        known = {label: names[label] if 0 <= label < len(names) else f"class {label}" for label in classes}
        add_legend(figure, list(known.values()), is_line=False)
    return figure


def draw_points(axes: "Axes", points: np.ndarray, features: Features, classes: list[int]) -> None:
    size = float(np.clip(8000 / len(points), 6, 40))
    if features.are_classes:
        for index, label in enumerate(classes):
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index // len(COLOURS)]}
            of_class = points[features.labels == label]
            axes.scatter(*of_class.T, size, **look, alpha=0.6, linewidths=0, label=f"class {label}")
    else:
        axes.scatter(*points.T, size, features.labels, cmap="viridis", alpha=0.8, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def embedding(values: np.ndarray) -> np.ndarray:
    """(N, d) -> (N, 2). Perplexity is about the number of neighbours that count, so few rows have less than 30."""
    from sklearn.manifold import TSNE

    return TSNE(init="pca", perplexity=min(30, (len(values) - 1) / 3), random_state=0).fit_transform(values)


def neighbour_score(values: np.ndarray, features: Features) -> str:
    """Of what the 5 nearest other rows in (N, d) say: the share of rows whose class is theirs, or R² of their mean."""
    from sklearn.metrics import r2_score
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(values) - 1)).fit(values)
    theirs = features.labels[neighbours.kneighbors(return_distance=False)]  # (N, 5); a row is not its own neighbour
    if not features.are_classes:
        return f"5-NN R² {r2_score(features.labels, theirs.mean(1)):.3f}"
    classes = np.unique(features.labels)
    most = classes[np.argmax([(theirs == label).sum(1) for label in classes], axis=0)]
    return f"5-NN accuracy {(most == features.labels).mean():.3f}"


def amounts(features: Features) -> str:
    drawn, stored = len(features.labels), features.rows_of_file
    rows = f"{drawn:,} rows" if drawn == stored else f"{drawn:,} of {stored:,} rows"
    if not features.are_classes:
        return rows
    return f"{rows}, largest class {np.unique(features.labels, return_counts=True)[1].max() / drawn:.3f}"
