"""Number: what is given for an option that is one."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


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
