"""Parses amounts of memory such as `"12 GiB"`."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from distaff.core.config.checks import as_float
from distaff.errors import ConfigError

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "GB": 10**9, "MB": 10**6}


def bytes_of(amount: Any, name: str = "An amount of memory") -> int:
    """Returns an amount of memory in bytes.

    >>> bytes_of("1.5 GiB"), bytes_of("24gb"), bytes_of(2048)
    (1610612736, 24000000000, 2048)

    Args:
        amount: a number of bytes, or a string with one of the units KiB, MiB, GiB, TiB, MB and GB.
        name: name of the option, for the error.

    Raises:
        ConfigError: the amount cannot be parsed, or is less than one byte.
    """
    with suppress(ValueError, OverflowError):
        count = int(_parsed(amount) if isinstance(amount, str) else as_float(amount))
        if count >= 1:
            return count
    raise ConfigError(f"{name} must be a size such as '24GiB', or bytes; got {amount!r}.")


def _parsed(text: str) -> float:
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    number, unit = ("nan", "") if found is None else found.groups()
    factors = [factor for name, factor in _UNITS.items() if name.lower() == unit.lower()]
    return float(number) * factors[0] if factors else float("nan")
