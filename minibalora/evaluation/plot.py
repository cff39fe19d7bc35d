"""Pictures: the terms of runs over their steps, and t-SNE of features before and after training; see `--help`.

Needs matplotlib and, for t-SNE, scikit-learn: pip install 'minibalora[plots]'. Both are imported where they are used,
so nothing else needs them. Figures are made without pyplot: no window, no backend, no global setting.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from minibalora.base import cli
from minibalora.base.errors import InputError
from minibalora.base.files import check_file, recorded_settings, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Key in the log -> title of its panel, in the order of the panels.
NOISY = {"loss": "loss", "task": "task", "consistency": "consistency", "diversity": "diversity"}
NOISY |= {"svd": "singular values", "non_target_kl": "non-target KL", "router_aux": "load balance of experts"}
PANELS = NOISY | {"lr": "learning rate", "dev": "dev metric"}
# Okabe and Ito's colours, which colour-blind people can tell apart, with a brown for their yellow, too pale for a line.
# After eight lines or classes, the next line style or marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
LINES = [{"linestyle": style, "color": colour} for style in ("-", "--", ":", "-.") for colour in COLOURS]
POINTS = [{"marker": marker, "color": colour} for marker in ("o", "^", "s", "X") for colour in COLOURS]
MOST = len(LINES)
GREY = "#555555"
SMALL = {"fontsize": 8, "color": GREY}
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.edgecolor": "#999999"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E8E8E8"}
STYLE |= {"axes.axisbelow": True, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
FIGURE = {"dpi": 200, "layout": "constrained"}
WIDTH = 9  # inches, which suit the font sizes: 1800 pixels, to be shown at 900
FEW = 20  # steps up to which a run is drawn as points, without a moving mean
NEIGHBOURS = 5


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    try:
        if args.features:
            import sklearn  # noqa: F401
        import matplotlib.style
    except ImportError as error:
        raise InputError(f"can't draw ({error}): pip install 'minibalora[plots]'") from None
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = tsne(read_features(args.features, args.max_rows)) if args.features else curves(read_runs(args.runs))
        with replacing(args.out) as temporary:
            figure.savefig(temporary, format=args.out.suffix[1:].lower())
    print(f"saved to {args.out}")
    return 0


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
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
        raise InputError("--max-rows goes with --features: leave it out, a run's log is drawn whole")
    args.max_rows = args.max_rows or 2000
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {args.out}: not the name of a picture: end it in .png, .pdf or .svg")
    check_file(args.out, "--out")  # now, not after t-SNE
    return args


def short_names(paths: list[Path]) -> list[str]:
    """The shortest end of each path that no other path ends in; InputError if one is named twice."""
    names, wholes = [], [Path(os.path.abspath(path)).parts for path in paths]
    for path, own in zip(paths, wholes, strict=True):
        if wholes.count(own) > 1:
            raise InputError(f"{path} is named twice: name it once")
        length = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in wholes) == 1)
        names.append(str(Path(*own[-length:])))
    return names


def add_legend(figure: "Figure", names: list[str], looks: list[dict]) -> None:
    """Above all panels, the names with the first `looks`."""
    from matplotlib.lines import Line2D

    columns = max(1, min(len(names), 110 // (8 + max(map(len, names)))))  # about 110 characters fit
    handles = [Line2D([], [], label="?", **look) for look in looks[: len(names)]]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)  # here, because a label that begins with _ would be left out


# Runs


@dataclass(frozen=True)
class Run:
    name: str
    terms: dict[str, np.ndarray]  # what `read_log` gives
    settings: dict  # of run.json; empty if there is none


def read_runs(folders: list[Path]) -> list[Run]:
    if len(folders) > MOST:
        raise InputError(f"{len(folders)} runs: at most {MOST} can be told apart in one picture")
    named = zip(short_names(folders), folders, strict=True)
    return [Run(name, read_log(folder / "log.jsonl"), recorded_settings(folder)) for name, folder in named]


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Steps and values (2, n) of each of PANELS that a log.jsonl has, without the steps at which it was not computed.

    The log is read up to its last end of line: what follows is still being written. InputError if there is no entry, or
    for the first line that is not one.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give the folder of a run, its --out") from None
    terms, last = {key: [] for key in PANELS}, 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step, known = entry["step"], {key: entry[key] for key in PANELS if entry.get(key) is not None}
            is_finite = all(type(value) in (int, float) and abs(value) < 1e300 for value in (step, *known.values()))
            is_good = is_finite and step > last and {"loss", "lr"} <= known.keys()
        except (ValueError, TypeError, KeyError, RecursionError):
            is_good = False
        if not is_good:
            raise InputError(f"{path}, line {number}: not an entry of a run's log: mend it or leave this run out")
        last = step
        for key, value in known.items():
            terms[key].append((step, value))
    if not last:
        raise InputError(f"{path}: holds no step yet: wait for the first, or leave this run out")
    return {key: np.array(pairs, dtype=float).T for key, pairs in terms.items() if pairs}


def curves(runs: list[Run]) -> "Figure":
    """One panel for each term that a run has, one line a run: each step faint, and their moving mean over it."""
    from matplotlib.figure import Figure

    titles = {key: title for key, title in PANELS.items() if any(key in run.terms for run in runs)}
    if "task" in titles and not any(task_differs(run.terms) for run in runs):
        del titles["task"]
        titles["loss"] = "loss ≈ task"
    keys, columns = list(titles), 2 if len(titles) in (2, 4) else 3
    rows = [keys[start : start + columns] for start in range(0, len(keys), columns)]
    figure = Figure(figsize=(WIDTH, 0.7 + 2.2 * len(rows)), **FIGURE)
    last = max(run.terms["loss"][0, -1] for run in runs)
    # Of six columns, so that the panels of the last row, which may be fewer, share the whole width.
    for key, axes in figure.subplot_mosaic([np.repeat(row, 6 // len(row)).tolist() for row in rows]).items():
        draw_term(axes, key, runs)
        axes.set(title=titles[key], xlim=(0, 1.02 * last), xlabel="step" if key in rows[-1] else "")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if any(run.terms["loss"].shape[1] > FEW for run in runs):
        figure.supxlabel("faint: each step; strong: mean of the nearest 5 % of the run's steps", **SMALL)
    add_legend(figure, [run.name for run in runs], LINES)
    return figure


def draw_term(axes: "Axes", key: str, runs: list[Run]) -> None:
    """The term's line of each run that has it. The axis shows their `main_span`; a note above says what lies beyond."""
    from matplotlib.ticker import StrMethodFormatter

    drawn = {index: run.terms[key] for index, run in enumerate(runs) if key in run.terms}
    for index, (steps, values) in drawn.items():
        look = LINES[index] | {"marker": None if len(steps) > FEW else ".", "label": runs[index].name}
        # Two runs may have the same line, often of learning rates: the earlier one is wider, so it shows on both sides.
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
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 2e-05 in place of 2 with a power elsewhere
    every = np.concatenate([values for _, values in drawn.values()])
    beyond = [f"down to {every.min():.3g}"] if every.min() < low - room else []
    beyond += [f"up to {every.max():.3g}"] if every.max() > high + room else []
    axes.set_title(", ".join(beyond), loc="right", **SMALL)
    units = {quantity(key, runs[index].settings) for index in drawn} - {""}
    axes.set_ylabel(units.pop() if len(units) == 1 else "")  # several are too long, and of little use


