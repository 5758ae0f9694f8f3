"""Cadence: due exactly when a multiple is crossed, however the steps are grouped."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distaff.cadence import Every, Progress
from distaff.errors import ConfigError

counts = st.integers(0, 10_000)
intervals = st.integers(1, 500)
seconds = st.floats(0, 1e6, allow_nan=False)


@settings(deadline=None)
@given(intervals, counts, counts, st.sampled_from(["steps", "epochs"]))
def test_every_is_due_when_a_multiple_lies_between(n, start, length, unit):
    field = {"steps": "step", "epochs": "epoch"}[unit]
    previous, now = (Progress(**{field: count}) for count in (start, start + length))
    multiples = [count for count in range(start + 1, start + length + 1) if count % n == 0]
    assert Every(n, unit).due(previous, now) is bool(multiples)


@settings(deadline=None)
@given(st.floats(0.01, 1e3), seconds, seconds)
@example(0.1, 0.2, 0.3)
def test_every_in_seconds_is_exact_in_floating_point(n, start, end):
    crossed = Fraction(end) // Fraction(n) > Fraction(start) // Fraction(n)
    assert Every(n, "seconds").due(Progress(seconds=start), Progress(seconds=end)) is crossed


@settings(deadline=None)
@given(intervals, counts, st.lists(st.integers(1, 50), max_size=20))
def test_every_fires_once_per_multiple_when_chunks_are_no_longer_than_n(n, start, chunks):
    every, fired, step = Every(n, "steps"), 0, start
    for chunk in chunks:
        following = step + min(chunk, n)
        fired += every.due(Progress(step=step), Progress(step=following))
        step = following
    assert fired == step // n - start // n


@settings(deadline=None)
@given(intervals, counts)
def test_next_step_is_the_first_due_step_after(n, step):
    every = Every(n, "steps")
    following = every.next_step(step)
    assert every.due(Progress(step), Progress(following))
    assert not every.due(Progress(step), Progress(following - 1))


def test_every_looks_at_its_own_unit_alone():
    before, after = Progress(0, 0, 0.0), Progress(step=9, epoch=1, seconds=0.5)
    due = [every.due(before, after) for every in (Every(10, "steps"), Every(1, "epochs"))]
    assert due == [False, True]
    assert Every(0.5, "seconds").due(before, after)


def test_every_is_not_due_when_a_clock_starts_again():
    assert not Every(10, "seconds").due(Progress(seconds=95.0), Progress(seconds=3.0))


@pytest.mark.parametrize(
    ("n", "unit", "message"),
    [
        (0, "steps", "n=0"),
        (-3, "epochs", "n=-3"),
        (True, "steps", "n=True"),
        (2.0, "steps", "n=2.0"),
        (float("nan"), "seconds", "n=nan"),
        (float("inf"), "seconds", "n=inf"),
        ("10", "steps", "n='10'"),
        (1, "step", "Did you mean 'steps'?"),
    ],
)
def test_every_refuses_what_is_no_cadence(n, unit, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Every(n, unit)


@pytest.mark.parametrize("unit", ["epochs", "seconds"])
def test_next_step_refuses_units_without_one(unit):
    with pytest.raises(ConfigError, match=f"unit='{unit}'"):
        Every(1, unit).next_step(0)
