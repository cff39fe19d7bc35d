"""Read the features that train_nlu.py --features saved and draw them with t-SNE, before and after training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from minibalora.base.errors import InputError
from minibalora.evaluation.plot_style import FIGURE, MOST, POINTS, SMALL, WIDTH, add_legend, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEIGHBOURS = 5


@dataclass(frozen=True)
class Features:
    """The drawn rows of a file: before, after (N, d) in float64; labels (N,), integer classes or float scores."""

    name: str
    before: np.ndarray
    after: np.ndarray
    labels: np.ndarray
    names: list[str]  # names of the classes; [] if the file has none
    rows_of_file: int

    @property
    def are_classes(self) -> bool:
        return self.labels.dtype.kind != "f"


def read_features(paths: list[Path], max_rows: int) -> list[Features]:
    if max_rows < 3:
        raise InputError(f"--max-rows {max_rows}: t-SNE needs 3 rows: give more")
    return [read_file(path, name, max_rows) for path, name in zip(paths, short_names(paths), strict=True)]


def read_file(path: Path, name: str, max_rows: int) -> Features:
    """Read at most `max_rows` random rows. The seed is fixed, so files of equal length give the same rows."""
    cure = "give a file of train_nlu.py --features"
    try:
        with safe_open(path, "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            names = class_names((file.metadata() or {}).get("classes", "[]"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: {cure}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}): {cure}") from None
    for key in ("before", "after", "labels"):
        if key not in stored:
            raise InputError(f"{path}: has no tensor {key!r}: {cure}")
        if not stored[key].isfinite().all():
            raise InputError(f"{path}: {key} has a value that is not finite: {cure}")
    before, after, labels = (stored[key] for key in ("before", "after", "labels"))
    shapes = " and ".join(str(list(tensor.shape)) for tensor in (before, after, labels))
    if before.ndim != 2 or before.shape != after.shape or labels.shape != before.shape[:1]:
        raise InputError(f"{path}: before, after and labels are {shapes}, not (N, d), (N, d) and (N,): {cure}")
    if before.shape[0] < 3 or before.shape[1] < 2:
        raise InputError(f"{path}: has {shapes}: t-SNE needs 3 rows of 2 numbers: give more")
    drawn = np.sort(np.random.default_rng(0).permutation(len(labels))[:max_rows])
    before, after = before.double().numpy()[drawn], after.double().numpy()[drawn]
    labels = (labels.double() if labels.is_floating_point() else labels.long()).numpy()
    for key, values in (("before", before), ("after", after)):
        if (values == values[0]).all():
            raise InputError(f"{path}: {key}: all rows are equal, so there is nothing to draw: give other features")
    return Features(name, before, after, labels[drawn], names, len(labels))


def class_names(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError:
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def tsne(files: list[Features]) -> "Figure":
    """Draw a row for each file, before and after side by side, with the same settings and seed.

    The features are not standardised, so distances are as the head sees them, and the few coordinates with large
    variance that fine-tuning tends to create keep their influence. t-SNE says little about distances between clusters,
    so each panel's title gives a score of the 5 nearest other rows *among the features*.
    Raises InputError for more classes than can be told apart.
    """
    classes = sorted({int(label) for features in files if features.are_classes for label in features.labels})
    if len(classes) > MOST:
        raise InputError(f"--features: {len(classes)} classes: at most {MOST} can be told apart in one picture")
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(WIDTH, 0.7 + 4.2 * len(files)), **FIGURE)
    for row, features in zip(figure.subplots(len(files), 2, squeeze=False), files, strict=True):
        perplexity = min(30, (len(features.labels) - 1) / 3)  # about the number of neighbours that matter
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
        names = max((features.names for features in files), key=len)
        legend = [names[label] if 0 <= label < len(names) else f"class {label}" for label in classes]
        add_legend(figure, legend, [look | {"linestyle": ""} for look in POINTS])
    return figure


def draw_points(axes: "Axes", points: np.ndarray, features: Features, classes: list[int]) -> None:
    look = {"s": float(np.clip(8000 / len(points), 6, 40)), "linewidths": 0}
    if features.are_classes:
        for label, marker in zip(classes, POINTS, strict=False):
            axes.scatter(*points[features.labels == label].T, **look, **marker, alpha=0.6, label=f"class {label}")
    else:
        axes.scatter(*points.T, c=features.labels, **look, cmap="viridis", alpha=0.8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def neighbour_score(values: np.ndarray, features: Features) -> str:
    """Return how well the 5 nearest other rows predict a row of (N, d): accuracy of the majority, or R² of the mean."""
    from sklearn.metrics import r2_score
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(values) - 1)).fit(values)
    nearest = features.labels[neighbours.kneighbors(return_distance=False)]  # (N, 5), without the row itself
    if not features.are_classes:
        return f"5-NN R² {r2_score(features.labels, nearest.mean(1)):.3f}"
    classes = np.unique(features.labels)
    most = classes[np.argmax([(nearest == label).sum(1) for label in classes], axis=0)]
    return f"5-NN accuracy {(most == features.labels).mean():.3f}"


def amounts(features: Features) -> str:
    drawn, stored = len(features.labels), features.rows_of_file
    rows = f"{drawn:,} rows" if drawn == stored else f"{drawn:,} of {stored:,} rows"
    if not features.are_classes:
        return rows
    return f"{rows}, largest class {np.unique(features.labels, return_counts=True)[1].max() / drawn:.3f}"
