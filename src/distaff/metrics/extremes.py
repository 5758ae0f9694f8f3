"""Extremes: the smallest and the largest value."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from distaff.metrics.accumulators import (
    Metric,
    PerExample,
    aligned,
    floating,
    is_whole,
    masked,
    namespace,
    pytree,
)


def extremes_of(dtype: Any) -> tuple[Any, Any]:
    """Returns the lowest and the highest value that a dtype has."""
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

    @classmethod
    def per_example(cls, values: Any) -> PerExample:
        """Declares values per example, `[batch, ...]`, whose extreme is wanted.

        Integers stay integers, so that those beyond 2**24 are exact.
        """
        values = jnp.asarray(values)
        if is_whole(values) and values.dtype.itemsize < 4:
            values = values.astype(jnp.int32)
        return PerExample((values if is_whole(values) else floating(values),), cls)

    @classmethod
    @abstractmethod
    def _neutral(cls, dtype: Any) -> Any: ...

    def compute(self) -> Any:
        numpy = namespace(self.value)
        return numpy.where(aligned(self.count, self.value) == 0, float("nan"), self.value)

    def empty_like(self) -> Self:
        value = jnp.asarray(self.value)
        neutral = jnp.full_like(value, self._neutral(value.dtype))
        return type(self)(neutral, jnp.zeros_like(self.count))


@pytree
class Min(_Extreme):
    """The smallest value.

    Args:
        value: of them.
        count: how many there are; without any the value is NaN.
    """

    @classmethod
    def _neutral(cls, dtype: Any) -> Any:
        return extremes_of(dtype)[1]

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        kept = masked(mask, values[0], cls._neutral(values[0].dtype))
        return cls(jnp.min(kept, axis=0), jnp.sum(mask))

    def merge(self, other: Self) -> Self:
        value = namespace(self.value).minimum(self.value, other.value)
        return type(self)(value, self.count + other.count)

    def over_rows(self) -> Self:
        return type(self)(self.value.min(0), self.count.sum(0))


@pytree
class Max(_Extreme):
    """The largest value.

    Args:
        value: of them.
        count: how many there are; without any the value is NaN.
    """

    @classmethod
    def _neutral(cls, dtype: Any) -> Any:
        return extremes_of(dtype)[0]

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        kept = masked(mask, values[0], cls._neutral(values[0].dtype))
        return cls(jnp.max(kept, axis=0), jnp.sum(mask))

    def merge(self, other: Self) -> Self:
        value = namespace(self.value).maximum(self.value, other.value)
        return type(self)(value, self.count + other.count)

    def over_rows(self) -> Self:
        return type(self)(self.value.max(0), self.count.sum(0))
