"""Metrics as mergeable accumulators: exact over uneven batches, windows, hosts and restarts.

A metric is a small pytree with `empty_like`, `merge` and `compute`, as in `clu.metrics`. The loss,
and each metric that a loss function returns, may be

* an array `[batch, ...]`: one value per example, averaged over the examples;
* `Mean.per_example(...)`, `Sum.per_example(...)`, ...: one value per example, reduced that way;
* a scalar: the mean over its batch;
* a metric, also of another library.

Only the first two can be masked, so only they let evaluation pad a short last batch.
Metrics are float32 on the device, within one window of steps, and float64 on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Never, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.pytrees import static
from distaff.errors import MetricError, UnknownMetricError, nearest
from distaff.metrics.arguments import (
    as_numbers,
    check_axis,
    check_construction,
    floating,
    is_whole,
    leading,
)
from distaff.metrics.exact_sums import sum_integers

C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: C) -> C:
    """Turns a class into a frozen dataclass registered as a JAX pytree."""
    made = dataclasses.dataclass(frozen=True)(cls)
    if issubclass(made, Metric):
        made.__init__ = _checked(made.__init__)
    return jax.tree_util.register_dataclass(made)


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:  # JAX passes arrays by name
            check_construction(self, init, args, kwargs)
        try:
            init(self, *args, **kwargs)
        except TypeError:
            check_construction(self, init, args, kwargs)
            raise

    return constructor


def namespace(array: Any) -> Any:
    """Returns `jax.numpy` for a JAX array, else `numpy`."""
    return jnp if isinstance(array, jax.Array) else np


class Metric(ABC):
    """A mergeable accumulator. The order of merging only matters for `Last`.

    Attributes:
        refused_in_training: why a training step must not return this kind; empty if it may.
        is_result: whether it is reported; `metrics.limits.Limits` is not.
        compares: the arrays that `per_example` compares, for errors.
    """

    refused_in_training: ClassVar[str] = ""
    is_result: ClassVar[bool] = True
    compares: ClassVar[str] = ""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Returns the metric over the examples of both."""

    @abstractmethod
    def compute(self) -> Any:
        """Returns the value; NaN if nothing was accumulated."""

    @abstractmethod
    def empty_like(self) -> Self:
        """Returns the neutral element of `merge`, with this one's shapes and dtypes."""

    @classmethod
    @abstractmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        """Returns the metric over the examples whose `mask` `[batch]` is true."""

    def over_rows(self) -> Self:
        """Merges the rows of a metric whose leaves are `[rows, ...]`, with one row or more.

        Override it where the rows can be merged at once; see `merge_rows`.
        """
        leaves, structure = jax.tree.flatten(self)
        rows = [structure.unflatten(row) for row in zip(*leaves, strict=True)]
        return functools.reduce(lambda total, row: total.merge(row), rows)


@pytree
class PerExample:
    """Values per example, `[batch, ...]`, with the metric that reduces them.

    Args:
        values: positional arguments of `metric.reduce`, after the mask.
        metric: the kind of metric.
        settings: keyword arguments of `metric.reduce`, as hashable pairs of name and value.
    """

    values: tuple[jax.Array, ...]
    metric: type[Metric] = static()
    settings: tuple[tuple[str, Any], ...] = static(default=())

    def reduce(self, mask: jax.Array) -> Metric:
        """Returns the metric over the examples whose `mask` `[batch]` is true."""
        reduce: Callable[..., Metric] = self.metric.reduce
        return reduce(mask, *self.values, **dict(self.settings))

    def compute(self) -> Any:
        """Returns the value over all examples, on the host: for arrays outside of a step.

        Raises:
            LossError: the values have no axis of examples.
        """
        check_axis(self.metric.__name__, self.values[0])
        mask = jnp.ones(self.values[0].shape[:1], bool)
        return compute(to_host({"": self.reduce(mask)}))[""]


def aligned(leading: Any, values: Any) -> Any:
    """Appends axes of size 1 to `leading` so that it broadcasts against `values`."""
    missing = (1,) * (np.ndim(values) - np.ndim(leading))
    return namespace(leading).reshape(leading, np.shape(leading) + missing)


def masked(mask: jax.Array, values: jax.Array, otherwise: Any) -> jax.Array:
    """Returns `values` `[batch, ...]` with `otherwise` where `mask` `[batch]` is false."""
    return jnp.where(aligned(mask, values), values, jnp.asarray(otherwise, values.dtype))


@pytree
class WeightedMean(Metric):
    """The sum of weighted values and the sum of weights, the base of all means."""

    total: Any
    weight: Any

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        value, weight = values
        kept = masked(mask, weight, 0)
        weighted = masked(kept != 0, value, 0) * aligned(kept, value)
        return cls(total=jnp.sum(weighted, axis=0), weight=jnp.sum(kept))

    def merge(self, other: Self) -> Self:
        return type(self)(total=self.total + other.total, weight=self.weight + other.weight)

    def over_rows(self) -> Self:
        return type(self)(total=self.total.sum(0), weight=self.weight.sum(0))

    def compute(self) -> Any:
        if isinstance(self.total, float) and isinstance(self.weight, float):
            return self.total / self.weight if self.weight else float("nan")
        numpy = namespace(self.total)
        weight = aligned(self.weight, self.total)
        mean = self.total / numpy.where(weight == 0, 1, weight)
        return numpy.where(weight == 0, float("nan"), mean)

    def empty_like(self) -> Self:
        return jax.tree.map(jnp.zeros_like, self)


