"""Pictures of runs and features. Tests that need matplotlib or scikit-learn are skipped without them."""

import json
import math
import os
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minibalora.evaluation import plot_features, plot_runs, plot_style
from minibalora.evaluation.plot import main
from minibalora.evaluation.plot_features import read_features
from minibalora.evaluation.plot_runs import main_span, moving_mean, quantity, read_log
from minibalora.evaluation.plot_style import short_names

TERMS = ("task", "consistency", "diversity", "svd", "non_target_kl")
CLASSIFIER = {"labels": ["bad", "good"], "objective": {"consistency": "mse", "svd_norm": None, "svd_k": 5}}
GENERATOR = {"objective": {"consistency": "kl", "svd_norm": "frobenius", "svd_k": 10}}


@pytest.fixture
def pictures():
    pytest.importorskip("matplotlib")


@pytest.fixture
def tsne_libraries(pictures):
    pytest.importorskip("sklearn")


def entry(step: int, loss: float, **terms: float | None) -> dict:
    return {"step": step, "loss": loss} | dict.fromkeys(TERMS) | {"task": loss} | terms | {"lr": 1e-5 * step}


@pytest.fixture
def new_run(tmp_path):
    """new_run(name, entries, settings): the folder of a run."""

    def make(name: str, entries: list[dict], settings: dict = GENERATOR) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        (folder / "run.json").write_text(json.dumps({"settings": settings}))
        return folder

    return make


@pytest.fixture
def ba(new_run):
    """47 steps with every term of BA-LoRA, diversity and singular values from step 11 on, and a metric every 20."""
    entries = []
    for step in range(1, 48):
        late = {"diversity": -step / 10, "svd": -1 - step / 50} if step > 10 else {}
        noise = (-1) ** step * 0.1
        dev = {"dev": step / 47} if step % 20 == 0 else {}
        entries.append(entry(step, 2 - step / 50 + noise, task=1.5 + noise, consistency=step**0.5, **late) | dev)
    return new_run("runs/ba", entries)


@pytest.fixture
def lora(new_run):
    return new_run("runs/lora", [entry(step, 3 - step / 50) for step in range(1, 72)])


@pytest.fixture
def new_features(tmp_path):
    """new_features(rows, labels): a file whose classes, or scores, can be told apart after and not before.

    changes: tensors in place of those, None to leave one out.
    """

    def make(
        rows: int = 40, labels: torch.Tensor | None = None, name: str = "f.safetensors", changes=(), classes: str = "[]"
    ) -> Path:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(rows) % 3 if labels is None else labels
        before = torch.randn(rows, 7, generator=generator)
        after = before.clone()
        after[:, 0] += 20 * labels
        tensors = {"before": before, "after": after, "labels": labels} | dict(changes)
        kept = {key: value for key, value in tensors.items() if value is not None}
        save_file(kept, tmp_path / name, metadata={"classes": classes})
        return tmp_path / name

    return make


def panels(figure) -> dict[str, object]:
    return {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}


def line_of(axes, name: str):
    (line,) = [line for line in axes.get_lines() if line.get_label() == name]
    return line


def names_in_legend(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def hidden_files(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


# Reading


def test_a_log_is_read_up_to_the_last_whole_line(ba):
    log = ba / "log.jsonl"
    whole = read_log(log)
    with open(log, "a") as file:
        file.write('{"step": 48, "loss": 1.')
    again = read_log(log)
    assert again.keys() == whole.keys() and all(np.array_equal(again[key], whole[key]) for key in whole)
    assert whole["loss"][0].tolist() == list(range(1, 48)) and whole["diversity"][0].tolist() == list(range(11, 48))


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "loss": 1.',
        "[2]",
        "\ufffd",
        "",
        "[" * 100_000,
        '{"step": 2, "loss": NaN, "lr": 1}',
        '{"step": 2, "loss": 1e999, "lr": 1}',
        '{"step": 2, "loss": %s, "lr": 1}' % ("1" * 400),
        '{"step": 2, "loss": "1", "lr": 1}',
        '{"step": 2, "loss": true, "lr": 1}',
        '{"step": 2, "loss": 1, "lr": 1, "svd": []}',
        '{"step": 2, "loss": 1}',
        '{"step": 2, "lr": 1}',
        '{"loss": 1, "lr": 1}',
        '{"step": 1, "loss": 1, "lr": 1}',
    ],
)
def test_a_damaged_line_is_refused_by_file_and_number(line, tmp_path, refuses):
    log = tmp_path / "log.jsonl"
    good = [json.dumps(entry(step, 1.0)) for step in (1, 3)]
    log.write_text(f"{good[0]}\n{line}\n{good[1]}\n", encoding="utf-8")
    refuses(lambda: read_log(log), f"{log}, line 2")


