"""matplotlib: learning curves, confusion matrix, and worst mistakes.

Figures are created without pyplot, so they need no display and no closing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distaff.core.files import explained
from distaff.core.paths import as_path
from distaff.errors import BatchError, ConfigError, MetricError
from distaff.loggers.disk import replace
from distaff.loggers.png import encode_figure, viewable

# M. Okabe and K. Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/: distinct
# with every kind of colour vision.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
GREY = "#666666"
SPLIT_COLORS = {"train": BLUE, "val": VERMILION, "test": GREEN}

RIGHT_COLORS = LinearSegmentedColormap.from_list("right", ["#ffffff", "#b5d6ea"])
WRONG_COLORS = LinearSegmentedColormap.from_list("wrong", ["#fdebdc", "#f0975a"])


def learning_curves(
    history: Mapping[str, Sequence[tuple[int, float]]],
    best_epoch: int | None = None,
    *,
    title: str = "",
    x_label: str = "epoch",
) -> Figure:
    """Draws one panel per metric, with one line per split.

    A positive loss that spans a factor of ten gets a logarithmic axis. Values that are not finite
    are gaps.

    Args:
        history: `(epoch, value)` pairs by name, `{"train/loss": [(1, 2.3), (2, 0.9)]}`; the part
            before the first slash is the split, the rest is the metric.
        best_epoch: the epoch to mark; None to disable.
        title: the title of the figure, such as the name of the run; not parsed as a formula.
        x_label: the label of the horizontal axis.

    Raises:
        MetricError: the history is empty, a name has no slash, or `best_epoch` is not in it.
    """
    panels = _panels(history)
    epochs = sorted({epoch for series in history.values() for epoch, _ in series})
    if best_epoch is not None and best_epoch not in epochs:
        raise MetricError(
            f"best_epoch is an epoch of the history; got {best_epoch}, the history has {epochs}."
        )
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = viewable(Figure(figsize=(max(5.0, 4.4 * columns), 3.4 * rows), layout="constrained"))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (metric, splits) in zip(grid.flat, panels.items(), strict=False):
        _draw_metric(axes, metric, splits, best_epoch)
        axes.set_xlabel(x_label)
        if epochs:
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    _add_title(figure, title)
    return figure


def confusion_matrix(
    labels: Any, predictions: Any, class_names: Sequence[str], *, title: str = ""
) -> Figure:
    """Draws a confusion matrix, with the accuracy as its title, and the rates of each class.

    Correct predictions are blue, mistakes orange, each with its own colour scale, so that a few
    mistakes are visible next to many correct predictions. Empty cells are 0. The recall of a class
    is on the right of its row, the precision above its column, in percent.

    Args:
        labels: true classes, int `[n]`: the rows.
        predictions: predicted classes, int `[n]`: the columns.
        class_names: the names of the classes, in order.
        title: the title of the figure, such as the name of the run; not parsed as a formula.

    Raises:
        BatchError: an array has a wrong shape or an invalid class.
    """
    labels = _classes("labels", labels, len(class_names))
    predictions = _classes("predictions", predictions, len(class_names))
    _check_lengths(labels=labels, predictions=predictions)
    classes = len(class_names)
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predictions), 1)

    cell = min(0.46, 14 / classes)
    side = max(3.6, cell * classes + 1.4)
    figure = viewable(Figure(figsize=(side, side), layout="constrained"))
    axes = figure.subplots()
    axes.imshow(_cell_colors(counts))
    font_size = min(10.0, 72 * cell * 0.36)
    for row, column in np.argwhere(counts):
        text = str(counts[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=font_size)
    names = [str(name) for name in class_names]
    turn = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(range(classes), names, rotation=turn, fontsize=font_size, parse_math=False)
    axes.set_yticks(range(classes), names, fontsize=font_size, parse_math=False)
    axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color("#bbbbbb")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    _add_rates(axes, counts, font_size)
    right, total = int(counts.trace()), len(labels)
    axes.set_title(f"accuracy {right / total:.4f} ({right} of {total})", fontsize=11)
    _add_title(figure, title)
    return figure


def worst_mistakes(
    images: Any,
    labels: Any,
    probabilities: Any,
    class_names: Sequence[str],
    count: int = 24,
    *,
    title: str = "",
) -> Figure:
    """Shows misclassified images, the most confident mistakes first.

    Remaining cells show the least confident correct predictions, in another colour. The title of a
    cell is the true class, the predicted class and its probability.

    Args:
        images: `[n, height, width]`, or with 1 or 3 channels as the last axis. Black is the lowest
            value of all images, white the highest.
        labels: true classes, int `[n]`.
        probabilities: predicted probabilities, float `[n, classes]`.
        class_names: the names of the classes, in order.
        count: number of cells.
        title: the first line of the title, such as the name of the run.

    Raises:
        BatchError: an array has a wrong shape, or an invalid class or probability.
        ConfigError: `count` is less than 1.
    """
    if count < 1:
        raise ConfigError(f"count is at least 1; got {count}.")
    images = _pictures(images)
    labels = _classes("labels", labels, len(class_names))
    probabilities = _probabilities(probabilities, len(class_names))
    _check_lengths(images=images, labels=labels, probabilities=probabilities)
    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = predictions != labels
    # Mistakes by decreasing confidence, then correct predictions by increasing confidence.
    shown = np.lexsort((np.where(wrong, -confidence, confidence), ~wrong))[:count]

    names = [str(name) for name in class_names]
    captions = []
    for row in shown:
        true, predicted = names[labels[row]], names[predictions[row]]
        words = (f"true {true}", f"→ {predicted}") if wrong[row] else (f"right {true}",)
        captions.append((*words, f"({confidence[row]:.2f})"))
    # About twenty letters of nine-point type fit above an image.
    lines = 1 if max(len(" ".join(caption)) for caption in captions) <= 20 else 2

    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    size = (max(4.5, 1.5 * columns), (1.55 + 0.15 * lines) * rows + 0.3)
    figure = viewable(Figure(figsize=size, layout="constrained"))
    heading = "\n".join(filter(None, (title, _mistakes_title(wrong, shown))))
    figure.suptitle(heading, fontsize=11, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, row, caption in zip(grid.flat, shown, captions, strict=False):
        color = VERMILION if wrong[row] else BLUE
        axes.imshow(images[row], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        text = (" " if lines == 1 else "\n").join((caption[0], " ".join(caption[1:])))
        axes.set_title(text, fontsize=9, color=color, parse_math=False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=color, linewidth=1.5)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG, 150 dots per inch, atomically; creates the directory if needed.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    path = as_path(path, "path")
    with explained(path, rule="Saving a figure needs a path that can be {}", other="path"):
        replace(path, encode_figure(figure))


def _panels(
    history: Mapping[str, Sequence[tuple[int, float]]],
) -> dict[str, dict[str, Sequence[tuple[int, float]]]]:
    """Returns the series by metric, then by split, in the order of the history."""
    panels: dict[str, dict[str, Sequence[tuple[int, float]]]] = {}
    for name, series in history.items():
        split, slash, metric = name.partition("/")
        if not slash:
            raise MetricError(
                f"The name of a series is split and metric, such as 'train/loss'; got {name!r}."
            )
        panels.setdefault(metric, {})[split] = series
    if not panels:
        raise MetricError("Learning curves need at least one series; the history is empty.")
    return panels


def _draw_metric(
    axes: Axes,
    metric: str,
    splits: Mapping[str, Sequence[tuple[int, float]]],
    best_epoch: int | None,
) -> None:
    finite = np.array([])
    for split, series in splits.items():
        epochs, values = np.array(series, float).reshape(-1, 2).T
        values = np.where(np.isfinite(values), values, np.nan)
        finite = np.append(finite, values[~np.isnan(values)])
        color = SPLIT_COLORS.get(split, PURPLE)
        marker = "o" if len(epochs) <= 40 else ""
        at_best = values[epochs == best_epoch]
        label = f"{split} ({at_best[-1]:.4f})" if len(at_best) else split
        axes.plot(epochs, values, color=color, linewidth=1.6, marker=marker, ms=3, label=label)
        axes.plot(epochs[epochs == best_epoch], at_best, "o", color=color, ms=7, mec="white")
    if best_epoch is not None:
        axes.axvline(best_epoch, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    if "loss" in metric and len(finite) and 0 < 10 * finite.min() < finite.max():
        axes.set_yscale("log")
    if not len(finite):
        note = axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")
        note.set(color=GREY, backgroundcolor="white")
        axes.set_yticks([])
    axes.set_title(metric, fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    title = None if best_epoch is None else f"best epoch: {best_epoch}"
    axes.legend(edgecolor="none", fontsize=9, title=title, title_fontsize=9, alignment="left")


def _add_title(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=10, color=GREY, parse_math=False)


def _add_rates(axes: Axes, counts: np.ndarray, font_size: float) -> None:
    """Adds the recall of each class on the right, and its precision at the top, in percent."""
    right = counts.diagonal()
    places = range(len(counts))
    for side, label, totals in (
        ("right", "recall", counts.sum(1)),
        ("top", "precision", counts.sum(0)),
    ):
        rates = [
            f"{100 * n / total:.0f}" if total else "-"
            for n, total in zip(right, totals, strict=True)
        ]
        is_right = side == "right"
        second = axes.secondary_yaxis(side) if is_right else axes.secondary_xaxis(side)
        set_ticks = second.set_yticks if is_right else second.set_xticks
        set_ticks(places, rates, fontsize=font_size, color=GREY)
        (second.set_ylabel if is_right else second.set_xlabel)(f"{label} (%)", color=GREY)
        second.tick_params(length=0)
        second.spines[:].set_visible(False)


def _cell_colors(counts: np.ndarray) -> np.ndarray:
    """Returns the colours of a confusion matrix, `[classes, classes, 4]`."""
    diagonal = np.eye(len(counts), dtype=bool)
    mistakes = np.where(diagonal, 0, counts)
    share_right = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share_worst = mistakes / max(mistakes.max(), 1)
    colors = np.where(diagonal[..., None], RIGHT_COLORS(share_right), WRONG_COLORS(share_worst))
    return np.where((counts == 0)[..., None], 1.0, colors)


def _mistakes_title(wrong: np.ndarray, shown: np.ndarray) -> str:
    mistakes, total = int(wrong.sum()), len(wrong)
    if not mistakes:
        return f"No mistake in {total} examples; shown: right answers of least confidence"
    noun = "mistake" if mistakes == 1 else "mistakes"
    rest = "" if wrong[shown].all() else "; then right answers of least confidence"
    part = f", the worst {len(shown)}" if mistakes > len(shown) else ""
    return f"{mistakes} {noun} in {total} examples{part}{rest}"


def _classes(name: str, values: Any, classes: int) -> np.ndarray:
    """Returns class numbers as an int array `[n]`."""
    array = np.asarray(values)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise BatchError(
            f"{name} must be a non-empty int array [n] of classes; got {array.dtype} of shape "
            f"{array.shape}."
        )
    if array.min() < 0 or array.max() >= classes:
        raise BatchError(
            f"{name} must be in 0..{classes - 1}, since there are {classes} class_names; got "
            f"{array.min()}..{array.max()}. Name every class."
        )
    return array


def _probabilities(values: Any, classes: int) -> np.ndarray:
    """Returns probabilities as a float array `[n, classes]`."""
    array = np.asarray(values).astype(float)
    if array.ndim != 2 or array.shape[1] != classes:
        raise BatchError(
            f"probabilities must have the shape [n, {classes}], since there are {classes} "
            f"class_names; got {array.shape}."
        )
    if not ((array >= 0) & (array <= 1 + 1e-3)).all():
        raise BatchError(
            f"probabilities must be in [0, 1]; got {array.min():g}..{array.max():g}. "
            "Convert logits to probabilities with jax.nn.softmax."
        )
    return array


def _pictures(values: Any) -> np.ndarray:
    """Returns images scaled to [0, 1], `[n, height, width]` or `[n, height, width, 3]`."""
    array = np.asarray(values).astype(float)
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if not array.size or not (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 3)):
        raise BatchError(
            "images must have the shape [n, height, width], [n, height, width, 1] or "
            f"[n, height, width, 3]; got {np.shape(values)}."
        )
    low, high = array.min(), array.max()
    return (array - low) / (high - low) if high > low else np.zeros_like(array)


def _check_lengths(**arrays: np.ndarray) -> None:
    if len({len(array) for array in arrays.values()}) > 1:
        listed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise BatchError(f"All arrays must have the same first axis; got {listed}.")
