"""Limits: range checks of the indices and weights of every batch.

JAX reads the index -1 as the last entry and returns NaN for one that is too large, so bad values
train silently. A step returns the range of its values like a metric, and the host checks it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.pytrees import static
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


class Breach(NamedTuple):
    """A batch with a value that is out of range.

    Attributes:
        batch: its index, counted from 0.
        rule: the rule, as a clause.
        found: the values found, as a clause.
        advice: a sentence with the remedy.
    """

    batch: int
    rule: str
    found: str
    advice: str

    def text(self, place: str) -> str:
        """Returns the message; `place` is such as `"batch 6 of the val loader"`."""
        return f"{self.rule}; in {place} {self.found}. {self.advice}"


@pytree
class Limits(Metric):
    """The lowest and highest value of the batches, or of the first batch that breaks a limit.

    Args:
        ends: four numbers, `[..., 4]`, with the dtype of the values: the lowest value, reversed
            (`~x` for integers, `-x` for floats) so that one reduction computes both ends; the
            highest value; the number of batches; and the index of the batch of the values.
        rule: as in `per_example`, like `least`, `most` and `advice`.
        are_whole: whether the values are integers.
    """

    is_result: ClassVar[bool] = False

    ends: Any
    rule: str = static()
    least: float = static()
    most: float | None = static()
    advice: str = static()
    are_whole: bool = static()

    @classmethod
    def per_example(
        cls,
        rule: str,
        values: Any,
        least: float,
        most: float | None = None,
        *,
        where: Any = None,
        advice: str = "",
    ) -> PerExample:
        """Checks that values lie between `least` and `most`.

        Args:
            rule: the rule, as a clause, for the error: `"A weight is at least 0"`.
            values: numbers `[batch, ...]`.
            least: the lowest allowed value.
            most: the highest allowed value; None for any finite one.
            where: bool `[batch, ...]`, the values to check; None for all.
            advice: a sentence with the remedy, for the error.

        Raises:
            LossError: `where` has another shape than `values`.
        """
        values = jnp.asarray(values)
        if not is_whole(values):
            values = floating(values)
        elif values.dtype.itemsize < 4 or jnp.issubdtype(values.dtype, jnp.unsignedinteger):
            values = values.astype(jnp.int64 if values.dtype.itemsize == 8 else jnp.int32)
        where = jnp.ones(values.shape, bool) if where is None else jnp.asarray(where)
        if where.shape != values.shape:
            raise LossError(
                f"where must have the shape of the values, {values.shape}; it has shape "
                f"{where.shape}. Broadcast it."
            )
        settings = ("rule", rule), ("least", least), ("most", most), ("advice", advice)
        settings = *settings, ("are_whole", is_whole(values))
        return PerExample((values, where), cls, settings)

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array, **settings: Any) -> Self:
        array, where = values
        lowest = extremes_of(array.dtype)[0]
        # No integer overflows on reversal.
        both = jnp.stack([~array if is_whole(array) else -array, array])
        kept = jnp.broadcast_to(masked(mask, where, False)[None], both.shape)
        ends = jnp.max(both, axis=range(1, both.ndim), initial=lowest, where=kept)
        return cls(jnp.concatenate([ends, jnp.array([1, 0], ends.dtype)]), **settings)

    def merge(self, other: Self) -> Self:
        if isinstance(self.ends, np.ndarray) and self.ends.ndim == 1:  # once per log line
            (low, high, count, _), (low2, high2, count2, _) = (
                self.ends.tolist(),
                other.ends.tolist(),
            )
            if self._are_kept(low, high) and self._are_kept(low2, high2):
                ends = [max(low, low2), max(high, high2), count + count2, 0]
                return dataclasses.replace(self, ends=np.asarray(ends, self.ends.dtype))
        pair = namespace(self.ends).stack([self.ends, other.ends])
        return dataclasses.replace(self, ends=pair).over_rows()

    def over_rows(self) -> Self:
        numpy, are_kept = namespace(self.ends), self.compute()
        if numpy is np and are_kept.all():
            ends = self.ends.max(0)
            ends[..., 2], ends[..., 3] = self.ends[..., 2].sum(0), 0
            return dataclasses.replace(self, ends=ends)
        is_bad = ~are_kept
        row, any_bad = numpy.argmax(is_bad, axis=0), is_bad.any(axis=0)
        total = self.ends[..., 2].sum(0)
        before = numpy.cumsum(self.ends[..., 2], axis=0) - self.ends[..., 2]
        first = numpy.take_along_axis(before + self.ends[..., 3], row[None], axis=0)[0]
        worst = numpy.take_along_axis(self.ends[..., :2], row[None, ..., None], axis=0)[0]
        reach = numpy.where(any_bad[..., None], worst, self.ends[..., :2].max(0))
        counts = numpy.stack([total, numpy.where(any_bad, first, 0)], axis=-1)
        return dataclasses.replace(self, ends=numpy.concatenate([reach, counts], axis=-1))

    def empty_like(self) -> Self:
        lowest = extremes_of(self.ends.dtype)[0]
        numpy, reach, counts = namespace(self.ends), self.ends[..., :2], self.ends[..., 2:]
        nothing = numpy.full_like(reach, lowest), numpy.zeros_like(counts)
        return dataclasses.replace(self, ends=numpy.concatenate(nothing, axis=-1))

    def compute(self) -> Any:
        """Returns whether all values are in their range."""
        return self._are_kept(self.ends[..., 0], self.ends[..., 1])

    def breach(self) -> Breach | None:
        """Returns the first batch that breaks a limit, or None. Only on the host."""
        rows = np.reshape(self.ends, (-1, 4))
        bad = rows[~self._are_kept(rows[:, 0], rows[:, 1])]
        if not len(bad):
            return None
        ends = min(bad, key=lambda row: row[3])
        low, high = _plain(self._low(ends[0])), _plain(ends[1])
        value = high if low >= self.least else low
        reach = "" if low == high or low != low else f", and they range from {low} to {high}"
        return Breach(int(ends[3]), self.rule, f"one is {value}{reach}", self.advice)

    def _low(self, reversed_low: Any) -> Any:
        return -1 - reversed_low if self.are_whole else -reversed_low

    def _are_kept(self, reversed_low: Any, high: Any) -> Any:
        low = self._low(reversed_low)
        is_empty = high < low
        are_kept = (low >= self.least) & (high < np.inf if self.most is None else high <= self.most)
        return are_kept | is_empty  # NaN fails each comparison


def _plain(value: Any) -> Any:
    value = float(value)
    return int(value) if value.is_integer() else value


def first_breach(metrics: Mapping[str, Any]) -> Breach | None:
    """Returns the first breach of any limit among merged metrics on the host, or None."""
    limits = [metric for metric in metrics.values() if isinstance(metric, Limits)]
    found = [each for each in (metric.breach() for metric in limits) if each is not None]
    return min(found, key=lambda each: each.batch, default=None)
