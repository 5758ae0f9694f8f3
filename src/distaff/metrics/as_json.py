"""Conversion of computed metrics to strict JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from distaff.errors import MetricError


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts computed metrics to strict JSON.

    Arrays become lists. NaN and infinity, which JSON lacks, become the strings `"nan"`, `"inf"` and
    `"-inf"`, which Python's `float` reads.

    Raises:
        MetricError: a metric is not a number.
    """
    return {name: _finite_or_text(_numbers(name, value)) for name, value in values.items()}


def as_numbers(value: Any) -> Any:
    """Converts a value back that `as_json` has converted.

    Lists become float64 arrays, and the strings `"nan"`, `"inf"` and `"-inf"` numbers.
    """
    if isinstance(value, Mapping):
        return {name: as_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return np.asarray(value, np.float64)
    return float(value) if isinstance(value, str) else value


def _numbers(name: str, value: Any) -> Any:
    if isinstance(value, float):
        return float(value)
    try:
        return np.asarray(value, dtype=np.float64).tolist()
    except (TypeError, ValueError) as error:
        raise MetricError(
            f"The logged metric {name!r} is not a number: {value!r}. Log what `compute` returns."
        ) from error


def _finite_or_text(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_finite_or_text(number) for number in numbers]
    return numbers if math.isfinite(numbers) else str(numbers)