def test_no_log_and_an_empty_one_are_refused(tmp_path, refuses):
    refuses(lambda: read_log(tmp_path / "log.jsonl"), tmp_path / "log.jsonl", "No such file")
    for text in ("", '{"step": 1, "lo'):
        (tmp_path / "log.jsonl").write_text(text)
        refuses(lambda: read_log(tmp_path / "log.jsonl"), tmp_path / "log.jsonl", "no step")


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/"], ["a"]),
        (["seed1/out", "seed2/out", "other"], ["seed1/out", "seed2/out", "other"]),
        (["/x/a", "/x/y/a", "/a"], ["x/a", "y/a", "/a"]),
        (["x/../a", "b"], ["a", "b"]),
    ],
)
def test_a_name_is_the_shortest_unique_end_of_the_path(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_the_folder_itself_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_names([Path(".")]) == [tmp_path.name]


def test_a_path_that_is_named_twice_is_refused(refuses):
    refuses(lambda: short_names([Path("runs/a"), Path("b"), Path("runs/../runs/a")]), "runs/a", "twice")


# Curves


def test_the_moving_mean_covers_a_twentieth_of_the_run_around_a_step():
    for count, half in ((1, 0), (15, 0), (50, 1), (167, 4), (781, 20)):
        values = np.random.default_rng(0).normal(size=count)
        expected = [values[max(0, at - half) : at + half + 1].mean() for at in range(count)]
        np.testing.assert_allclose(moving_mean(values), expected, atol=1e-12)  # sums of up to 41 numbers around 1


def test_one_value_far_off_does_not_squash_the_rest():
    values = np.linspace(2, 1, 50)
    assert main_span(values) == (1, 2)
    low, high = main_span(np.concatenate([[400], values]))
    assert low == 1 and 2 < high < 5
    low, high = main_span(np.concatenate([values, [-400]]))
    assert high == 2 and -2 < low < 1
    assert main_span(np.array([3.0, 1.0])) == (1, 3) and main_span(np.full(9, -1.0)) == (-1, -1)


def test_an_exponential_fall_is_shown_whole():
    values = 8 * np.exp(-np.arange(100) / 25)
    assert main_span(values) == (values.min(), values.max())


@pytest.mark.parametrize(
    "key, settings, expected",
    [
        ("loss", GENERATOR, "nats"),
        ("consistency", GENERATOR, "nats"),
        ("diversity", GENERATOR, "−entropy, nats"),
        ("svd", GENERATOR, "−Σ of 10 largest σ / ‖Z‖"),
        ("task", CLASSIFIER, "nats"),
        ("consistency", CLASSIFIER, "squared distance"),
        ("diversity", CLASSIFIER, "squared covariance"),
        ("svd", CLASSIFIER, "−Σ of 5 largest σ / N"),
        ("task", CLASSIFIER | {"labels": []}, "squared error"),
        ("consistency", CLASSIFIER | {"labels": []}, "squared error"),
        ("non_target_kl", CLASSIFIER, "nats"),
        ("lr", GENERATOR, ""),
        ("loss", {}, ""),
    ],
)
def test_the_unit_depends_on_the_recipe_and_the_task(key, settings, expected):
    assert quantity(key, settings) == expected


def test_there_is_a_panel_for_each_term_that_a_run_has_with_a_line_for_each_run_that_has_it(pictures, ba, lora):
    figure = plot_runs.curves(plot_runs.read_runs([ba, lora]))
    axes_of = panels(figure)
    assert list(axes_of) == [
        "loss", "task", "consistency", "diversity", "singular values", "learning rate", "dev metric",
    ]  # fmt: skip
    both = {"loss", "task", "learning rate"}
    for title, axes in axes_of.items():
        named = [line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")]
        assert named == (["ba", "lora"] if title in both else ["ba"]), title
    assert {line_of(axes, "ba").get_color() for axes in axes_of.values()} == {plot_style.COLOURS[0]}
    assert {line_of(axes_of[title], "lora").get_color() for title in both} == {plot_style.COLOURS[1]}
    assert names_in_legend(figure) == ["ba", "lora"]
    assert axes_of["diversity"].get_ylabel() == "−entropy, nats" and axes_of["dev metric"].get_xlabel() == "step"


def test_the_lines_hold_the_log(pictures, ba, lora):
    axes_of = panels(plot_runs.curves(plot_runs.read_runs([ba, lora])))
    entries = [json.loads(line) for line in (ba / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries]
    raw, mean = axes_of["loss"].get_lines()[:2]
    assert raw.get_ydata().tolist() == losses and raw.get_alpha() < 0.5 and raw.get_linewidth() < 1
    assert mean.get_ydata().tolist() == moving_mean(np.array(losses)).tolist()
    assert line_of(axes_of["learning rate"], "ba").get_ydata().tolist() == [entry["lr"] for entry in entries]
    assert line_of(axes_of["diversity"], "ba").get_xdata().tolist() == list(range(11, 48))
    metric = line_of(axes_of["dev metric"], "ba")
    assert metric.get_xydata().tolist() == [[20, 20 / 47], [40, 40 / 47]] and metric.get_marker() == "."
    assert line_of(axes_of["loss"], "lora").get_xdata()[-1] == 71 and axes_of["loss"].get_xlim()[1] > 71


def test_the_task_has_no_panel_if_it_equals_the_loss(pictures, lora, new_run):
    almost = new_run("almost", [entry(step, 2 - step / 50, task=2.0001 - step / 50) for step in range(1, 40)])
    for runs in ([lora], [lora, almost]):
        assert list(panels(plot_runs.curves(plot_runs.read_runs(runs)))) == ["loss ≈ task", "learning rate"]


def test_a_value_far_off_is_noted_but_not_shown(pictures, new_run):
    run = new_run("run", [entry(step, 50 if step == 1 else 2 + step / 100) for step in range(1, 100)])
    axes = panels(plot_runs.curves(plot_runs.read_runs([run])))["loss ≈ task"]
    assert axes.get_ylim()[1] < 10 and axes.get_title(loc="right") == "up to 50"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_are_drawn_as_points(pictures, new_run, steps):
    run = new_run("run", [entry(step, 1.0) for step in range(1, steps + 1)])
    figure = plot_runs.curves(plot_runs.read_runs([run]))
    (line,) = panels(figure)["loss ≈ task"].get_lines()
    assert line.get_marker() == "." and len(line.get_xdata()) == steps
    low, high = figure.axes[0].get_ylim()
    assert low < 1 < high


def test_runs_with_the_same_learning_rates_are_both_visible(pictures, lora, new_run):
    other = new_run("other", [entry(step, 1.0) for step in range(1, 72)])
    axes = panels(plot_runs.curves(plot_runs.read_runs([lora, other])))["learning rate"]
    assert line_of(axes, "lora").get_linewidth() > line_of(axes, "other").get_linewidth() + 1


def test_small_rates_are_written_with_their_power(pictures, lora):
    figure = plot_runs.curves(plot_runs.read_runs([lora]))
    figure.draw_without_rendering()
    labels = [label.get_text() for label in panels(figure)["learning rate"].get_yticklabels()]
    assert "0.0002" in labels and not any(axes.yaxis.get_offset_text().get_text() for axes in figure.axes)


@pytest.mark.parametrize("panel_count", range(2, 9))
def test_panels_fill_the_picture(pictures, new_run, panel_count):
    terms = dict(zip(("consistency", "diversity", "svd", "non_target_kl", "task"), [1.0] * 5, strict=True))
    terms = dict(list(terms.items())[: panel_count - 2])
    run = new_run("run", [entry(step, step / 10, **terms) for step in range(1, 9)])
    if panel_count == 8:
        run = new_run("run8", [entry(step, step / 10, **terms) | {"dev": 0.5} for step in range(1, 9)])
    figure = plot_runs.curves(plot_runs.read_runs([run]))
    assert len(figure.axes) == panel_count
    figure.draw_without_rendering()
    rows = {}
    for axes in figure.axes:
        rows.setdefault(round(axes.get_position().y0, 3), []).append(axes.get_position())
    for row in rows.values():
        assert max(box.x1 for box in row) > 0.97 and min(box.x0 for box in row) < 0.15, row


def test_names_are_not_parsed_as_formulas_and_all_are_in_the_legend(pictures, new_run):
    folders = [new_run(name, [entry(1, 1.0)]) for name in ("_under", "a$b$c", "$\\frac{")]
    figure = plot_runs.curves(plot_runs.read_runs(folders))
    assert names_in_legend(figure) == ["_under", "a$b$c", "$\\frac{"]
    figure.draw_without_rendering()


def test_many_runs_all_look_different(pictures, new_run, refuses):
    folders = [new_run(f"run{index}", [entry(1, 1.0)]) for index in range(plot_style.MOST)]
    axes = plot_runs.curves(plot_runs.read_runs(folders)).axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == plot_style.MOST
    refuses(lambda: plot_runs.read_runs([*folders, "one more"]), f"{plot_style.MOST + 1} runs", plot_style.MOST)


def test_a_log_without_its_run_json_has_curves_without_units(pictures, lora):
    (lora / "run.json").unlink()
    assert plot_runs.curves(plot_runs.read_runs([lora])).axes[0].get_ylabel() == ""


@pytest.mark.parametrize("name", ["curves.png", "curves.pdf", "curves.svg", "CURVES.PNG"])
def test_the_name_sets_the_format_and_a_picture_is_replaced(pictures, ba, lora, tmp_path, name, capsys):
    out = tmp_path / name
    out.write_text("older")
    assert main([str(ba), str(lora), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"saved to {out}\n"
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[name[-3:].lower()]
    assert out.read_bytes().startswith(start) and not hidden_files(tmp_path)
    if start == b"<?xml":
        xml.etree.ElementTree.parse(out)


def test_a_picture_leaves_no_setting_behind(pictures, lora, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    main([str(lora), "-o", str(tmp_path / "curves.png")])
    assert dict(matplotlib.rcParams) == before


def test_a_picture_that_fails_leaves_nothing_behind(pictures, lora, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    out = tmp_path / "curves.png"
    out.write_text("older")

    def fail(self, path, **_):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError):
        main([str(lora), "-o", str(out)])
    assert out.read_text() == "older" and not hidden_files(tmp_path)


def test_a_damaged_log_writes_nothing(pictures, lora, tmp_path, refuses):
    (lora / "log.jsonl").write_text("?\n")
    refuses(lambda: main([str(lora), "-o", str(tmp_path / "curves.png")]), "log.jsonl, line 1")
    assert sorted(os.listdir(tmp_path)) == ["runs"]


# Features


def test_before_and_after_stand_side_by_side_with_their_classes(tsne_libraries, new_features):
    path = new_features()
    figure = plot_features.tsne(read_features([path], 2000))
    before, after = figure.axes
    assert before.get_title().startswith("before: 5-NN accuracy 0.") and after.get_title() == (
        "after: 5-NN accuracy 1.000"
    )
    assert before.get_ylabel() == "f.safetensors\n40 rows, largest class 0.350"  # 14 of 40
    assert names_in_legend(figure) == ["class 0", "class 1", "class 2"]
    for axes in (before, after):
        sizes = {points.get_label(): len(points.get_offsets()) for points in axes.collections}
        assert sizes == {"class 0": 14, "class 1": 13, "class 2": 13}
        assert [points.get_facecolor()[0, :3].tolist() for points in axes.collections] == [
            [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in plot_style.COLOURS[:3]
        ]
        assert axes.get_aspect() == 1 and not len(axes.get_xticks()) and not len(axes.get_yticks())


@pytest.mark.parametrize(
    "classes, expected",
    [
        ('["bad", "so so", "good"]', ["bad", "so so", "good"]),
        ('["bad"]', ["bad", "class 1", "class 2"]),
        ("no JSON", ["class 0", "class 1", "class 2"]),
        ("[1, 2, 3]", ["class 0", "class 1", "class 2"]),
    ],
)
def test_classes_have_the_names_that_the_file_gives_them(tsne_libraries, new_features, classes, expected):
    figure = plot_features.tsne(read_features([new_features(classes=classes)], 2000))
    assert names_in_legend(figure) == expected


def test_the_picture_is_the_same_each_time(tsne_libraries, new_features):
    files = read_features([new_features()], 30)
    first, second = (plot_features.tsne(files).axes[1].collections[0].get_offsets() for _ in range(2))
    assert np.array_equal(first, second)


def test_each_file_gets_a_row_and_a_class_has_one_colour_in_all_rows(tsne_libraries, new_features):
    paths = [new_features(name="a.safetensors"), new_features(12, torch.arange(12) % 2 + 2, name="b.safetensors")]
    figure = plot_features.tsne(read_features(paths, 2000))
    assert [axes.get_ylabel().splitlines()[0] for axes in figure.axes[::2]] == ["a.safetensors", "b.safetensors"]
    assert names_in_legend(figure) == [f"class {label}" for label in range(4)]
    looks = [
        {
            points.get_label(): tuple(points.get_facecolor()[0])
            for points in axes.collections
            if points.get_offsets().size
        }
        for axes in figure.axes[1::2]
    ]
    assert looks[0].keys() & looks[1].keys() == {"class 2"} and looks[0]["class 2"] == looks[1]["class 2"]


def test_scores_get_a_colour_bar_instead_of_a_legend(tsne_libraries, new_features):
    labels = torch.rand(60, generator=torch.Generator().manual_seed(1)) * 5
    figure = plot_features.tsne(read_features([new_features(60, labels)], 2000))
    before, after, bar = figure.axes
    assert not figure.legends and bar.get_ylabel() == "label"
    assert np.allclose(after.collections[0].get_array(), labels)
    assert float(after.get_title().removeprefix("after: 5-NN R² ")) > 0.9
    assert float(before.get_title().removeprefix("before: 5-NN R² ")) < 0.5
    assert before.get_ylabel() == "f.safetensors\n60 rows"


def test_a_row_is_not_its_own_neighbour(tsne_libraries):
    """Two distant pairs of different classes: if a row counted itself, each row would be half right."""
    values = np.array([[0.0, 0], [0, 1], [90, 0], [90, 1]])
    labels = np.array([0, 1, 0, 1])
    features = plot_features.Features("f", values, values, labels, [], 4)
    nearest_three = plot_features.neighbour_score(values, features)  # of the three others one has the row's class
    assert nearest_three == "5-NN accuracy 0.000"


def test_a_sample_of_many_rows_takes_the_same_rows_of_before_after_and_labels(new_features):
    path = new_features(50)
    (whole,), (sample,) = read_features([path], 50), read_features([path], 11)
    rows = [np.flatnonzero((whole.before == row).all(1)).item() for row in sample.before]
    assert len(set(rows)) == 11 and rows == sorted(rows) and sample.rows_of_file == 50
    assert np.array_equal(sample.after, whole.after[rows]) and np.array_equal(sample.labels, whole.labels[rows])
    assert plot_features.amounts(sample).startswith("11 of 50 rows, largest class 0.")


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_few_rows_are_drawn(tsne_libraries, new_features, rows):
    figure = plot_features.tsne(read_features([new_features(rows)], 2000))
    offsets = np.concatenate([points.get_offsets() for points in figure.axes[0].collections])
    assert offsets.shape == (rows, 2) and np.isfinite(offsets).all()


def test_half_precision_and_boolean_labels_are_read(new_features):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(9, 7, generator=generator).bfloat16()
    (features,) = read_features([new_features(9, changes={"before": half, "labels": torch.arange(9) % 2 == 0})], 2000)
    assert np.array_equal(features.before, half.double().numpy()) and set(features.labels) == {0, 1}


def test_features_are_saved_as_a_picture(tsne_libraries, new_features, tmp_path, capsys):
    out = tmp_path / "tsne.pdf"
    assert main(["--features", str(new_features()), "--max-rows", "12", "-o", str(out)]) == 0
    assert out.read_bytes().startswith(b"%PDF") and capsys.readouterr().out == f"saved to {out}\n"


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"labels": None}, ["no tensor 'labels'"]),
        ({"before": None}, ["no tensor 'before'"]),
        ({"after": torch.full((40, 7), math.nan)}, ["after", "not finite"]),
        ({"after": torch.randn(40, 6)}, ["[40, 7] and [40, 6] and [40]", "(N, d)"]),
        ({"labels": torch.zeros(39)}, ["[39]"]),
        ({"before": torch.randn(40), "after": torch.randn(40)}, ["(N, d)"]),
        ({"before": torch.randn(40, 1), "after": torch.randn(40, 1)}, ["2 numbers"]),
        ({"before": torch.ones(40, 7)}, ["before", "all rows are equal"]),
        ({"labels": torch.arange(40)}, ["40 classes", plot_style.MOST]),
    ],
)
def test_wrong_features_are_refused(changes, parts, new_features, refuses):
    path = new_features(name="wrong.safetensors", changes=changes)
    refuses(
        lambda: plot_features.tsne(read_features([path], 2000)),
        "--features" if "classes" in str(parts) else path,
        *parts,
    )


def test_fewer_than_three_rows_are_refused(new_features, refuses):
    path = new_features(2)
    refuses(lambda: read_features([path], 2000), path, "3 rows")
    refuses(lambda: read_features([path], 2), "--max-rows 2", "3 rows")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path, refuses):
    (tmp_path / "text").write_text("before, after, labels\n")
    (tmp_path / "empty").write_bytes(b"")
    for name, part in (("text", "not a readable"), ("empty", "not a readable"), ("absent", "no such file"), ("", "")):
        refuses(lambda name=name: read_features([tmp_path / name], 2000), tmp_path / name, part)


# The command line


@pytest.mark.parametrize(
    "flags, parts",
    [
        ([], ["-o"]),
        (["run"], ["-o"]),
        (["-o", "a.png"], ["runs or --features"]),
        (["run", "-o", "a.png", "--features", "f"], ["runs or --features"]),
        (["run", "-o", "a.png", "--max-rows", "9"], ["--max-rows"]),
        (["--features", "f", "-o", "a.png", "--max-rows", "0"], ["--max-rows"]),
        (["run", "-o", "a.jpg"], ["a.jpg", ".png, .pdf or .svg"]),
        (["run", "-o", "png"], ["png", ".png, .pdf or .svg"]),
        (["run", "-o", "absent/a.png"], ["absent/a.png", "can't write there"]),
        (["run", "-o", "folder.png"], ["folder.png", "is a folder"]),
        (["run", "-o", ""], ["empty"]),
        (["", "-o", "a.png"], ["empty"]),
    ],
)
def test_wrong_flags_are_refused(flags, parts, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    refuses(lambda: main(flags), *parts)


def test_a_missing_run_is_refused(pictures, tmp_path, refuses):
    refuses(lambda: main([str(tmp_path / "absent"), "-o", str(tmp_path / "a.png")]), "absent", "No such file")


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(missing, monkeypatch, tmp_path, refuses):
    for module in ("matplotlib", "sklearn"):  # whatever is installed
        monkeypatch.setitem(sys.modules, module, None if module == missing else sys)
    flags = ["--features", str(tmp_path / "f")] if missing == "sklearn" else [str(tmp_path)]
    refuses(lambda: main([*flags, "-o", str(tmp_path / "a.png")]), missing, "pip install '.[plots]'")
    assert not os.listdir(tmp_path)


def test_help_and_errors_in_a_python_that_has_neither_library(in_command, tmp_path, monkeypatch):
    for library in ("matplotlib", "sklearn"):
        monkeypatch.setitem(sys.modules, library, None)
    status, printed, error = in_command(main, "--help")
    assert status == 0 and "--features" in printed and error == ""
    status, printed, error = in_command(main, tmp_path, "-o", tmp_path / "a.png")
    assert status == 2 and printed == "" and len(error.splitlines()) == 1
    assert "pip install '.[plots]'" in error
