"""Formats sizes and durations as text."""

from __future__ import annotations


def byte_text(count: float) -> str:
    """Returns a number of bytes in the largest unit that fits.

    >>> byte_text(3 * 2**29)
    '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def clock_time(seconds: float) -> str:
    """Returns a duration as `1:23` or `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
