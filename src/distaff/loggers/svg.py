"""Draws learning curves as SVG, in about a millisecond and without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
"""M. Okabe and K. Ito, Color Universal Design, 2008: distinct with every kind of colour vision."""

_COLORS = {"train": BLUE, "step": BLUE, "val": VERMILION, "test": GREEN}
_OTHERS = (PURPLE, ORANGE, SKY, GREEN)

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 34, 34
_TITLE = 26
_MOST_POINTS = 400
_MARKED_POINTS = 40


class _Axis(NamedTuple):
    """Maps values of a range to pixels.

    Attributes:
        low: the value at `start`; its logarithm if `is_log`.
        high: the value at `end`.
        start: pixel of `low`.
        end: pixel of `high`.
        is_log: whether the axis is logarithmic.
        ticks: labelled values.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool
    ticks: list[float]

    def at(self, value: float) -> float:
        """Returns the pixel of a value."""
        value = math.log10(value) if self.is_log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def panels(history: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Groups series named `split/metric` by metric, then by split, in the order of the history."""
    found: dict[str, dict[str, Points]] = {}
    for name, points in history.items():
        split, _, metric = name.partition("/")
        found.setdefault(metric, {})[split] = points
    return found


def learning_curves(
    history: Mapping[str, Points],
    *,
    title: str = "",
    x_label: str = "epoch",
    best: float | None = None,
    most_panels: int = 12,
) -> str:
    """Returns learning curves as an SVG document, with one panel per metric and a line per split.

    A positive loss that spans a factor of ten gets a logarithmic axis. Values that are not finite
    are gaps.

    Args:
        history: `(x, value)` pairs by name, such as `{"train/loss": [(1, 2.3), (2, 0.9)]}`.
        title: the text above all panels.
        x_label: the meaning of `x`.
        best: the `x` of the best model, marked by a dashed line; None to mark nothing.
        most_panels: the most panels to draw.
    """
    drawn = list(panels(history).items())[:most_panels]
    columns = 2 if len(drawn) == 4 else max(1, min(3, len(drawn)))
    rows, top = -(-len(drawn) // columns), _TITLE if title else 0
    width, height = columns * _WIDTH, rows * _HEIGHT + top
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    if title:
        parts.append(_text(width / 2, 18, title, anchor="middle", size=12))
    for place, (metric, splits) in enumerate(drawn):
        row, column = divmod(place, columns)
        parts.append(f'<g transform="translate({column * _WIDTH},{top + row * _HEIGHT})">')
        parts += _panel(metric, splits, x_label, best)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    metric: str, splits: Mapping[str, Points], x_label: str, best: float | None
) -> list[str]:
    ends = _LEFT, _WIDTH - _RIGHT
    points = [point for series in splits.values() for point in series]
    finite = [y for _, y in points if math.isfinite(y)]
    middle = sum(ends) / 2
    parts = [
        _text(middle, _HEIGHT - 6, x_label, anchor="middle", color="#666"),
        *_legend(metric, splits),
    ]
    if not finite:
        return [*parts, _text(middle, _HEIGHT / 2, "no finite value", anchor="middle")]
    is_log = "loss" in metric and 0 < 10 * min(finite) < max(finite)
    x = _axis([x for x, _ in points], *ends, whole=True)
    y = _axis(finite, _HEIGHT - _BOTTOM, _TOP, is_log=is_log)
    for tick in y.ticks:
        height = f"{y.at(tick):.1f}"
        parts.append(_line(x.start, height, x.end, height, "#e6e6e6"))
        parts.append(_text(_LEFT - 5, y.at(tick) + 4, _number(tick), anchor="end"))
    below = _HEIGHT - _BOTTOM + 14
    parts += [_text(x.at(tick), below, _number(tick), anchor="middle") for tick in x.ticks]
    parts.append(_line(x.start, y.start, x.end, y.start, "#666"))
    if best is not None and points and min(points)[0] <= best <= max(points)[0]:
        parts.append(_line(x.at(best), _TOP, x.at(best), y.start, "#666", dash="4 3"))
    for place, (split, series) in enumerate(splits.items()):
        parts += _curve(series, x, y, _color(split, place))
    return parts


def _legend(metric: str, splits: Mapping[str, Points]) -> list[str]:
    parts, left = [_text(_LEFT, 16, metric, size=12)], _WIDTH - _RIGHT
    for place, split in reversed(list(enumerate(splits))):
        text = _text(left, 16, split, anchor="end", color=_color(split, place))
        parts.append(text)
        left -= 7 * len(split) + 10
    return parts


def _curve(series: Points, x: _Axis, y: _Axis, color: str) -> list[str]:
    """Returns the lines between finite values, with markers if there are few."""
    series = _thinned(series)
    runs: list[list[str]] = [[]]
    for at, value in series:
        if math.isfinite(value) and (value > 0 or not y.is_log):
            runs[-1].append(f"{x.at(at):.1f},{y.at(value):.1f}")
        elif runs[-1]:
            runs.append([])
    style = f'fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"'
    parts = [f'<polyline {style} points="{" ".join(run)}"/>' for run in runs if len(run) > 1]
    if len(series) <= _MARKED_POINTS:
        for left, top in (point.split(",") for run in runs for point in run):
            parts.append(f'<circle cx="{left}" cy="{top}" r="2" fill="{color}"/>')
    return parts


def _thinned(series: Points) -> Points:
    """Returns at most `_MOST_POINTS` points, the last one included."""
    every = -(-len(series) // _MOST_POINTS)
    return series if every <= 1 else [*series[:-1:every], series[-1]]


def _axis(
    values: Iterable[float], start: float, end: float, *, is_log: bool = False, whole: bool = False
) -> _Axis:
    low, high = (f(values) for f in (min, max))
    if is_log:
        low, high = math.log10(low), math.log10(high)
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - room, high + room
    ticks = _powers(low, high) if is_log else _ticks(low, high, whole=whole)
    return _Axis(low, high, start, end, is_log, ticks)


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    """Returns three to six round numbers in a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(step * n, 12) for n in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Returns powers of ten in a range of exponents, with their multiples if there are few."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return ticks[:: -(-len(ticks) // 6)] if ticks else []


def _color(split: str, place: int) -> str:
    return _COLORS.get(split) or _OTHERS[place % len(_OTHERS)]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, color: str = "#222"
) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x: object, y: object, to_x: object, to_y: object, color: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{color}"{dashes}/>'
