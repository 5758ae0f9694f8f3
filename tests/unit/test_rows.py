"""Rows of metrics: nothing lost in their bits, and windows that do not depend on how they came."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.execution.dispatch.packed_metrics import (
    BadStep,
    MetricLayout,
    MetricTable,
    MetricWindows,
    WindowEnd,
    blank,
)
from distaff.metrics import Last, Max, Mean, Sum, merge, to_host

ONE = {
    "loss": Mean(jnp.float32(0.1), jnp.float32(3)),
    "half": Sum(jnp.bfloat16(1.5)),
    "count": Sum(jnp.int32(2**24 + 1)),
    "many": Sum(jnp.arange(6, dtype=jnp.float16).reshape(2, 3)),
    "flag": Max(jnp.bool_(True)),
    "rate": Last(jnp.float32(1e-40), jnp.uint8(1)),
}


def test_row_keeps_every_bit_of_every_dtype():
    columns = MetricLayout(jax.eval_shape(lambda: ONE))
    rows = np.asarray(jax.jit(columns.row)(ONE))[None]
    assert (rows.shape, rows.dtype) == ((1, columns.width), np.uint32)
    back = columns.metrics(np.concatenate([rows, rows]))
    for got, sent in zip(jax.tree.leaves(back), jax.tree.leaves(to_host(ONE)), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, np.stack([sent, sent]))


def test_row_keeps_64_bits():
    with jax.enable_x64():
        one = {"n": Sum(jnp.int64(2**40 + 1)), "x": Sum(jnp.float64(0.1))}
        columns = MetricLayout(one)
        rows = np.asarray(columns.row(one))[None]
    back = columns.metrics(rows)
    assert (back["n"].total[0], back["x"].total[0]) == (2**40 + 1, 0.1)


def test_metrics_without_numbers_make_empty_rows():
    columns = MetricLayout({})
    assert columns.row({}).shape == (0,)
    assert columns.metrics(np.zeros((4, 0), np.uint32)) == {}
    assert columns.table_rows(50) == 50


@pytest.mark.parametrize(
    ("width", "log_every", "rows"), [(4, 10, 10), (4, 500, 64), (2**20, 50, 1)]
)
def test_strips_are_short_where_rows_are_wide_or_lines_frequent(width, log_every, rows):
    columns = MetricLayout({"many": Sum(jnp.zeros(width))})
    assert columns.table_rows(log_every) == rows


LOSS = MetricLayout({"loss": Mean(jnp.float32(0), jnp.float32(0))})


def row_of(step: int, bad: int | None) -> np.ndarray:
    total = np.nan if step == bad else step
    return np.asarray(LOSS.row({"loss": Mean(jnp.float32(total), jnp.float32(step % 5 + 1))}))


def tables_of(pieces: list[tuple[str, int]], start: int, every: int, bad: int | None) -> Any:
    """Yields tables as `Dispatcher` makes them, each with its last step, from pieces of a run."""
    step = start
    for kind, length in pieces:
        rows = [row_of(each, bad) for each in range(step + 1, step + 1 + length)]
        if kind == "fused":
            table = np.zeros((length + 3, LOSS.width), np.uint32)
            table[:length] = rows
            yield MetricTable(step, length, jnp.asarray(table), at_end=False), step + length
            step += length
            continue
        table = None
        for row in rows:
            if table is None or table.num_rows == len(table.rows) or step % every == 0:
                table = MetricTable(step, 0, blank(LOSS.table_rows(every), LOSS.width), at_end=True)
            filled = jnp.concatenate([table.rows[1:], row[None]])
            table, step = (
                MetricTable(table.first, table.num_rows + 1, filled, at_end=True),
                step + 1,
            )
            yield table, step


@settings(deadline=None, max_examples=60)
@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(["single", "fused"]), st.integers(1, 9)), min_size=1, max_size=6
    ),
    start=st.integers(0, 7),
    every=st.integers(1, 12),
    bad=st.none() | st.integers(1, 40),
)
def test_windows_are_those_of_the_steps_however_they_came(pieces, start, every, bad):
    readout, windows, seen = MetricWindows(LOSS, every, start), [], []
    for table, step in tables_of(pieces, start, every, bad):
        due = list(readout.add(table, step))
        # One late: what has just ended is not read yet.
        assert all(each.step <= step - step % every - (step % every == 0) for each in due)
        windows += due
        seen.append(step)
    windows += readout.rest()
    last = start + sum(length for _, length in pieces)
    ends = [step for step in range(start + 1, last) if step % every == 0] + [last]
    assert [each.step for each in windows] == ends
    for begin, window in zip([start, *ends], windows, strict=False):
        steps = range(begin + 1, window.step + 1)
        assert window.bad == (BadStep(bad, is_spike=False) if bad in steps else None)
        expected: Any = None
        for step in steps:
            one = LOSS.metrics(row_of(step, bad)[None])
            one = jax.tree.map(lambda leaf: leaf[0], one)
            expected = one if expected is None else merge(expected, one)
        np.testing.assert_allclose(window.metrics["loss"].total, expected["loss"].total, rtol=1e-15)
        assert window.metrics["loss"].weight == expected["loss"].weight


def test_steps_without_a_loss_are_never_bad():
    columns = MetricLayout({"n": Sum(jnp.float32(0))})
    readout = MetricWindows(columns, 2, 0)
    table = jnp.stack([columns.row({"n": Sum(jnp.float32(np.nan))})] * 3)
    assert list(readout.add(MetricTable(0, 3, table, at_end=False), 3)) == []
    windows: list[WindowEnd] = list(readout.rest())
    assert [(each.step, each.bad) for each in windows] == [(2, None), (3, None)]
