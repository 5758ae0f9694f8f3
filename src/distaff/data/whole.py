"""Options that are whole numbers."""

from __future__ import annotations

import operator
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

    >>> import numpy as np
    >>> whole("batch_size", np.int64(4))
    4
    """
    try:
        number = int(operator.index(value))
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(
            f"{name} must be a whole number, at least {least}; got {name}={value!r}. Give such a "
            "number."
        )
    return number
