"""The recorded metrics of a run, as arrays by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distaff.core import optional
from distaff.core.config import strict_json
from distaff.core.paths import as_path
from distaff.core.typing import Values
from distaff.core.views import html
from distaff.errors import MetricError, RunDirectoryError, UnknownMetricError, nearest
from distaff.loggers import svg
from distaff.loggers.protocol import JSON
from distaff.loggers.row import COLUMNS, as_row

_FEW_EPOCHS = 3
"""Runs with fewer epochs are drawn over their steps."""


class _Column(NamedTuple):
    """The values of one metric."""

    steps: list[int]
    epochs: list[int]
    values: list[Any]

    def cut(self, length: int) -> None:
        """Drops all but the first values."""
        for each in self:
            del each[length:]


class ColumnLogger:
    """Keeps metrics in memory by name, and no media: the log of a run without a directory."""

    def __init__(self) -> None:
        self.columns: dict[str, _Column] = {}

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Appends the metrics to their columns, except arrays within an epoch (`step/`).

        Metrics that a log file would not accept are left out.
        """
        kept = {n: x for n, x in metrics.items() if not (n.startswith("step/") and np.ndim(x))}
        with suppress(MetricError):
            self.add(as_row(kept, step=step, epoch=epoch, time=0.0))

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends one row, as `JsonlLogger` writes it."""
        step, epoch = int(row["step"]), int(row["epoch"])
        for name, value in row.items():
            if name not in COLUMNS:
                column = self.columns.setdefault(name, _Column([], [], []))
                is_array = isinstance(value, list)
                column.steps.append(step)
                column.epochs.append(epoch)
                column.values.append(np.asarray(value, np.float64) if is_array else float(value))

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing."""

    def position(self) -> dict[str, int]:
        """Returns the number of values by name."""
        return {name: len(column.values) for name, column in self.columns.items()}

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops later values; see `ResumingLogger`."""
        for name, column in self.columns.items():
            known = position.get(name, 0) if isinstance(position, Mapping) else None
            column.cut(known if isinstance(known, int) else _up_to(column, step))

    def close(self, status: str) -> None:
        """Does nothing: the metrics stay."""


def _up_to(column: _Column, step: int) -> int:
    return int(np.searchsorted(column.steps, step, side="right"))


class History(Mapping[str, np.ndarray]):
    """The recorded metrics of a run, including those from before it was resumed.

    A mapping from names to float64 arrays: `history["val/loss"]` is `[validations]`, and
    `history["step/loss"]` has one value per log line within epochs. A metric that is an array has
    its axes after the first one. The log is read at the first use.

    Args:
        source: the run directory, or the logger that kept the metrics.
        title: the title of its figures.
        best_epoch: epoch of the best model; None if unknown.

    >>> history = ColumnLogger()
    >>> history.log_metrics({"val/loss": 0.5}, step=10, epoch=1)
    >>> History(history)["val/loss"]
    array([0.5])
    """

    def __init__(
        self, source: Path | ColumnLogger, *, title: str = "", best_epoch: int | None = None
    ) -> None:
        self._source, self.title, self.best_epoch = source, title, best_epoch

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """Returns the history of a run directory, of a finished run or one that is running.

        A damaged row of the log raises RunDirectoryError when it is read.

        Raises:
            RunDirectoryError: there is no such directory.
        """
        directory = as_path(path, "path").absolute()
        if not directory.is_dir():
            raise _no_directory(directory)
        return cls(directory, title=f"{directory.parent.name}/{directory.name}")

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """The completed optimizer updates at each value, int64, by name of the metric."""
        return {name: np.array(column.steps, np.int64) for name, column in self._columns.items()}

    @property
    def epochs(self) -> dict[str, np.ndarray]:
        """The epoch of each value, int64, by name of the metric."""
        return {name: np.array(column.epochs, np.int64) for name, column in self._columns.items()}

    def figure(self) -> Any:
        """Returns the learning curves as a matplotlib Figure, with one panel per metric.

        Runs of fewer than three epochs, or validated within epochs, are drawn over their steps.

        Raises:
            MissingExtraError: matplotlib is not installed.
            MetricError: nothing is recorded.
        """
        plots = optional.load("matplotlib", extra="plots")
        curves, x_label, best = self.curves()
        return plots.learning_curves(curves, best, title=self.title, x_label=x_label)

    def svg(self) -> str:
        """Returns the learning curves as SVG; needs no other package.

        Raises:
            MetricError: nothing is recorded.
        """
        curves, x_label, best = self.curves()
        return svg.learning_curves(curves, title=self.title, x_label=x_label, best=best)

    def curves(self) -> tuple[dict[str, list[tuple[int, float]]], str, int | None]:
        """Returns what to draw: pairs `(x, value)` by name, what `x` is, and the best `x`.

        Raises:
            MetricError: nothing is recorded.
        """
        columns = {name: column for name, column in self._columns.items() if _is_curve(column)}
        of_epochs = {n: column for n, column in columns.items() if n.startswith(("train/", "val"))}
        num_epochs = len({epoch for column in of_epochs.values() for epoch in column.epochs})
        of_steps = {n: column for n, column in columns.items() if n.startswith("step/")}
        if num_epochs >= _FEW_EPOCHS or not any(len(x.steps) > 2 for x in of_steps.values()):
            is_within = any(len({*x.epochs}) < len(x.epochs) for x in of_epochs.values())
            drawn, x_label, best = of_epochs, "epoch", self.best_epoch
            if is_within:  # several validations per epoch
                x_label, best = "step", None
        else:
            metrics = {name.partition("/")[2] for name in of_epochs} or {"loss"}
            wanted = {n: x for n, x in of_steps.items() if n.partition("/")[2] in metrics}
            vals = {n: column for n, column in of_epochs.items() if n.startswith("val")}
            drawn, x_label, best = {**wanted, **vals}, "step", None
        if not drawn:
            raise MetricError("A figure needs at least one recorded epoch; this run has none yet.")
        curves = {}
        for name, column in drawn.items():
            at = column.epochs if x_label == "epoch" else column.steps
            curves[name] = list(zip(at, column.values, strict=True))
        is_there = any(x == best for series in curves.values() for x, _ in series)
        return curves, x_label, best if is_there else None

    @cached_property
    def _columns(self) -> dict[str, _Column]:
        if isinstance(self._source, ColumnLogger):
            return {n: _Column(*map(list, column)) for n, column in self._source.columns.items()}
        logger = ColumnLogger()
        for row in read_rows(self._source):
            logger.add(row)
        return logger.columns

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._columns:
            raise UnknownMetricError(f"There is no metric {name!r}. {nearest(name, self)}")
        values = self._columns[name].values
        if len({np.shape(value) for value in values}) > 1:  # another number of classes, perhaps
            array = np.empty(len(values), object)
            array[:] = values
            return array
        return np.array(values, np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, History) or self._columns.keys() != other._columns.keys():
            return NotImplemented if not isinstance(other, History) else False
        return all(_are_equal(self._columns[name], other._columns[name]) for name in self)

    __hash__ = None

    def _repr_html_(self) -> str:
        try:
            return self.svg()
        except MetricError:
            return html.preformatted(repr(self))

    def __repr__(self) -> str:
        lengths = ", ".join(f"{name} [{len(c.values)}]" for name, c in self._columns.items())
        return f"History({lengths})"


def read_rows(directory: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of `metrics.jsonl`, without a last one that is incomplete."""
    file = directory / "metrics.jsonl"
    if not file.exists():
        if not directory.is_dir():
            raise _no_directory(directory)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                yield _row(line, f"line {number} of {str(file)!r}")


def _row(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        row = strict_json.loads(line)
    except ValueError as error:
        raise RunDirectoryError(
            f"A log must be JSON; {place} is not: {error}. Remove it."
        ) from error
    if not (isinstance(row, Mapping) and {"step", "epoch"} <= row.keys()):
        raise RunDirectoryError(
            f"A row of a log needs step and epoch; {place} lacks them. Remove it."
        )
    return row


def _no_directory(path: Path) -> RunDirectoryError:
    return RunDirectoryError(
        f"There is no run directory {str(path)!r}. If it was moved, call History.read with its new "
        "path."
    )


def _is_curve(column: _Column) -> bool:
    return np.ndim(column.values[0]) == 0


def _are_equal(one: _Column, other: _Column) -> bool:
    def same(x: Any, y: Any) -> bool:
        return np.array_equal(x, y, equal_nan=True)

    are_alike = one.steps == other.steps and one.epochs == other.epochs
    return are_alike and all(map(same, one.values, other.values))
