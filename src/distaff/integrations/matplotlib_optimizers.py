"""matplotlib: comparisons of optimizers, paths on landscapes, and range tests.

Figures are created without pyplot, so they need no display and no closing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distaff.errors import ConfigError, MetricError
from distaff.loggers.png import viewable
from distaff.tune.comparison import Comparison, Curve
from distaff.tune.landscapes import Landscape
from distaff.tune.range_test import RangeTest, noise_of

# M. Okabe and K. Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/: distinct
# with every kind of colour vision. Without its yellow, which is invisible on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":")

# Light enough for all lines to be visible; the lowest values are darkest.
DEPTHS = LinearSegmentedColormap.from_list("depths", ["#a9b8c6", "#ffffff"])

_CONTOURS = 9
_RESOLUTION = 241


def comparison(found: Comparison) -> Figure:
    """Draws the training loss, and the cosine of update and negative gradient, over steps.

    Lines are means over the seeds, with bands of one standard error. A positive loss has a
    logarithmic axis. A dotted line marks the target.

    Args:
        found: the return value of `distaff.tune.compare`.

    Raises:
        MetricError: no optimizer has a curve.
    """
    losses, cosines = found.curves("losses"), found.curves("cosines")
    if not losses:
        raise MetricError(
            "There is no curve to draw: every optimizer diverged with every learning rate."
        )
    figure = viewable(Figure(figsize=(11, 4.3), layout="constrained"))
    left, right = figure.subplots(1, 2)
    looks = _looks(found.results)
    _draw_curves(left, losses, looks)
    _draw_curves(right, cosines, looks)
    drawn = np.concatenate([curve.mean for curve in losses.values()])
    if (drawn[np.isfinite(drawn)] > 0).all():
        left.set_yscale("log")
    left.axhline(found.target, color="#666666", linewidth=0.9, linestyle=(0, (1, 3)))
    left.set_title("training loss, averaged over an epoch", fontsize=11)
    right.set_title("cosine of update and negative gradient", fontsize=11)
    figure.legend(
        left.lines[: len(losses)],
        [f"{name} ({found.results[name].shown_rate})" for name in losses],
        loc="outside right center",
        title="optimizer (learning rate)",
        edgecolor="none",
        fontsize=9,
        title_fontsize=9,
    )
    return figure


def range_test(found: RangeTest) -> Figure:
    """Draws the loss of each step over its learning rate, and marks the suggestion.

    Args:
        found: the return value of `distaff.tune.find_learning_rate`.
    """
    figure = viewable(Figure(figsize=(7, 4.3), layout="constrained"))
    axes = figure.subplots()
    rates, blue, red, green = found.learning_rates, *COLORS[:3]
    axes.plot(rates, found.losses, ".", color="#999999", ms=4, label="loss of a step")
    axes.plot(rates, found.smoothed, color=blue, linewidth=1.8, label="smoothed")
    marks = (
        ("steepest descent: the suggestion", found.suggestion, red, "-"),
        ("minimum / 10", found.tenth_of_minimum, green, "--"),
    )
    for label, rate, color, line in marks:
        if rate is not None:
            text = f"{label}, {rate:.3g}"
            axes.axvline(rate, color=color, linewidth=1.2, linestyle=line, label=text)
    if found.suggestion is not None:
        height = np.interp(found.suggestion, rates, found.smoothed)
        axes.plot(found.suggestion, height, "o", color=red, mec="white", ms=8, zorder=4)
    low, high = found.smoothed.min(), found.smoothed.max()
    above = max(high - low, 4 * noise_of(found.smoothed), 4 * noise_of(found.losses))
    near = found.losses[found.losses <= high + above]
    low, high = min(low, near.min(initial=low)), max(high, near.max(initial=high))
    margin = 0.05 * (high - low) or 1.0
    axes.set(xscale="log", ylim=(low - margin, high + margin))
    axes.set_xlabel("learning rate of the update, logarithmic")
    axes.set_ylabel("training loss before the update")
    axes.set_title("\n".join(filter(None, (found.title, found.remark))), fontsize=10)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none", fontsize=9)
    return figure


def optimizer_paths(
    landscapes: Iterable[Landscape], paths: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Draws the paths of optimizers on functions of two coordinates.

    Darker is lower; each shade covers an equal area. Stars are global minima, white circles the
    starts of paths, coloured ones their ends.

    Args:
        landscapes: the functions, one panel each.
        paths: positions `[steps, 2]` by the names of landscape and optimizer; a path ends at NaN.

    Raises:
        ConfigError: a landscape has no path, or a path has another shape.
    """
    landscapes = list(landscapes)
    names = dict.fromkeys(name for by_name in paths.values() for name in by_name)
    columns = min(4, len(landscapes) + 1)
    rows = -(-(len(landscapes) + 1) // columns)  # one more cell for the legend
    figure = viewable(Figure(figsize=(2.5 * columns, 2.4 * rows), layout="constrained"))
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    looks = _looks(names)
    for axes, landscape in zip(cells, landscapes, strict=False):
        found = {n: np.asarray(path) for n, path in paths.get(landscape.name, {}).items()}
        if not found or any(path.ndim != 2 or path.shape[1] != 2 for path in found.values()):
            shapes = {name: path.shape for name, path in found.items()}
            raise ConfigError(
                f"The paths on {landscape.name} must have the shape [steps, 2]; got "
                f"{shapes or 'none'}."
            )
        _draw_landscape(axes, landscape)
        for name, path in found.items():
            axes.plot(*path.T, linewidth=1.3, **looks[name])
            axes.plot(*path[-1:].T, "o", color=looks[name]["color"], mec="white", ms=5, zorder=4)
            axes.plot(*path[:1].T, "o", color="white", mec="black", ms=5, zorder=3)
    legend, *rest = cells[len(landscapes) :]
    handles = [legend.plot([], [], linewidth=1.8, label=n, **looks[n])[0] for n in names]
    legend.legend(handles=handles, loc="center", edgecolor="none", fontsize=9, ncols=1)
    legend.set_axis_off()
    for axes in rest:
        axes.remove()
    return figure


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns colour and line style by name, distinct for up to 21 names."""
    count = len(COLORS)
    return {
        name: {"color": COLORS[i % count], "linestyle": LINES[i // count % len(LINES)]}
        for i, name in enumerate(names)
    }


def _draw_curves(
    axes: Axes, curves: Mapping[str, Curve], looks: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, curve in curves.items():
        low, high = curve.mean - curve.standard_error, curve.mean + curve.standard_error
        axes.fill_between(
            curve.steps, low, high, color=looks[name]["color"], alpha=0.2, linewidth=0
        )
        axes.plot(curve.steps, curve.mean, linewidth=1.5, label=name, **looks[name])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_landscape(axes: Axes, landscape: Landscape) -> None:
    low, high = landscape.bounds(2)
    x, y = (np.linspace(*ends, _RESOLUTION) for ends in zip(low, high, strict=True))
    values = np.asarray(landscape(np.stack(np.meshgrid(x, y), axis=-1)))
    levels = np.unique(np.quantile(values, np.linspace(0, 1, _CONTOURS + 1)))
    shades = np.digitize(values, levels[1:-1])
    axes.pcolormesh(x, y, shades, cmap=DEPTHS, shading="nearest", rasterized=True)
    axes.plot(*landscape.minima(2).T, "*", color="#F0E442", mec="black", ms=10, zorder=5)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.tick_params(labelsize=7)
    axes.set_title(landscape.name, fontsize=10)
