from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from distaff.errors import BatchError, ConfigError, MetricError, RunDirectoryError
from distaff.integrations import matplotlib as figures

NAN = float("nan")
HISTORY = {
    "train/loss": [(1, 2.0), (2, 0.5), (3, 0.01)],
    "val/loss": [(1, 1.5), (3, NAN)],
    "train/accuracy": [(1, 0.2), (2, 0.8), (3, 0.9)],
    "val/accuracy": [(1, 0.3), (3, 0.7)],
}


def _points(line) -> list[tuple[float, float]]:
    return [tuple(point) for point in line.get_xydata().tolist()]


def _lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    lines, labels = axes.get_legend_handles_labels()
    return {label: _points(line) for line, label in zip(lines, labels, strict=True)}


def _pixels(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def test_learning_curves_draws_one_panel_per_metric_with_both_splits():
    loss, accuracy = figures.learning_curves(HISTORY).axes
    assert (loss.get_title(), accuracy.get_title()) == ("loss", "accuracy")
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    assert _lines(accuracy) == {
        "train": HISTORY["train/accuracy"],
        "val": HISTORY["val/accuracy"],
    }
    np.testing.assert_equal(_lines(loss)["val"], HISTORY["val/loss"])


def test_learning_curves_marks_the_best_epoch():
    axes = figures.learning_curves(HISTORY, best_epoch=3).axes[1]
    assert set(_lines(axes)) == {"train (0.9000)", "val (0.7000)"}
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "best epoch: 3"
    drawn = [_points(line) for line in axes.lines]
    assert [(3, 0.9)] in drawn
    assert [(3, 0.7)] in drawn
    assert [(3, 0), (3, 1)] in drawn


def test_learning_curves_stays_linear_within_a_factor_of_ten():
    (axes,) = figures.learning_curves({"val/loss": [(1, 0.5), (2, 0.1)]}).axes
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize("value", [NAN, float("inf"), -1.0, 0.0])
def test_learning_curves_draws_a_single_epoch_of_any_value(value, tmp_path):
    figure = figures.learning_curves({"val/loss": [(1, value), (1, 100.0)]}, best_epoch=1)
    figures.save(figure, tmp_path / "curves.png")
    (axes,) = figure.axes
    assert axes.get_yscale() == "linear"
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_learning_curves_says_where_nothing_is_finite():
    (axes,) = figures.learning_curves({"val/loss": [(1, NAN)]}).axes
    assert [text.get_text() for text in axes.texts] == ["no finite value"]


@pytest.mark.parametrize(
    ("history", "best_epoch", "message"),
    [
        ({}, None, "empty"),
        ({"loss": [(1, 1.0)]}, None, "'train/loss'; got 'loss'"),
        ({"val/loss": [(1, 1.0)]}, 7, r"got 7, the history has \[1\]"),
    ],
)
def test_learning_curves_refuses_bad_history(history, best_epoch, message):
    with pytest.raises(MetricError, match=message):
        figures.learning_curves(history, best_epoch)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=10)
def test_confusion_matrix_counts_as_sklearn_does(pairs):
    labels, predictions = np.array(pairs).T
    (axes,) = figures.confusion_matrix(labels, predictions, ["a", "b", "c", "d"]).axes
    counts = np.zeros((4, 4), int)
    for text in axes.texts:
        column, row = text.get_position()
        counts[int(row), int(column)] = int(text.get_text())
    expected = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(4))
    np.testing.assert_array_equal(counts, expected)
    accuracy = sklearn.metrics.accuracy_score(labels, predictions)
    assert axes.get_title().startswith(f"accuracy {accuracy:.4f} ")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=10)
def test_confusion_matrix_has_the_rates_of_each_class_as_sklearn_has(pairs):
    labels, predictions = np.array(pairs).T
    (axes,) = figures.confusion_matrix(labels, predictions, ["a", "b", "c"]).axes
    right, top = axes.child_axes
    recall, precision = (
        score(labels, predictions, labels=range(3), average=None, zero_division=np.nan)
        for score in (sklearn.metrics.recall_score, sklearn.metrics.precision_score)
    )
    shown = [
        [tick.get_text() for tick in ticks]
        for ticks in (right.get_yticklabels(), top.get_xticklabels())
    ]
    expected = [
        ["-" if np.isnan(x) else f"{100 * x:.0f}" for x in each] for each in (recall, precision)
    ]
    assert shown == expected
    assert (right.get_ylabel(), top.get_xlabel()) == ("recall (%)", "precision (%)")


def test_figures_begin_with_the_title_they_are_given():
    title = "a/0001: seed 1, test 1 examples, $no formula"
    images, probabilities = np.zeros((1, 2, 2)), [[1.0]]
    made = [
        figures.learning_curves(HISTORY, title=title, x_label="step"),
        figures.confusion_matrix([0], [0], ["a"], title=title),
        figures.worst_mistakes(images, [0], probabilities, ["a"], title=title),
    ]
    assert [figure.get_suptitle().splitlines()[0] for figure in made] == [title] * 3
    assert {axes.get_xlabel() for axes in made[0].axes} == {"step"}


