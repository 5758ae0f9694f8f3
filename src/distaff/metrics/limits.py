"""Limits: whether the indices and the weights of every batch are in their range.

What is out of range trains silently: JAX takes the index -1 for the last entry, and gives NaN for
one that is too large. So a step notes the range of each, in a row like its metrics, and the host
reads it with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from distaff.errors import LossError
from distaff.metrics.accumulators import (
    Metric,
    PerExample,
    floating,
    is_whole,
    masked,
    namespace,
    pytree,
)
from distaff.metrics.extremes import extremes_of
from distaff.state import static


class Breach(NamedTuple):
    """A batch with a value that is out of range.

    Attributes:
        batch: which one it is, counted from 0.
        rule: what the values must be, as a clause.
        found: what they are, as a clause.
        advice: a sentence with the remedy.
    """

    batch: int
    rule: str
    found: str
    advice: str

    def text(self, place: str) -> str:
        """Returns what is wrong where: `"batch 6 of the val loader"`."""
        return f"{self.rule}; in {place} {self.found}. {self.advice}"


@pytree
class Limits(Metric):
    """The lowest and the highest value of the batches; of the first batch that breaks a limit.

    Args:
        low: the lowest value that counts.
        high: the highest one.
        first: the first batch that breaks a limit, counted from 0; -1 while none does.
        batches: how many there are.
        what: what the values are, such as `"label"`.
        size: how many entries the indices may name; None for weights.
        advice: a sentence with the remedy, for the error.
    """

    is_result: ClassVar[bool] = False

    low: Any
    high: Any
    first: Any
    batches: Any
    what: str = static()
    size: int | None = static()
    advice: str = static()

    @classmethod
    def per_example(
        cls, what: str, values: Any, *, size: int | None, where: Any, advice: str
    ) -> PerExample:
        """Declares indices, or weights, whose range is to be noted.

        Args:
            what: what they are, such as `"label"`.
            values: int `[batch, ...]`; of weights also bool or float.
            size: the indices are from 0 to `size - 1`; None for weights, which are at least 0.
            where: bool `[batch, ...]`, which of them count; None for all.
            advice: a sentence with the remedy, for the error.

        Raises:
            LossError: indices are no integers, or `where` has another shape.
        """
        values = jnp.asarray(values)
        if is_whole(values):
            values = values.astype(jnp.int32) if values.dtype.itemsize < 4 else values
        elif size is None:
            values = floating(values)
        else:
            raise LossError(f"Indices are integers; {what!r} has dtype {values.dtype}. Cast it.")
        where = jnp.ones(values.shape, bool) if where is None else jnp.asarray(where)
        if where.shape != values.shape:
            raise LossError(
                f"Of each index it must be known whether it counts; {what!r} has shape "
                f"{values.shape}, where has shape {where.shape}. Broadcast it to the former."
            )
        settings = ("what", what), ("size", size), ("advice", advice)
        return PerExample((values, where), cls, settings)

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array, **settings: Any) -> Self:
        array, where = values
        kept = masked(mask, where, False)
        least, most = extremes_of(array.dtype)
        low = jnp.min(array, initial=most, where=kept)
        high = jnp.max(array, initial=least, where=kept)
        is_good = low >= 0  # which NaN is not
        if settings["size"] is not None:
            is_good &= high < settings["size"]
        elif not is_whole(array):
            is_good &= high < jnp.inf
        first = jnp.where(is_good, -1, 0)
        return cls(low, high, first.astype(jnp.int32), jnp.int32(1), **settings)

    def merge(self, other: Self) -> Self:
        numpy = namespace(self.first)
        mine, is_bad = self.first >= 0, (self.first >= 0) | (other.first >= 0)

        def chosen(here: Any, there: Any, either: Any) -> Any:
            return numpy.where(mine, here, numpy.where(is_bad, there, either))

        low = chosen(self.low, other.low, numpy.minimum(self.low, other.low))
        high = chosen(self.high, other.high, numpy.maximum(self.high, other.high))
        first = chosen(self.first, self.batches + other.first, self.first)
        return self._with(low, high, first, self.batches + other.batches)

    def over_rows(self) -> Self:
        numpy = namespace(self.first)
        is_bad = self.first >= 0
        row, any_bad = numpy.argmax(is_bad, axis=0), is_bad.any(axis=0)

        def at_row(leaf: Any) -> Any:
            return numpy.take_along_axis(leaf, row[None], axis=0)[0]

        before = numpy.cumsum(self.batches, axis=0) - self.batches
        first = numpy.where(any_bad, at_row(before + self.first), -1)
        low = numpy.where(any_bad, at_row(self.low), self.low.min(0))
        high = numpy.where(any_bad, at_row(self.high), self.high.max(0))
        return self._with(low, high, first, self.batches.sum(0))

    def _with(self, *leaves: Any) -> Self:
        return type(self)(*leaves, self.what, self.size, self.advice)

    def empty_like(self) -> Self:
        least, most = extremes_of(jnp.asarray(self.low).dtype)
        zeros = jnp.zeros_like(self.first)
        low, high = jnp.full_like(self.low, most), jnp.full_like(self.high, least)
        return self._with(low, high, zeros - 1, zeros)

    def compute(self) -> Any:
        """Returns the first batch that breaks a limit; -1 where none does."""
        return self.first

    def breach(self) -> Breach | None:
        """Returns the first batch that breaks a limit; None where none does. On the host."""
        firsts = np.ravel(self.first)
        place = np.flatnonzero(firsts >= 0)
        if not place.size:
            return None
        place = min(place, key=lambda index: firsts[index])
        low, high = (_plain(np.ravel(leaf)[place]) for leaf in (self.low, self.high))
        bad = high if low >= 0 else low
        rule = f"A {self.what} is an index from 0 to {(self.size or 0) - 1}"
        if self.size is None:
            rule = f"A {self.what} is a finite number, at least 0"
        reach = "" if low == high or low != low else f", and they reach from {low} to {high}"
        return Breach(int(firsts[place]), rule, f"one is {bad}{reach}", self.advice)


def _plain(value: Any) -> Any:
    value = float(value)
    return int(value) if value.is_integer() else value


def first_breach(metrics: Mapping[str, Any]) -> Breach | None:
    """Returns the first breach of any limit among merged metrics on the host; None without."""
    limits = [metric for metric in metrics.values() if isinstance(metric, Limits)]
    found = [each for each in (metric.breach() for metric in limits) if each is not None]
    return min(found, key=lambda each: each.batch, default=None)
