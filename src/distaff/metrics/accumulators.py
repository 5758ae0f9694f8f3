"""Metrics as mergeable accumulators: exact over uneven batches, windows, hosts and restarts.

A metric is a small pytree with three abilities: an empty one (`empty_like`), `merge`, and
`compute`. A loss function may return, by name, any of

* an array `[batch, ...]`: one value per example, averaged over the examples;
* `Mean.per_example(...)`, `Sum.per_example(...)`, ...: one value per example, reduced that way;
* a scalar: taken as the mean over its batch;
* a metric: taken as it is.

Only the first two can be masked, so only they let evaluation pad a short last batch.
The form follows `clu.metrics` (empty / merge / compute); the arithmetic is in float32 on the device
for one window of steps and in float64 on the host across windows.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.pytrees import static
from distaff.errors import LossError, MetricError
from distaff.metrics.named import Named
from distaff.metrics.whole import added

C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: C) -> C:
    """Makes a class a frozen dataclass that JAX knows as a pytree."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def namespace(array: Any) -> Any:
    """Returns the module whose functions compute where an array is: `jax.numpy` or `numpy`."""
    return jnp if isinstance(array, jax.Array) else np


class Metric(ABC):
    """What every accumulator can do. The order of merging changes no result but that of `Last`.

    Attributes:
        refused_in_training: why a training step must not return this kind; empty where it may.
        is_result: whether it is a number to report; see `metrics.limits` for one that is not.
    """

    refused_in_training: ClassVar[str] = ""
    is_result: ClassVar[bool] = True

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Returns the metric over the examples of both."""

    @abstractmethod
    def compute(self) -> Any:
        """Returns the value, NaN where nothing was accumulated."""

    @abstractmethod
    def empty_like(self) -> Self:
        """Returns the neutral element of `merge`, with this one's shapes and dtypes."""

    @classmethod
    @abstractmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        """Returns the metric over the examples whose `mask` `[batch]` is true."""

    def over_rows(self) -> Self:
        """Returns the merge of the metrics in the rows `[rows, ...]` of this one, one or more.

        An override is a faster way to do what `merge` does row by row; see `merge_rows`.
        """
        leaves, structure = jax.tree.flatten(self)
        rows = [structure.unflatten(row) for row in zip(*leaves, strict=True)]
        return functools.reduce(lambda total, row: total.merge(row), rows)


@pytree
class PerExample:
    """Values per example, `[batch, ...]`, and how they are to be reduced.

    Args:
        values: what `metric.reduce` is given after the mask.
        metric: the kind of metric they become.
        settings: keyword arguments of `metric.reduce`, as hashable pairs of name and value.
    """

    values: tuple[jax.Array, ...]
    metric: type[Metric] = static()
    settings: tuple[tuple[str, Any], ...] = static(default=())

    def reduce(self, mask: jax.Array) -> Metric:
        """Returns the metric over the examples whose `mask` `[batch]` is true."""
        reduce: Callable[..., Metric] = self.metric.reduce
        return reduce(mask, *self.values, **dict(self.settings))


def aligned(leading: Any, values: Any) -> Any:
    """Gives `leading` the trailing axes with which it broadcasts against `values`."""
    missing = (1,) * (np.ndim(values) - np.ndim(leading))
    return namespace(leading).reshape(leading, np.shape(leading) + missing)


def masked(mask: jax.Array, values: jax.Array, otherwise: Any) -> jax.Array:
    """Returns `values` `[batch, ...]` with `otherwise` where `mask` `[batch]` is false."""
    return jnp.where(aligned(mask, values), values, jnp.asarray(otherwise, values.dtype))


def floating(values: Any) -> jax.Array:
    """Returns floats of at least 32 bits: sums in half precision would not be exact averages."""
    values = jnp.asarray(values)
    return values if values.dtype == jnp.float64 else values.astype(jnp.float32)


def is_whole(values: jax.Array) -> bool:
    """Returns whether an array holds integers or bools."""
    return values.dtype == jnp.bool_ or bool(jnp.issubdtype(values.dtype, jnp.integer))


