"""The learning curves of a run, thinned, for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distaff.errors import RunDirectoryError
from distaff.loggers.history import read_rows
from distaff.loggers.row import COLUMNS
from distaff.report.summary import start_times

_NUM_AXES = 3

_FEWEST_POINTS = 50
"""The fewest points of a long curve."""


class _Curve(NamedTuple):
    """The values of one metric, and where they were logged."""

    step: list[int]
    epoch: list[int]
    minutes: list[float]
    value: list[float | None]

    def add(self, place: tuple[int, int], minutes: float, value: float | None) -> None:
        """Appends a value."""
        self.step.append(place[0])
        self.epoch.append(place[1])
        self.minutes.append(minutes)
        self.value.append(value)


def curves(path: Path, most_numbers: int) -> dict[str, Any]:
    """Returns the scalar metrics by name, and the axes that they share: steps, epochs, minutes.

    Args:
        path: the run directory.
        most_numbers: the most numbers of all curves and axes; longer curves are thinned.
    """
    columns = _columns(path)
    known = {tuple(column.step) for column in columns.values()}
    most = most_numbers // max(1, len(columns) + _NUM_AXES * len(known))
    axes: dict[str, dict[str, list[Any]]] = {}
    found = {}
    for name, column in columns.items():
        kept = _thinned(len(column.value), max(_FEWEST_POINTS, most))
        step, epoch, minutes, value = ([each[i] for i in kept] for each in column)
        axis = {"step": step, "epoch": epoch, "minutes": minutes}
        axes.setdefault(repr(axis), axis)
        found[name] = {"axis": list(axes).index(repr(axis)), "value": value}
    return {"axes": list(axes.values()), "curves": found}


def _columns(path: Path) -> dict[str, _Curve]:
    columns: dict[str, _Curve] = {}
    arrays: set[str] = set()
    elapsed = _Elapsed(start_times(path))
    for row in read_rows(path):
        place, minutes = _place(row, path), elapsed.minutes(row.get("time"))
        for name, value in row.items():
            if isinstance(value, list):
                arrays.add(name)
            elif name not in COLUMNS:
                column = columns.setdefault(name, _Curve([], [], [], []))
                column.add(place, minutes, _finite(value))
    return {name: column for name, column in columns.items() if name not in arrays}


def _place(row: Mapping[str, Any], path: Path) -> tuple[int, int]:
    step, epoch = row["step"], row["epoch"]
    if not (isinstance(step, int) and isinstance(epoch, int)):
        raise RunDirectoryError(
            f"Each row of a log needs a step and an epoch, two integers; a row of "
            f"{str(path / 'metrics.jsonl')!r} has step {step!r} and epoch {epoch!r}. Remove it."
        )
    return step, epoch


class _Elapsed:
    """The minutes of training at each row, without the time between a run's end and its resume."""

    def __init__(self, starts: list[float]) -> None:
        self._starts, self._skipped = starts, 0.0
        self._last: float | None = starts[0] if starts else None
        self._origin = self._last

    def minutes(self, time: Any) -> float:
        """Returns the minutes at a row, given its Unix time; rows are given in their order."""
        if not isinstance(time, int | float):
            time = self._last or 0.0
        if self._last is None or self._origin is None:
            self._last = self._origin = float(time)
        resumed = max((start for start in self._starts if start <= time), default=self._last)
        self._skipped += max(0.0, resumed - self._last)
        self._last = max(self._last, time)
        return round(max(0.0, time - self._origin - self._skipped) / 60, 3)


def _thinned(count: int, most: int) -> list[int]:
    """Returns the indices of the points to keep, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _finite(value: Any) -> float | None:
    """Returns a number with six digits; None for NaN, infinity, and what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{number:.6g}") if math.isfinite(number) else None
