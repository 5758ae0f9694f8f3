"""Durations: what people write, and what is refused."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.core.config.durations import seconds_of
from distaff.errors import ConfigError

counts = st.integers(0, 999)


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("3h30m", 12_600.0),
        ("90s", 90.0),
        ("1d", 86_400.0),
        (" 1d 12H ", 129_600.0),
        ("1.5h", 5_400.0),
        ("00:30:00", 1_800.0),
        ("100:00:01", 360_001.0),
        ("1-00:30:00", 88_200.0),
        ("90", 90.0),
        (0.5, 0.5),
        (7, 7.0),
        (timedelta(minutes=2), 120.0),
    ],
)
def test_seconds_of_reads(duration, seconds):
    assert seconds_of(duration) == seconds


@settings(deadline=None)
@given(counts, counts, counts, counts)
def test_seconds_of_text_is_that_of_timedelta(days, hours, minutes, seconds):
    expected = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    pairs = zip((days, hours, minutes, seconds), "dhms", strict=True)
    text = "".join(f"{count}{unit}" for count, unit in pairs if count)
    if expected:
        assert seconds_of(text) == seconds_of(expected) == expected.total_seconds()


@settings(deadline=None)
@given(st.integers(1, 10**7))
def test_seconds_of_clock_is_that_of_its_seconds(total):
    minutes, seconds = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    assert seconds_of(f"{hours}:{minutes:02}:{seconds:02}") == total
    assert seconds_of(f"{hours // 24}-{hours % 24:02}:{minutes:02}:{seconds:02}") == total


@settings(deadline=None)
@given(st.text("0123456789dhms:-. ", max_size=12))
def test_seconds_of_any_text_is_positive_or_refused(text):
    with suppress(ConfigError):
        assert seconds_of(text) > 0


@pytest.mark.parametrize(
    "duration",
    [
        *("", "h", "3x", "30m3h", "1h1h", "-1h", "10:30", "00:61:00", "1h30", "inf", "nan", "0s"),
        *(0, -1.0, float("inf"), float("nan"), True, None, [1], timedelta(0), 10**400),
    ],
)
def test_seconds_of_refuses_by_name_and_value(duration):
    with pytest.raises(ConfigError, match=r"max_time must be a positive duration: ") as error:
        seconds_of(duration, "max_time")
    assert repr(duration) in str(error.value)
