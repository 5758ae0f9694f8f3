"""Number: what is given for an option that is one, whole or real."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from distaff.errors import ConfigError


def whole(name: str, value: Any, least: int = 1) -> int:
    """Returns a whole number as an int of Python, which JSON and so a checkpoint can hold.

    Args:
        name: of the option.
        value: an int, or what stands for one, such as NumPy's integers.
        least: the smallest that is allowed.

    Raises:
        ConfigError: it is no whole number, or less than `least`.
    """
    try:
        number = None if isinstance(value, bool) else int(operator.index(value))
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name} is a whole number, at least {least}; got {value!r}.")
    return number


def as_float(value: Any) -> float:
    """Returns a real number as a float; NaN for what is none, such as a bool or a text.

    A whole number beyond double precision is infinite.

    >>> as_float(2), as_float(True), as_float(10**400)
    (2.0, nan, inf)
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
