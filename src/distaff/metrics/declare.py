"""Conversion of what a step returns to metrics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from distaff.errors import LossError
from distaff.metrics.accumulators import (
    Mean,
    Metric,
    PerExample,
)
from distaff.metrics.arguments import as_numbers, floating
from distaff.metrics.foreign import foreign, is_foreign


def declare(name: str, value: Any, num_examples: int) -> Metric | PerExample:
    """Converts a value that a step returned into a metric.

    Args:
        name: its name, for errors.
        value: an array `[batch, ...]`, a scalar, a metric, also of another library, or
            `PerExample`.
        num_examples: the batch size.

    Raises:
        LossError: a value is not an array of numbers, an array is neither a scalar nor has one
            value per example, or a metric of another library is not a pytree.
    """
    if isinstance(value, Metric):
        return value
    if is_foreign(value):
        return foreign(name, value)
    if isinstance(value, PerExample):
        _check_leading(name, value.values[0], num_examples)
        return value
    array = floating(as_numbers(value, f"The metric {name!r}"))
    if array.ndim == 0:
        weight = jnp.asarray(num_examples, array.dtype)
        return Mean(array * weight, weight)
    _check_leading(name, array, num_examples)
    return Mean.per_example(array)


def _check_leading(name: str, array: jax.Array, num_examples: int) -> None:
    if array.shape[:1] != (num_examples,):
        raise LossError(
            f"The metric {name!r} has shape {array.shape}; expected a scalar or one entry per "
            f"example, [{num_examples}, ...]. Reduce it, or wrap it: metrics.Sum({name})."
        )
