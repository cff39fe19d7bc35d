"""Pictures of a sweep. Tests that need matplotlib are skipped without it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibalora.evaluation.plot_sweep import convex_hull, frontier, good_edge, score_over

coordinates = st.integers(-5, 5).map(float)
clouds = st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=9, unique=True).map(np.array)


@pytest.fixture
def pictures():
    pytest.importorskip("matplotlib")


@given(points=clouds)
def test_all_points_lie_left_of_every_side_of_the_hull(points):
    corners = points[convex_hull(points)]
    assert len(np.unique(corners, axis=0)) == len(corners)
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crosses = (b[0] - a[0]) * (points[:, 1] - a[1]) - (b[1] - a[1]) * (points[:, 0] - a[0])
        assert (crosses >= 0).all()


@given(points=clouds, sign=st.sampled_from([1, -1]))
def test_the_good_edge_goes_from_the_least_forgotten_to_the_best_score(points, sign):
    edge = points[good_edge(points, sign)]
    assert edge[0, 0] == points[:, 0].min() and sign * edge[-1, 1] == (sign * points[:, 1]).max()
    assert (np.diff(edge[:, 0]) > 0).all() and (sign * np.diff(edge[:, 1]) > 0).all()
    for point in points:  # none lies beyond it
        if point[0] <= edge[-1, 0]:
            assert sign * point[1] <= np.interp(point[0], edge[:, 0], sign * edge[:, 1]) + 1e-9


def names_in_legend(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_frontier_has_a_point_a_run_and_a_hull_a_method(pictures):
    points = {"lora": np.array([[0.01, 1.0], [0.5, 2.0], [0.3, 0.0]]), "pissa": np.array([[0.1, 1.0]])}
    figure = frontier(points, "KL", "accuracy", False)
    (axes,) = figure.axes
    assert [len(scatter.get_offsets()) for scatter in axes.collections] == [3, 1] and len(axes.patches) == 2
    assert axes.lines[0].get_xydata().tolist() == [[0.01, 1], [0.5, 2]]
    assert axes.get_xscale() == "log" and names_in_legend(figure) == ["lora", "pissa"]
    figure.draw_without_rendering()


def test_a_negative_rise_is_drawn_too_and_a_loss_is_better_lower(pictures):
    figure = frontier({"lora": np.array([[-0.01, 1.0], [0.5, 2.0], [0.3, 0.0]])}, "loss on text", "loss", True)
    (axes,) = figure.axes
    assert axes.get_xscale() == "linear" and axes.get_ylabel() == "loss (lower is better)"
    assert axes.lines[0].get_xydata().tolist() == [[-0.01, 1], [0.3, 0]]


def test_values_of_a_setting_are_evenly_spaced(pictures):
    figure = score_over(
        {"lora": [(16, 2.0, 0.5), (4, 1.0, float("nan"))], "full": [(4, 3.0, 0.1)]}, "rank", "f1", False
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "16"]
    line = axes.containers[0].lines[0]
    assert line.get_ydata().tolist() == [1, 2] and np.diff(line.get_xdata()) == [1]
    figure.draw_without_rendering()
