"""Packs the metrics of each step into a row of a table, merged on the host once per window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import distaff.metrics as metrics_lib
from distaff.metrics import Metric
from distaff.metrics.accumulators import known_or_zero
from distaff.metrics.limits import Breach, Limits, first_breach
from distaff.step.guard import FLAGS, Flags

_MAX_TABLE_BYTES = 2**16
_MAX_TABLE_ROWS = 64


class MetricLayout:
    """The layout of a step's metrics as a row of uint32.

    One array per program costs the device and the host less than one array per number. The rows
    hold bits rather than floats, so values of every dtype are exact.

    Args:
        metrics: the metrics of one step, or their shapes.

    Attributes:
        width: uint32 numbers in a row.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._example = dict(metrics)
        leaves, self._structure = jax.tree.flatten(self._example)
        self._leaves = [(leaf.shape, _wide(leaf.dtype)) for leaf in leaves]
        sizes = [int(np.prod(shape)) * dtype.itemsize // 4 for shape, dtype in self._leaves]
        self._ends = np.cumsum([0, *sizes])
        self.width = int(self._ends[-1])

    def row(self, metrics: Mapping[str, Metric]) -> jax.Array:
        """Returns the metrics of a step as a row, uint32 `[width]`; for use inside a program."""
        leaves = self._structure.flatten_up_to(dict(metrics))
        parts = [
            jax.lax.bitcast_convert_type(jnp.asarray(leaf, dtype), jnp.uint32).reshape(-1)
            for leaf, (_, dtype) in zip(leaves, self._leaves, strict=True)
        ]
        return jnp.concatenate([jnp.zeros(0, jnp.uint32), *parts])

    def metrics(self, rows: np.ndarray) -> dict[str, Metric]:
        """Returns the metrics in rows `[rows, width]`, with float64 leaves `[rows, ...]`."""
        parts = zip(self._ends[:-1], self._ends[1:], self._leaves, strict=True)
        leaves = [
            np.ascontiguousarray(rows[:, start:end])
            .view(dtype)
            .reshape(len(rows), *shape)
            .astype(np.float64)
            for start, end, (shape, dtype) in parts
        ]
        return self._structure.unflatten(leaves)

    def like(self, leaves: Sequence[np.ndarray]) -> dict[str, Metric]:
        """Returns merged metrics with these leaves.

        Args:
            leaves: float64, with the shapes of the metrics of a step.

        Raises:
            ValueError: a dtype or shape differs.
        """
        found = [(leaf.dtype, leaf.shape) for leaf in leaves]
        if found != [(np.dtype(np.float64), shape) for shape, _ in self._leaves]:
            raise ValueError(f"the metrics of a step do not have these dtypes and shapes: {found}")
        return self._structure.unflatten(leaves)

    def with_guard_toggled(self) -> MetricLayout:
        """Returns the layout with the guard's flags removed, or added if it has none."""
        metrics = {name: x for name, x in self._example.items() if not isinstance(x, Flags)}
        if len(metrics) == len(self._example):
            flags = jax.ShapeDtypeStruct((len(Flags.names),), np.dtype(np.float32))
            metrics[FLAGS] = Flags(flags)
        return MetricLayout(metrics)

    def convert(self, rows: np.ndarray, layout: MetricLayout) -> np.ndarray:
        """Converts rows of another layout to this one; metrics missing there are 0."""
        known = {name: rows[:, start:end] for name, (start, end) in layout.spans.items()}
        parts = [np.zeros((len(rows), 0), np.uint32)]
        for name, (start, end) in self.spans.items():
            parts.append(known.get(name, np.zeros((len(rows), end - start), np.uint32)))
        return np.concatenate(parts, axis=1)

    def completed(self, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
        """Returns merged metrics with the names of a step's metrics; missing flags are 0."""
        none = Flags(np.zeros(len(Flags.names)))
        return {name: metrics.get(name, none) for name in self._example}

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Start and end of each metric in a row, by name, in their order."""
        sizes = {name: len(jax.tree.leaves(self._example[name])) for name in sorted(self._example)}
        ends = self._ends[np.cumsum([0, *sizes.values()])].tolist()
        return dict(zip(sizes, pairwise(ends), strict=True))

    def table_rows(self, log_every: int) -> int:
        """Returns the number of rows in the table of single steps."""
        fitting = _MAX_TABLE_BYTES // (4 * max(self.width, 1))
        return max(1, min(log_every, fitting, _MAX_TABLE_ROWS))


class MetricTable(NamedTuple):
    """Packed metrics of consecutive steps, on the device.

    Attributes:
        first: completed steps before the first row.
        num_rows: filled rows.
        rows: uint32 `[rows, width]`.
        at_end: whether the filled rows are the last ones, rather than the first.
    """

    first: int
    num_rows: int
    rows: jax.Array
    at_end: bool

    def fetch(self) -> np.ndarray:
        """Copies the filled rows to the host; waits for them."""
        rows = np.asarray(self.rows)
        return rows[len(rows) - self.num_rows :] if self.at_end else rows[: self.num_rows]


class WindowEnd(NamedTuple):
    """Merged metrics of the steps since the previous log line.

    Attributes:
        step: the last step of the window.
        metrics: merged metrics, on the host.
        bad: the first bad step that was not skipped, or None.
        skipped: the skipped steps.
        breach: the first batch with a value out of range, counted from 0 at the first step of a
            run, or None.
    """

    step: int
    metrics: dict[str, Metric]
    bad: BadStep | None = None
    skipped: tuple[int, ...] = ()
    breach: Breach | None = None


class BadStep(NamedTuple):
    """A step with a bad loss or state.

    Attributes:
        step: completed updates, including this step.
        is_spike: whether the loss is a spike; otherwise a number is NaN or infinite.
    """

    step: int
    is_spike: bool


class MetricWindows:
    """Reads the metrics of an epoch window by window, each once the next window is full.

    Args:
        layout: the layout of a row.
        log_every: a window ends at each multiple of this in the global step.
        step: completed steps.
        rows: rows of the last of these steps, if they belong to an unfinished window.
    """

    def __init__(
        self, layout: MetricLayout, log_every: int, step: int, rows: np.ndarray | None = None
    ) -> None:
        self._layout, self._every = layout, log_every
        self._tables: list[MetricTable] = []
        self._read = self._full = self._last = step
        if rows is not None and len(rows):
            self._read = self._full = step - len(rows)
            self._tables = [MetricTable(self._read, len(rows), jnp.asarray(rows), False)]

    def add(self, table: MetricTable, step: int) -> Iterator[WindowEnd]:
        """Adds the rows up to a step, and yields the windows that have become due.

        Args:
            table: a new table, or the previous one with more rows.
            step: the step of its last row.
        """
        if self._tables and self._tables[-1].first == table.first:
            self._tables.pop()
        self._tables.append(table)
        self._last, due = step, self._full
        full = step - step % self._every
        if full > self._full:
            self._full = full
            for each in self._tables:
                if each.first + each.num_rows > due:
                    each.rows.copy_to_host_async()
            yield from self._windows(due)

    def due(self) -> Iterator[WindowEnd]:
        """Yields the full windows; waits for them."""
        yield from self._windows(self._full)

    def left(self) -> np.ndarray:
        """Returns the rows that no window has yielded, uint32 `[rows, width]`; see `due`."""
        rows = self._rows(self._read, self._last)
        return np.concatenate([np.zeros((0, self._layout.width), np.uint32), *rows])

    def bad(self, rows: np.ndarray) -> BadStep | None:
        """Returns the first bad step among the rows of `left`, or None."""
        flags = _flags(self._layout.metrics(rows), len(rows))
        return _bad_and_skipped(self._last - len(rows), flags)[0]

    def breach(self, rows: np.ndarray) -> Breach | None:
        """Returns the first batch out of range among the rows of `left`, or None."""
        if not len(rows):
            return None
        merged = metrics_lib.merge_rows(self._layout.metrics(rows))
        return self._breach(merged, self._last - len(rows))

    def rest(self) -> Iterator[WindowEnd]:
        """Yields the remaining windows; the last one may be partial."""
        yield from self._windows(self._last)

    def _windows(self, end: int) -> Iterator[WindowEnd]:
        """Yields the windows up to a step, from rows that are fetched and unpacked together."""
        start, self._read = self._read, end
        if start == end:
            return
        rows = self._rows(start, end)
        self._tables = [each for each in self._tables if each.first + each.num_rows > end]
        metrics = self._layout.metrics(np.concatenate(rows))
        flags = _flags(metrics, end - start)
        is_clean, is_in_range = not flags.any(), _is_in_range(metrics)
        leaves, structure = jax.tree.flatten(metrics)
        step = start
        while step < end:
            first, step = step, min(step - step % self._every + self._every, end)
            part = slice(first - start, step - start)
            if step - first == 1:
                merged = structure.unflatten([leaf[part.start] for leaf in leaves])
            else:
                rows = structure.unflatten([leaf[part] for leaf in leaves])
                merged = metrics_lib.merge_rows(rows)
            bad, skipped = (None, ()) if is_clean else _bad_and_skipped(first, flags[:, part])
            breach = None if is_in_range else self._breach(merged, first)
            yield WindowEnd(step, merged, bad, skipped, breach)

    def _breach(self, metrics: Mapping[str, Metric], first: int) -> Breach | None:
        """Returns the first batch out of range, from the merged metrics of the steps after one."""
        found = first_breach(metrics)
        return None if found is None else found._replace(batch=first + found.batch)

    def _rows(self, start: int, end: int) -> list[np.ndarray]:
        """Returns the rows of steps `start + 1` to `end`, table by table."""
        return [
            table.fetch()[max(start - table.first, 0) : end - table.first]
            for table in self._tables
            if table.first < end and table.first + table.num_rows > start
        ]


def _is_in_range(metrics: Mapping[str, Metric]) -> bool:
    """Whether no row of the metrics breaks a limit."""
    limits = [each for each in metrics.values() if isinstance(each, Limits)]
    return all(np.all(each.compute()) for each in limits)


def _flags(metrics: Mapping[str, Metric], num_rows: int) -> np.ndarray:
    """Returns which rows are bad, are spikes, were skipped: bool `[3, rows]`."""
    flags = np.zeros((3, num_rows), bool)
    if isinstance(metrics.get(FLAGS), Flags):
        flags[:] = np.asarray(metrics[FLAGS].compute()).T[:3] > 0
    if "loss" in metrics and num_rows:
        losses = np.asarray(known_or_zero(metrics["loss"])).reshape(num_rows, -1)
        flags[0] |= ~np.isfinite(losses).all(axis=1) & ~flags[2]
    return flags


def _bad_and_skipped(first: int, flags: np.ndarray) -> tuple[BadStep | None, tuple[int, ...]]:
    """Returns the first bad step after `first`, and the skipped steps."""
    is_bad, is_spike, is_skipped = flags
    found = np.flatnonzero(is_bad | is_spike)[:1]
    bad = None
    if found.size:
        bad = BadStep(first + int(found[0]) + 1, not is_bad[found[0]])
    return bad, tuple(first + int(row) + 1 for row in np.flatnonzero(is_skipped))


def _wide(dtype: Any) -> np.dtype:
    """Returns a dtype of 32 or 64 bits that represents every value of `dtype`."""
    if jnp.dtype(dtype).itemsize >= 4:
        return np.dtype(dtype)
    return np.dtype(np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.int32)


def blank(rows: int, width: int) -> np.ndarray:
    """Returns the rows of an empty table: uint32 `[rows, width]`."""
    return np.zeros((rows, width), np.uint32)
