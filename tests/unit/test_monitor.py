"""Monitor: which of two validations is better, and what cannot be compared."""

from __future__ import annotations

import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import Monitor
from distaff.errors import ConfigError, MetricError

values = st.floats(allow_nan=True, allow_infinity=True)


@settings(deadline=None)
@given(values, values, st.sampled_from(["min", "max"]))
def test_better_is_never_true_both_ways_and_mirrors_its_mode(new, old, mode):
    monitor, mirrored = Monitor("x", mode), Monitor("x", "max" if mode == "min" else "min")
    assert not (monitor.better(new, old) and monitor.better(old, new))
    assert monitor.better(new, old) is mirrored.better(-new, -old)


@pytest.mark.parametrize(
    ("new", "old", "min_delta", "better"),
    [
        (0.5, None, 0.0, True),
        (math.nan, None, 0.0, True),
        (0.4, 0.5, 0.0, True),
        (0.5, 0.5, 0.0, False),
        (0.6, 0.5, 0.0, False),
        (math.nan, 0.5, 0.0, False),
        (0.5, math.nan, 0.0, True),
        (math.inf, math.nan, 0.0, True),
        (math.nan, math.nan, 0.0, False),
        (0.5, math.inf, 0.0, True),
        (math.inf, math.inf, 0.0, False),
        (0.25, 0.5, 0.25, False),
        (0.125, 0.5, 0.25, True),
        (0.5, math.nan, 9.0, True),
    ],
)
def test_better_by_hand(new, old, min_delta, better):
    assert Monitor("val/loss").better(new, old, min_delta) is better


@pytest.mark.parametrize("value", [0.25, np.float64(0.25), np.array(0.25), jnp.float32(0.25)])
def test_value_is_a_python_float(value):
    found = Monitor("val/loss").value({"val/loss": value, "val/matrix": np.eye(2)})
    assert (type(found), found) == (float, 0.25)


def test_value_refuses_an_unknown_metric_and_lists_the_known_ones():
    monitor = Monitor("val/acuracy", mode="max")
    known = "Did you mean 'val/accuracy'? Known: 'val/accuracy', 'val/loss'."
    with pytest.raises(MetricError, match=re.escape(known)):
        monitor.value({"val/loss": 0.3, "val/accuracy": 0.9})
    with pytest.raises(MetricError, match=re.escape("Known: none.")):
        monitor.check([])


def test_value_refuses_a_metric_that_is_not_one_number():
    with pytest.raises(MetricError, match=re.escape("'val/matrix' has shape (2, 2)")):
        Monitor("val/matrix").value({"val/matrix": np.eye(2)})


def test_monitor_refuses_an_unknown_mode():
    mode: Any = "lowest"
    with pytest.raises(
        ConfigError, match=re.escape("'val/loss'): mode must be 'min' or 'max'; got 'l")
    ):
        Monitor("val/loss", mode)
