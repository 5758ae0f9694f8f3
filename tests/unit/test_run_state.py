"""The tally of an epoch, through JSON and back, and windows that a pause cuts."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distaff.execution.dispatch.packed_metrics import (
    MetricLayout,
    MetricTable,
    MetricWindows,
    WindowEnd,
)
from distaff.metrics import Mean, merge
from distaff.run.run_state import EpochProgress

METRICS = {"loss": Mean(jnp.float32(0), jnp.float32(0))}
COLUMNS = MetricLayout(METRICS)
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def rows_of(values: list[float]) -> np.ndarray:
    return np.array([[value, 1.0] for value in values], np.float32).reshape(-1, 2).view(np.uint32)


@given(st.lists(FLOATS, max_size=5), st.none() | st.floats(), st.integers(0, 9))
def test_tally_keeps_its_bits_through_json(values: list[float], total: Any, steps: int) -> None:
    tally = EpochProgress(3, steps, False, rows=rows_of(values))
    if total is not None:
        tally = tally.with_window(
            WindowEnd(5, {"loss": Mean(np.float64(total), np.float64(2))}, None)
        )
    again = EpochProgress.from_json(
        json.loads(json.dumps(tally.to_json(), allow_nan=False)), COLUMNS
    )
    assert (again.epoch, again.steps, again.is_trained) == (3, steps, False)
    np.testing.assert_array_equal(again.rows, tally.rows)
    assert (again.total is None) == (tally.total is None)
    for old, new in zip(*(jax.tree.leaves(each.total) for each in (tally, again)), strict=True):
        assert old.tobytes() == new.tobytes()
        assert old.dtype == new.dtype


@pytest.mark.parametrize(
    "change",
    [
        {"rows": {"dtype": "|O", "shape": [0], "bits": ""}},
        {"rows": {"dtype": "<u4", "shape": [1, 3], "bits": "AAAAAAAAAAAAAAAA"}},
        {"rows": {"dtype": "<u4", "shape": [1 << 60], "bits": "AAAA"}},
        {"total": []},
        {"total": 3},
        {"epoch": "x"},
    ],
)
def test_tally_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        EpochProgress.from_json({**EpochProgress(1).to_json(), **change}, COLUMNS)


def windows(values: list[float], start: int, every: int, pauses: set[int]) -> list[Any]:
    """Reads steps one by one, and begins anew from its rows at each pause."""
    readout, found = MetricWindows(COLUMNS, every, start), []
    for step, value in enumerate(values, start + 1):
        table = jnp.asarray(rows_of([value]))
        found += readout.add(MetricTable(step - 1, 1, table, False), step)
        if step in pauses:
            found += readout.due()
            readout = MetricWindows(COLUMNS, every, step, readout.left())
    return [*found, *readout.rest()]


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(1, 5),
    st.sets(st.integers(0, 17)),
)
def test_windows_are_the_same_whatever_pauses_lie_in_them(
    values: list[float], start: int, every: int, pauses: set[int]
) -> None:
    whole, cut = (windows(values, start, every, each) for each in (set(), pauses))
    assert [window.step for window in cut] == [window.step for window in whole]
    for old, new in zip(whole, cut, strict=True):
        jax.tree.map(np.testing.assert_array_equal, old.metrics, new.metrics)
    total = whole[0].metrics
    for window in whole[1:]:
        total = merge(total, window.metrics)
    assert total["loss"].weight == len(values)
