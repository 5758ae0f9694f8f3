"""Parses durations such as `"3h30m"`, `"90s"`, `"1d"` and `"00:30:00"`."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import TypeAlias

from distaff.errors import ConfigError

Duration: TypeAlias = int | float | timedelta | str
"""Seconds, a `datetime.timedelta`, or a string; see `seconds_of`."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_UNITS = re.compile(
    rf"(?:{_NUMBER}\s*d)?\s*(?:{_NUMBER}\s*h)?\s*(?:{_NUMBER}\s*m)?\s*(?:{_NUMBER}\s*s)?", re.ASCII
)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", re.ASCII)
_SECONDS = (86_400.0, 3_600.0, 60.0, 1.0)


def seconds_of(duration: Duration, name: str = "A duration") -> float:
    """Returns a duration in seconds.

    >>> seconds_of("3h30m"), seconds_of("1-00:30:00"), seconds_of(90)
    (12600.0, 88200.0, 90.0)

    Args:
        duration: seconds; a `datetime.timedelta`; or a string: days, hours, minutes and seconds in
            this order (`"1d 12h"`, `"1.5h"`), Slurm's notation (`"HH:MM:SS"`, `"D-HH:MM:SS"`), or
            seconds without a unit.
        name: name of the option, for the error.

    Raises:
        ConfigError: the duration cannot be parsed, is not finite, or not positive.
    """
    seconds = _parsed(duration)
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"{name} must be a positive duration: seconds, a datetime.timedelta, or a string such "
            f"as '3h30m', '90s', '1d' or '00:30:00'; got {duration!r}."
        )
    return seconds


def _parsed(duration: Duration) -> float:
    """Returns seconds; NaN if the value is not a duration."""
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if isinstance(duration, bool):
        return math.nan
    if isinstance(duration, str):
        text = duration.strip().lower()
        if re.fullmatch(_NUMBER, text, re.ASCII):
            return float(text)
        match = _UNITS.fullmatch(text) or _CLOCK.fullmatch(text)
        parts = match.groups() if match else ()
        if not any(parts):
            return math.nan
        pairs = zip(parts, _SECONDS, strict=True)
        return math.fsum(float(part) * seconds for part, seconds in pairs if part)
    try:
        return float(duration)
    except (TypeError, ValueError, OverflowError):
        return math.nan