@pytree
class Mean(Metric):
    """A weighted mean, kept as the sum of weighted values and the sum of weights."""

    total: Any
    weight: Any

    @classmethod
    def per_example(cls, values: Any, weight: Any = None) -> PerExample:
        """Declares values per example whose weighted mean is wanted.

        Args:
            values: `[batch, ...]`.
            weight: with one or more of the leading axes of `values`; 1 without. `[batch]` weighs
                each example, such as with its number of tokens: a value is then the mean over its
                own weight. `[batch, length]` weighs each token, and the mean is over all tokens of
                all examples. What has no weight does not count, even if it is NaN.

        Raises:
            LossError: the shape of `weight` is not that of the leading axes of `values`.
        """
        values = floating(values)
        if weight is None:
            return PerExample((values, jnp.ones(values.shape[:1], values.dtype)), cls)
        weight = floating(weight)
        if weight.ndim == 0 or weight.shape != values.shape[: weight.ndim]:
            raise LossError(
                "The weight of a mean is one number for each example, or one for each value, and "
                f"has the leading axes of the values, {values.shape}; it has shape {weight.shape}. "
                f"Pass a weight of shape {values.shape[:1]} or {values.shape}."
            )
        if weight.ndim > 1:
            axes, own = tuple(range(1, weight.ndim)), aligned(weight, values)
            total = (jnp.where(own != 0, values, 0) * own).sum(axes)
            weight = weight.sum(axes)
            values = total / aligned(jnp.where(weight == 0, 1, weight), total)
        return PerExample((values, weight), cls)

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        value, weight = values
        kept = masked(mask, weight, 0)
        weighted = masked(kept != 0, value, 0) * aligned(kept, value)
        return cls(jnp.sum(weighted, axis=0), jnp.sum(kept))

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total, self.weight + other.weight)

    def over_rows(self) -> Self:
        return type(self)(self.total.sum(0), self.weight.sum(0))

    def compute(self) -> Any:
        if isinstance(self.total, float) and isinstance(self.weight, float):
            return self.total / self.weight if self.weight else float("nan")
        numpy = namespace(self.total)
        weight = aligned(self.weight, self.total)
        mean = self.total / numpy.where(weight == 0, 1, weight)
        return numpy.where(weight == 0, float("nan"), mean)

    def empty_like(self) -> Self:
        return type(self)(jnp.zeros_like(self.total), jnp.zeros_like(self.weight))


@pytree
class Sum(Metric):
    """A sum over examples: counts, confusion matrices, tokens seen."""

    total: Any

    @classmethod
    def per_example(cls, values: Any) -> PerExample:
        """Declares values per example, `[batch, ...]`, whose sum is wanted.

        Sums of integers are exact, up to 2**47 in a batch.
        """
        values = jnp.asarray(values)
        is_narrow = is_whole(values) and values.dtype.itemsize <= 4
        if cls is Sum and is_narrow:
            return PerExample((values,), WholeSum)
        return PerExample((values if is_whole(values) else floating(values),), cls)

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        return cls(jnp.sum(masked(mask, values[0], 0), axis=0))

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total)

    def over_rows(self) -> Self:
        return type(self)(self.total.sum(0))

    def compute(self) -> Any:
        return self.total

    def empty_like(self) -> Self:
        return type(self)(jnp.zeros_like(self.total))


@pytree
class WholeSum(Sum):
    """A sum of whole numbers, as `Sum.per_example` makes it of integers.

    Args:
        total: the sum, rounded to float32.
        rest: what was rounded away: both together, in float64, are the exact sum.
    """

    rest: Any

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        return cls(*added(masked(mask, values[0], 0)))

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total, self.rest + other.rest)

    def over_rows(self) -> Self:
        return type(self)(self.total.sum(0), self.rest.sum(0))

    def compute(self) -> Any:
        return self.total + self.rest

    def empty_like(self) -> Self:
        return type(self)(jnp.zeros_like(self.total), jnp.zeros_like(self.rest))


