"""Metrics of regression: mean absolute error, root mean squared error, R2."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from distaff.core.pytrees import static
from distaff.errors import LossError
from distaff.metrics.accumulators import (
    Metric,
    PerExample,
    WeightedMean,
    masked,
    mean_over_all,
    namespace,
    pytree,
    whole_weight,
)
from distaff.metrics.arguments import floating


@pytree
class MAE(WeightedMean):
    """The mean absolute error over all values."""

    compares: ClassVar[str] = "targets, outputs"

    @classmethod
    def per_example(cls, targets: Any, outputs: Any, *, weight: Any = None) -> PerExample:
        """Compares outputs with targets.

        Args:
            targets: numbers `[batch, ...]`.
            outputs: numbers, with the shape of `targets`.
            weight: numbers or bool, with the leading axes of `targets`; 1 by default. Values of
                weight 0 are ignored, even NaN.

        Returns:
            Values per example. Return them from `loss_fn` among its metrics, by name; outside of a
            step, `compute()` returns their value.

        Raises:
            LossError: the shapes differ.
        """
        targets, outputs = _pair(cls, targets, outputs)
        return mean_over_all(cls, jnp.abs(outputs - targets), weight)


@pytree
class RMSE(WeightedMean):
    """The square root of the mean squared error over all values."""

    compares: ClassVar[str] = "targets, outputs"

    @classmethod
    def per_example(cls, targets: Any, outputs: Any, *, weight: Any = None) -> PerExample:
        """Compares outputs with targets.

        Args:
            targets: numbers `[batch, ...]`.
            outputs: numbers, with the shape of `targets`.
            weight: numbers or bool, with the leading axes of `targets`; 1 by default. Values of
                weight 0 are ignored, even NaN.

        Returns:
            Values per example. Return them from `loss_fn` among its metrics, by name; outside of a
            step, `compute()` returns their value.

        Raises:
            LossError: the shapes differ.
        """
        targets, outputs = _pair(cls, targets, outputs)
        return mean_over_all(cls, jnp.square(outputs - targets), weight)

    def compute(self) -> Any:
        return namespace(self.total).sqrt(super().compute())


@pytree
class R2(Metric):
    """The coefficient of determination: 1 minus the squared error over the spread of the targets.

    The value equals that of `sklearn.metrics.r2_score`. For several outputs it is their mean. For
    constant targets it is 1 if all outputs are exact, else 0; for fewer than two targets it is NaN.
    It sums distances from the mean of a batch, so that targets far from 0 lose no digits.

    Args:
        count: number of targets with a weight, `[outputs]`, as all other arrays.
        weight: sum of the weights.
        center: a number near the mean of the targets.
        distance: weighted sum of the targets minus `center`.
        square: weighted sum of the squares of the targets minus `center`.
        error: weighted sum of the squared errors.
        average: whether to return the mean over the outputs, or one value for each.
    """

    count: Any
    weight: Any
    center: Any
    distance: Any
    square: Any
    error: Any
    average: bool = static(default=True)

    compares: ClassVar[str] = "targets, outputs"

    @classmethod
    def per_example(
        cls, targets: Any, outputs: Any, *, weight: Any = None, average: bool = True
    ) -> PerExample:
        """Compares outputs with targets.

        Args:
            targets: numbers `[batch]`, or `[batch, ...]` for several outputs.
            outputs: numbers, with the shape of `targets`.
            weight: numbers or bool, with the leading axes of `targets`; 1 by default. Values of
                weight 0 are ignored, even NaN.
            average: False to return one value per output, `[outputs]`.

        Returns:
            Values per example. Return them from `loss_fn` among its metrics, by name; outside of a
            step, `compute()` returns their value.

        Raises:
            LossError: the shapes differ.
        """
        targets, outputs = _pair(cls, targets, outputs)
        weights = whole_weight(weight, targets)
        columns = math.prod(targets.shape[1:])
        rows = (array.reshape(-1, columns) for array in (targets, outputs, weights))
        return PerExample(tuple(rows), cls, (("average", average),))

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array, average: bool = True) -> Self:
        targets, outputs, weight = values
        weight = masked(mask, weight, 0)
        kept = weight != 0
        total = weight.sum(0)
        divisor = jnp.where(total == 0, 1, total)
        lowest = jnp.min(targets, 0, initial=jnp.inf, where=kept)
        highest = jnp.max(targets, 0, initial=-jnp.inf, where=kept)
        known = jnp.where(kept, targets, 0)
        # The bounds make the distances of constant targets exactly 0, despite rounding.
        mean = jnp.clip((weight * known).sum(0) / divisor, lowest, highest)
        center = jnp.where(total == 0, 0, mean)
        distance = jnp.where(kept, known - center[None], 0)
        error = jnp.where(kept, outputs - known, 0)
        sums = ((weight * each).sum(0) for each in (distance, distance**2, error**2))
        return cls(kept.sum(0), total, center, *sums, average=average)

    def merge(self, other: Self) -> Self:
        numpy = namespace(self.weight)
        center = numpy.where(self.weight == 0, other.center, self.center)
        pair = self._around(center), other._around(center)
        return jax.tree.map(lambda a, b: a + b, *pair)._at(center)

    def over_rows(self) -> Self:
        numpy = namespace(self.weight)
        first = numpy.argmax(self.weight != 0, axis=0)[None]
        center = numpy.take_along_axis(self.center, first, axis=0)
        return jax.tree.map(lambda leaf: leaf.sum(0), self._around(center))._at(center[0])

    def _around(self, center: Any) -> Self:
        """Returns the same sums of distances from another center."""
        numpy = namespace(self.weight)
        shift = numpy.where(self.weight == 0, 0, self.center - center)
        square = self.square + 2 * shift * self.distance + self.weight * shift**2
        distance = self.distance + self.weight * shift
        return dataclasses.replace(self, distance=distance, square=square)

    def _at(self, center: Any) -> Self:
        return dataclasses.replace(self, center=center)

    def compute(self) -> Any:
        numpy = namespace(self.weight)
        mean = self.distance / numpy.where(self.weight == 0, 1, self.weight)
        spread = self.square - self.distance * mean
        is_constant = spread <= 0
        ratio = self.error / numpy.where(is_constant, 1, spread)
        score = numpy.where(is_constant, self.error == 0, 1 - ratio)
        score = numpy.where(self.count < 2, float("nan"), score)
        return score.mean(-1) if self.average else score

    def empty_like(self) -> Self:
        return jax.tree.map(jnp.zeros_like, self)


def _pair(cls: type[Metric], targets: Any, outputs: Any) -> tuple[jax.Array, jax.Array]:
    """Returns targets and outputs as floats, checked to have one shape."""
    targets, outputs = floating(targets), floating(outputs)
    if targets.shape != outputs.shape:
        raise LossError(
            f"{cls.__name__} needs one output per target; targets have shape {targets.shape}, "
            f"outputs {outputs.shape}. Reshape them: others would be broadcast, and compare "
            "examples with each other."
        )
    return targets, outputs
