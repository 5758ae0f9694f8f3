"""Checks of numeric options."""

from __future__ import annotations

import math
import operator
import sys
from numbers import Real
from typing import Any

from distaff.errors import ConfigError


def whole(name: str, value: Any, least: int = 1) -> int:
    """Returns an integer option as a Python int, which JSON can store; accepts NumPy integers.

    Raises:
        ConfigError: the value is not an integer, or is less than `least`.
    """
    try:
        number = None if isinstance(value, bool) else int(operator.index(value))
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name} must be an integer, at least {least}; got {value!r}.")
    return number


def as_float(value: Any) -> float:
    """Returns a real number as a float, or NaN for any other value, such as a bool or a string.

    An integer too large for double precision becomes infinite.

    >>> as_float(2), as_float(True), as_float(10**400)
    (2.0, nan, inf)
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def is_traced(value: object) -> bool:
    """Returns whether a value is a number inside a program: its size is not known."""
    jax = sys.modules.get("jax")  # help texts of the command line start without JAX
    return jax is not None and isinstance(value, jax.core.Tracer) and value.ndim == 0


def is_zero(value: Any) -> bool:
    """Returns whether a number is known to be 0; a traced one is not."""
    return not is_traced(value) and value == 0
