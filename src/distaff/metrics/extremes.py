"""Smallest and largest values."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from distaff.metrics.accumulators import (
    Metric,
    PerExample,
    aligned,
    masked,
    namespace,
    pytree,
)
from distaff.metrics.arguments import as_numbers, floating, is_whole


def extremes_of(dtype: Any) -> tuple[Any, Any]:
    """Returns the lowest and the highest value of a dtype."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return False, True
    if jnp.issubdtype(dtype, jnp.floating):
        return -np.inf, np.inf
    return jnp.iinfo(dtype).min, jnp.iinfo(dtype).max


@dataclasses.dataclass(frozen=True)
class _Extreme(Metric):
    value: Any
    count: Any = 1

    _over_axis: ClassVar[str]
    _of_two: ClassVar[str]

    @classmethod
    def per_example(cls, values: Any) -> PerExample:
        """Returns the extreme of values per example, `[batch, ...]`.

        Integers stay integers, so that values beyond 2**24 are exact.
        """
        values = as_numbers(values)
        if is_whole(values) and values.dtype.itemsize < 4:
            values = values.astype(jnp.int32)
        return PerExample((values if is_whole(values) else floating(values),), cls)

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        neutral = cls._neutral(values[0].dtype)
        kept = masked(mask, values[0], neutral)
        return cls(getattr(jnp, cls._over_axis)(kept, axis=0, initial=neutral), jnp.sum(mask))

    def merge(self, other: Self) -> Self:
        value = getattr(namespace(self.value), self._of_two)(self.value, other.value)
        return type(self)(value, self.count + other.count)

    def over_rows(self) -> Self:
        return type(self)(getattr(self.value, self._over_axis)(0), self.count.sum(0))

    def compute(self) -> Any:
        numpy = namespace(self.value)
        return numpy.where(aligned(self.count, self.value) == 0, float("nan"), self.value)

    def empty_like(self) -> Self:
        value = jnp.asarray(self.value)
        neutral = jnp.full_like(value, self._neutral(value.dtype))
        return type(self)(neutral, jnp.zeros_like(self.count))

    @classmethod
    def _neutral(cls, dtype: Any) -> Any:
        lowest, highest = extremes_of(dtype)
        return highest if cls._over_axis == "min" else lowest


@pytree
class Min(_Extreme):
    """The smallest value.

    Args:
        value: the minimum.
        count: the number of examples; the value is NaN if it is 0.
    """

    _over_axis, _of_two = "min", "minimum"


@pytree
class Max(_Extreme):
    """The largest value.

    Args:
        value: the maximum.
        count: the number of examples; the value is NaN if it is 0.
    """

    _over_axis, _of_two = "max", "maximum"