def test_confusion_matrix_shows_one_mistake_beside_many_right_answers():
    labels, predictions = [0] * 99 + [1], [0] * 100
    (axes,) = figures.confusion_matrix(labels, predictions, ["cat", "dog"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    colors = _pixels(axes)
    assert tuple(colors[0, 0]) == figures.RIGHT_COLORS(1.0)
    assert tuple(colors[1, 0]) == figures.WRONG_COLORS(1.0)
    assert (colors[[0, 1], [1, 1]] == 1).all()


@pytest.mark.parametrize(
    "figure",
    [
        figures.confusion_matrix([0], [0], [r"$\no formula$"]),
        figures.worst_mistakes(np.zeros((1, 2, 2)), [0], [[1.0]], [r"$\no formula$"]),
    ],
)
def test_figures_print_class_names_as_they_are(figure, tmp_path):
    figures.save(figure, tmp_path / "figure.png")  # a formula would not parse
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], r"labels \(2,\), predictions \(1,\)"),
        ([0, 2], [0, 1], r"labels .* in 0\.\.1, .* got 0\.\.2"),
        ([0, 1], [-1, 1], r"predictions .* got -1\.\.1"),
        ([0.0, 1.0], [0, 1], "labels .* got float64"),
        ([], [], "non-empty"),
    ],
)
def test_confusion_matrix_refuses_bad_classes(labels, predictions, message):
    with pytest.raises(BatchError, match=message):
        figures.confusion_matrix(labels, predictions, ["a", "b"])


def _sheet(labels, probabilities, count=24) -> Figure:
    images = np.arange(len(labels), dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1))
    return figures.worst_mistakes(images, labels, probabilities, ["3", "8"], count)


PROBABILITIES = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.05, 0.95], [0.2, 0.8]])


def test_worst_mistakes_come_first_then_the_least_confident_right_answers():
    figure = _sheet([1, 1, 0, 0, 0], PROBABILITIES)
    shown = [round(_pixels(axes)[0, 0] * 4) for axes in figure.axes]
    assert shown == [3, 0, 4, 2, 1]
    assert [axes.get_title() for axes in figure.axes] == [
        "true 3 → 8 (0.95)",
        "true 8 → 3 (0.90)",
        "true 3 → 8 (0.80)",
        "right 3 (0.60)",
        "right 8 (0.70)",
    ]
    edges = [to_rgba(axes.spines["left"].get_edgecolor()) for axes in figure.axes]
    assert edges == [to_rgba(figures.VERMILION)] * 3 + [to_rgba(figures.BLUE)] * 2
    title = figure.get_suptitle()
    assert title == "3 mistakes in 5 examples; then right answers of least confidence"


def test_worst_mistakes_shows_no_more_than_count():
    figure = _sheet([1, 1, 0, 0, 0], PROBABILITIES, count=2)
    assert [axes.get_title() for axes in figure.axes] == ["true 3 → 8 (0.95)", "true 8 → 3 (0.90)"]
    assert figure.get_suptitle() == "3 mistakes in 5 examples, the worst 2"


def test_worst_mistakes_says_that_none_is_wrong():
    figure = _sheet([0, 1, 0, 1, 1], PROBABILITIES)
    assert figure.get_suptitle().startswith("No mistake in 5 examples")
    assert figure.axes[0].get_title() == "right 3 (0.60)"


def test_worst_mistakes_breaks_long_captions_and_shows_colour():
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, 0, 0, 1] = 200
    figure = figures.worst_mistakes(images, [0], [[0.1, 0.9]], ["automobile", "airplane"])
    assert figure.axes[0].get_title() == "true automobile\n→ airplane (0.90)"
    np.testing.assert_array_equal(_pixels(figure.axes[0])[0, 0], [0, 1, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": np.zeros((3, 2))}, BatchError, r"images .* got \(3, 2\)"),
        ({"images": np.zeros((2, 2, 2))}, BatchError, r"images \(2, 2, 2\), labels \(3,\)"),
        ({"labels": [0, 1, 5]}, BatchError, r"labels .* got 0\.\.5"),
        ({"probabilities": np.ones((3, 4))}, BatchError, r"2 class_names; got \(3, 4\)"),
        ({"probabilities": np.full((3, 2), -2.5)}, BatchError, "got -2.5.*softmax"),
        ({"probabilities": np.full((3, 2), NAN)}, BatchError, "got nan"),
        ({"count": 0}, ConfigError, "count .* got 0"),
    ],
)
def test_worst_mistakes_refuses_bad_input(change, error, message):
    good = {
        "images": np.zeros((3, 2, 2)),
        "labels": [0, 1, 1],
        "probabilities": np.full((3, 2), 0.5),
        "class_names": ["3", "8"],
    }
    with pytest.raises(error, match=message):
        figures.worst_mistakes(**good | change)


def test_a_notebook_shows_a_figure_without_pyplot():
    history = {"train/loss": [(1, 2.0), (2, 1.0)]}
    assert figures.learning_curves(history)._repr_png_().startswith(b"\x89PNG")


def test_save_writes_a_png_and_makes_its_directory(tmp_path):
    path = tmp_path / "figures" / "curves.png"
    figures.save(figures.learning_curves(HISTORY), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(path.parent.iterdir()) == [path]


def test_save_replaces_the_old_file_rather_than_writing_into_it(tmp_path):
    path, other_name = tmp_path / "curves.png", tmp_path / "old.png"
    path.write_bytes(b"old")
    other_name.hardlink_to(path)
    figures.save(Figure(), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert other_name.read_bytes() == b"old"


def test_save_keeps_the_old_file_when_drawing_fails(tmp_path):
    class Torn(Figure):
        def savefig(self, fname, **options):
            fname.write(b"half a picture")
            raise OSError(28, "No space left on device")

    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    with pytest.raises(RunDirectoryError, match=r"curves\.png.*No space left"):
        figures.save(Torn(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "figures").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        figures.save(Figure(), tmp_path / "figures" / "curves.png")


def test_figures_never_import_pyplot():
    program = (
        "import sys, distaff.integrations.matplotlib; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