@pytree
class Mean(WeightedMean):
    """A weighted mean, kept as the sum of weighted values and the sum of weights."""

    @classmethod
    def per_example(cls, values: Any, weight: Any = None) -> PerExample:
        """Returns the weighted mean of values per example.

        Args:
            values: numbers `[batch, ...]`.
            weight: numbers `[batch]` or `[batch, ...]`, with the leading axes of `values`; 1 by
                default. `[batch]` weights each example, for example by its number of tokens if a
                value is a mean over them. `[batch, length]` weights each token, and averages over
                all tokens of all examples. Values of weight 0 are ignored, even NaN.

        Raises:
            LossError: the shape of `weight` does not match the leading axes of `values`.
        """
        values = floating(values)
        if weight is None:
            return PerExample((values, jnp.ones(values.shape[:1], values.dtype)), cls)
        weight = leading(weight, values)
        if weight.ndim > 1:
            axes, own = tuple(range(1, weight.ndim)), aligned(weight, values)
            total = (jnp.where(own != 0, values, 0) * own).sum(axes)
            weight = weight.sum(axes)
            values = total / aligned(jnp.where(weight == 0, 1, weight), total)
        return PerExample((values, weight), cls)


def mean_over_all(metric: type[WeightedMean], values: Any, weight: Any) -> PerExample:
    """Returns the weighted mean over all values `[batch, ...]`, a scalar."""
    values = floating(values)
    weight = whole_weight(weight, values)
    return dataclasses.replace(Mean.per_example(values, weight), metric=metric)


def whole_weight(weight: Any, values: jax.Array) -> jax.Array:
    """Returns one weight per value, 1 by default, given weights of its leading axes."""
    weight = jnp.ones(values.shape[:1], values.dtype) if weight is None else weight
    return jnp.broadcast_to(aligned(leading(weight, values), values), values.shape)


@pytree
class Sum(Metric):
    """A sum over examples: counts, confusion matrices, tokens seen."""

    total: Any

    @classmethod
    def per_example(cls, values: Any) -> PerExample:
        """Returns the sum of values per example, `[batch, ...]`.

        Sums of integers are exact up to 2**47 per batch.
        """
        values = as_numbers(values)
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
    """An exact sum of integers, returned by `Sum.per_example`.

    Args:
        total: the sum, rounded to float32.
        rest: the rounding error; `total + rest` in float64 is the exact sum.
    """

    rest: Any

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        return cls(*sum_integers(masked(mask, values[0], 0)))

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
        raise MetricError("Last holds one value per step, not per example. Return Last(value).")

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
"""Metrics of a step, window, epoch or evaluation, by name."""


def merge(first: Metrics, second: Metrics) -> dict[str, Metric]:
    """Returns the metrics over the examples of two dicts of metrics, name by name.

    Raises:
        MetricError: the names differ, or the kinds of one name.
    """
    if first.keys() != second.keys():
        raise MetricError(
            "Every step must return the same metrics; one returned "
            f"{sorted(first)}, another {sorted(second)}."
        )
    for name in first:
        if type(first[name]) is not type(second[name]):
            kinds = f"{type(first[name]).__name__} and {type(second[name]).__name__}"
            raise MetricError(
                f"The metric {name!r} must be of one kind in every step; got {kinds}."
            )
    return {name: first[name].merge(second[name]) for name in first}


def merge_rows(metrics: Metrics) -> dict[str, Metric]:
    """Merges the rows of metrics whose leaves are `[rows, ...]`, with one row or more.

    A class that overrides `merge` but inherits `over_rows` is merged row by row.
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
    """Copies metrics to the host in one transfer, as float64, so that merging stays exact."""
    fetched = jax.device_get(dict(metrics))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fetched)


def known_or_zero(metric: Metric) -> Any:
    """Returns a metric's value; 0 for a mean whose weights are all 0."""
    value = metric.compute()
    if not isinstance(metric, Mean):
        return value
    return namespace(value).where(aligned(metric.weight, value) == 0, 0, value)


def results(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns the metrics that are reported."""
    return {name: metric for name, metric in metrics.items() if metric.is_result}


class Named(dict[str, Any]):
    """Values of metrics by name; an unknown name raises with the nearest one."""

    def __missing__(self, name: object) -> Never:
        raise UnknownMetricError(f"There is no metric {name!r}. {nearest(str(name), self)}")


def compute(metrics: Metrics, prefix: str = "") -> dict[str, Any]:
    """Computes metrics on the host; the loss comes first.

    Args:
        metrics: the metrics, from `to_host`.
        prefix: prepended to each name: `compute(m, "val/")` returns `{"val/loss": ...}`.

    Returns:
        Python floats for scalars, float64 arrays for others.
    """
    metrics = results(metrics)
    names = sorted(metrics, key=lambda name: (name != "loss", name))
    return Named({prefix + name: _plain(metrics[name].compute()) for name in names})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value)
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array
