"""Metrics of other libraries: any class with `empty`, `merge` and `compute`.

That is the form of `clu.metrics` and metrax: a pytree, such as a `flax.struct.dataclass`, whose
instances accumulate the model outputs of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.pytrees import static
from distaff.errors import LossError, MetricError
from distaff.metrics.accumulators import Metric, pytree

_METHODS = ("empty", "merge", "compute")
_WIDE = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}


@pytree
class ForeignMetric(Metric):
    """A metric of another library.

    On the host its leaves are float64, as in every metric, but its own methods see integers and
    bools as such.

    Args:
        inner: the metric.
        kinds: kinds of the dtypes of its leaves, `f`, `i`, `u` or `b`.
    """

    inner: Any
    kinds: tuple[str, ...] = static()

    @classmethod
    def reduce(cls, mask: jax.Array, *values: jax.Array) -> Self:
        raise MetricError("A metric of another library is reduced already.")

    def merge(self, other: Self) -> Self:
        if self._is_on_device() or other._is_on_device():
            return dataclasses.replace(self, inner=self.inner.merge(other.inner))
        with jax.transfer_guard("allow"):
            merged = jax.device_get(self._own().merge(other._own()))
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), merged)
        return type(self)(wide, kinds_of(merged))

    def compute(self) -> Any:
        """Returns the value.

        Raises:
            MetricError: the metric computes several values by name.
        """
        if self._is_on_device():
            return self.inner.compute()
        with jax.transfer_guard("allow"):
            value = jax.device_get(self._own().compute())
        if isinstance(value, Mapping):
            raise MetricError(
                f"The metric {type(self.inner).__name__} computes several values, {list(value)}. "
                "Return its members from the loss function, each under a name of its own."
            )
        return value

    def empty_like(self) -> Self:
        """Returns the result of `empty`, with this metric's shapes and dtypes.

        Raises:
            MetricError: `empty` returns another structure, or other shapes.
        """
        empty = type(self.inner).empty()
        if jax.tree.structure(empty) == jax.tree.structure(self.inner):
            try:
                return dataclasses.replace(self, inner=jax.tree.map(_like, empty, self.inner))
            except ValueError:
                pass
        raise MetricError(
            f"{type(self.inner).__name__}.empty() has other shapes than a metric of a batch, so a "
            "step that returns it cannot be skipped. Return it only if not ctx.train, or pass "
            "on_bad_numbers='raise'."
        )

    def _is_on_device(self) -> bool:
        return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self.inner))

    def _own(self) -> Any:
        """Returns the metric with the dtypes that its methods expect."""
        leaves, structure = jax.tree.flatten(self.inner)
        pairs = zip(leaves, self.kinds, strict=True)
        return structure.unflatten([leaf.astype(_WIDE[kind]) for leaf, kind in pairs])


@pytree
class GrowingMetric(ForeignMetric):
    """A metric of another library that stores examples, as `clu.metrics.CollectingMetric`."""

    refused_in_training: ClassVar[str] = (
        "A metric that grows when it is merged stores every example, so use it in evaluation: "
        "return it from the loss function only if not ctx.train."
    )


def is_foreign(value: Any) -> bool:
    """Returns whether a value has the methods of a metric of another library."""
    return all(callable(getattr(type(value), name, None)) for name in _METHODS)


def foreign(name: str, value: Any) -> ForeignMetric:
    """Wraps a metric of another library.

    Args:
        name: its name, for errors.
        value: an instance, as from `from_model_output`.

    Raises:
        LossError: it is not a pytree of arrays.
    """
    leaves = jax.tree.leaves(value)
    if any(leaf is value or not _is_number(leaf) for leaf in leaves):
        raise LossError(
            f"The metric {name!r}, of class {type(value).__name__}, is not a pytree of arrays. "
            "Decorate its class with flax.struct.dataclass."
        )
    inner = jax.tree.map(jnp.asarray, value)
    return (GrowingMetric if _grows(inner) else ForeignMetric)(inner, kinds_of(inner))


def kinds_of(tree: Any) -> tuple[str, ...]:
    """Returns the kinds of the dtypes of the leaves of a tree."""
    return tuple(_kind(leaf.dtype) for leaf in jax.tree.leaves(tree))


def _kind(dtype: Any) -> str:
    return "f" if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype).kind


def _is_number(leaf: Any) -> bool:
    is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    return (is_array and _kind(leaf.dtype) in _WIDE) or isinstance(leaf, bool | int | float)


def _grows(inner: Any) -> bool:
    """Returns whether a metric of two batches has other leaves than a metric of one."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, _WIDE[_kind(leaf.dtype)]), inner)
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        merged = zeros.merge(zeros)
    return _shapes(merged) != _shapes(zeros)


def _shapes(tree: Any) -> Iterable[Any]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.shape(leaf) for leaf in leaves]


def _like(leaf: Any, other: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(leaf, other.dtype), other.shape)