@pytree
class Last(Metric):
    """The value of the last step, such as a learning rate or a gradient norm."""

    value: Any
    count: Any = 1

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        raise MetricError("Last belongs to a step, not to an example; return Last(value) itself.")

    def merge(self, other: Self) -> Self:
        numpy = namespace(other.value)
        return type(self)(
            numpy.where(aligned(other.count, other.value) == 0, self.value, other.value),
            self.count + other.count,
        )

    def compute(self) -> Any:
        missing = aligned(self.count, self.value) == 0
        return namespace(self.value).where(missing, float("nan"), self.value)

    def empty_like(self) -> Self:
        return type(self)(jnp.zeros_like(self.value), jnp.zeros_like(self.count))


Metrics = Mapping[str, Metric]
"""Metrics of one step, window, epoch or evaluation, by name."""


def declare(name: str, value: Any, num_examples: int) -> Metric | PerExample:
    """Brings one value that a step returned into its accumulating form.

    Args:
        name: its name, for the error.
        value: an array `[batch, ...]`, a scalar, a metric, or `PerExample`.
        num_examples: the batch size.

    Raises:
        LossError: an array is neither a scalar nor one value per example.
    """
    if isinstance(value, Metric):
        return value
    if isinstance(value, PerExample):
        _check_leading(name, value.values[0], num_examples)
        return value
    array = floating(value)
    if array.ndim == 0:
        weight = jnp.asarray(num_examples, array.dtype)
        return Mean(array * weight, weight)
    _check_leading(name, array, num_examples)
    return Mean.per_example(array)


def _check_leading(name: str, array: jax.Array, num_examples: int) -> None:
    if array.shape[:1] != (num_examples,):
        raise LossError(
            f"A metric is a scalar, or has one entry per example (shape [{num_examples}, ...]); "
            f"{name!r} has shape {array.shape}. Reduce it, or wrap it: metrics.Sum({name})."
        )


def merge(first: Metrics, second: Metrics) -> dict[str, Metric]:
    """Merges two sets of metrics name by name.

    Raises:
        MetricError: the two do not hold the same names, or a name changed its kind.
    """
    if first.keys() != second.keys():
        raise MetricError(
            "Every step must return the same metrics. "
            f"One returned {sorted(first)}, another {sorted(second)}."
        )
    for name in first:
        if type(first[name]) is not type(second[name]):
            kinds = f"{type(first[name]).__name__} and {type(second[name]).__name__}"
            raise MetricError(f"A metric keeps its kind; {name!r} was {kinds}.")
    return {name: first[name].merge(second[name]) for name in first}


def merge_rows(metrics: Metrics) -> dict[str, Metric]:
    """Merges the metrics in the rows of one set, whose leaves are `[rows, ...]`, one or more.

    A kind that overrides `merge`, and inherits `over_rows`, is merged row by row.
    """
    merged = {}
    for name, metric in metrics.items():
        definers = [
            next(kind for kind in type(metric).__mro__ if method in vars(kind))
            for method in ("over_rows", "merge")
        ]
        fast = issubclass(*definers)
        merged[name] = metric.over_rows() if fast else Metric.over_rows(metric)
    return merged


def to_host(metrics: Metrics) -> dict[str, Metric]:
    """Fetches metrics from the device in one transfer, in float64 so that merging stays exact."""
    fetched = jax.device_get(dict(metrics))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fetched)


def known_or_zero(metric: Metric) -> Any:
    """Returns a metric's value, and 0 for a mean of nothing, whose weights are all 0."""
    value = metric.compute()
    if not isinstance(metric, Mean):
        return value
    return namespace(value).where(aligned(metric.weight, value) == 0, 0, value)


def results(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns those of the metrics that are numbers to report."""
    return {name: metric for name, metric in metrics.items() if metric.is_result}


def compute(metrics: Metrics, prefix: str = "") -> dict[str, Any]:
    """Computes host metrics, the loss first.

    Args:
        metrics: as `to_host` gives them.
        prefix: put before each name: `compute(m, "val/")` gives `{"val/loss": ...}`.

    Returns:
        Python floats, or float64 arrays for those that are not one number.
    """
    metrics = results(metrics)
    names = sorted(metrics, key=lambda name: (name != "loss", name))
    return Named({prefix + name: _plain(metrics[name].compute()) for name in names})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value)
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array