def task_differs(terms: dict[str, np.ndarray]) -> bool:
    """Whether a picture can show it: by more than 1 % of the height that the loss takes."""
    (steps, loss), (known, task) = terms["loss"], terms.get("task", np.empty((2, 0)))
    low, high = main_span(loss)
    return (abs(loss[np.isin(steps, known)] - task) > 0.01 * (high - low)).any()


def moving_mean(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): the mean of each value and its neighbours, 2.5 % of n on either side, or what there is of them."""
    half = round(0.025 * len(values))
    sums, counts = (np.convolve(each, np.ones(2 * half + 1)) for each in (values, np.ones(len(values))))
    return (sums / counts)[half : half + len(values)]


def main_span(values: np.ndarray) -> tuple[float, float]:
    """From lowest to highest, unless the outer 5 % at an end would take more than twice the height of the rest.

    So a first step far off cannot squash a run into a flat line.
    """
    low, high = np.quantile(values, 0.05, method="higher"), np.quantile(values, 0.95, method="lower")
    room = 2 * (high - low) if high > low else np.inf
    return max(values.min(), low - room), min(values.max(), high + room)


def quantity(key: str, settings: dict) -> str:
    """The unit of a term, which depends on the task and the recipe; empty if it says nothing or is unknown."""
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
    return [read_file(path, name, max_rows) for path, name in zip(paths, short_names(paths), strict=True)]


def read_file(path: Path, name: str, max_rows: int) -> Features:
    """At most `max_rows` rows, drawn with seed 0: the same ones from every file of one length."""
    again = "give what train_nlu.py --features wrote"
    try:
        with safe_open(path, "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            names = class_names((file.metadata() or {}).get("classes", "[]"))
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


def class_names(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError:
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def tsne(found: list[Features]) -> "Figure":
    """Before and after side by side, a row a file, with the same settings and seed; one colour a class or score.

    The features are not standardised: so distances are those that the head's weights see, and a few coordinates of
    large variance, which fine-tuning tends to make, keep their weight. A t-SNE picture says little about how far
    clusters are apart, so above each panel stands what the 5 nearest other rows *among the features* say.
    InputError for more classes than can be told apart.
    """
    classes = sorted({int(label) for features in found if features.are_classes for label in features.labels})
    if len(classes) > MOST:
        raise InputError(f"--features: {len(classes)} classes: at most {MOST} can be told apart in one picture")
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(WIDTH, 0.7 + 4.2 * len(found)), **FIGURE)
    for row, features in zip(figure.subplots(len(found), 2, squeeze=False), found, strict=True):
        perplexity = min(30, (len(features.labels) - 1) / 3)  # about the number of neighbours that count
        for axes, moment in zip(row, ("before", "after"), strict=True):
            values = getattr(features, moment)
            points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(values)  # (N, 2)
            draw_points(axes, points, features, classes)
            axes.set_title(f"{moment}: {neighbour_score(values, features)}")
        row[0].set_ylabel(f"{features.name}\n{amounts(features)}", parse_math=False)
        if not features.are_classes:
            figure.colorbar(row[1].collections[0], ax=row.tolist(), label="label", pad=0.01)
    figure.supxlabel(f"5-NN: by the {NEIGHBOURS} nearest other rows in the original space, not in the picture", **SMALL)
    if classes:
        names = max((features.names for features in found), key=len)
        known = [names[label] if 0 <= label < len(names) else f"class {label}" for label in classes]
        add_legend(figure, known, [look | {"linestyle": ""} for look in POINTS])
    return figure


def draw_points(axes: "Axes", points: np.ndarray, features: Features, classes: list[int]) -> None:
    look = {"s": float(np.clip(8000 / len(points), 6, 40)), "linewidths": 0}
    if features.are_classes:
        for label, own in zip(classes, POINTS, strict=False):
            axes.scatter(*points[features.labels == label].T, **look, **own, alpha=0.6, label=f"class {label}")
    else:
        axes.scatter(*points.T, c=features.labels, **look, cmap="viridis", alpha=0.8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def neighbour_score(values: np.ndarray, features: Features) -> str:
    """By the 5 nearest other rows in (N, d): the share of rows that have their class, or R² of their mean score."""
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
