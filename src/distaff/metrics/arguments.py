"""The arguments of metrics: arrays of numbers, given to `per_example`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.errors import ConfigError, LossError, MetricError


def check_construction(
    metric: Any, init: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Checks the arguments of a metric, which takes sums rather than the arrays of a batch.

    Raises:
        MetricError: they are arguments of `per_example`, whose arrays `compares` names; a metric
            that may be constructed from arrays compares none.
    """
    signature = inspect.signature(init)
    is_pair = len(args) == 2 and metric.compares and np.ndim(args[1]) > 0
    is_other = hasattr(metric, "per_example") and not _fits(signature, metric, *args, **kwargs)
    if is_pair or is_other:
        raise MetricError(_remedy(metric, signature)) from None


def _fits(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _remedy(metric: Any, signature: inspect.Signature) -> str:
    cls = type(metric)
    name = f"metrics.{cls.__name__}" if cls.__module__.startswith("distaff.") else cls.__name__
    call = f"{name}.per_example({metric.compares or 'values'})"
    fields = ", ".join(list(signature.parameters)[1:])
    return (
        f"{name}(...) takes what it accumulates: {fields}. For the metric of a batch, return "
        f"{call} from the loss function; {call}.compute() is its value outside of a step."
    )


def as_numbers(values: Any, what: str = "A metric") -> jax.Array:
    """Returns values as an array of real numbers or bools; `what` needs them.

    Raises:
        LossError: they are something else, such as None, text, a ragged list or complex numbers.
    """
    try:
        array = jnp.asarray(values)
    except (TypeError, ValueError) as error:
        dtype = getattr(values, "dtype", None)
        kind = type(values).__name__ if dtype is None else f"an array of dtype {dtype}"
        raise LossError(
            f"{what} needs an array of numbers; got {kind}. Pass a NumPy or JAX array, one value "
            "per example along its first axis."
        ) from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise LossError(
            f"{what} needs real numbers; got an array of dtype {array.dtype}. Pass its real and "
            "imaginary parts, or its magnitude."
        )
    return array


def floating(values: Any) -> jax.Array:
    """Converts values to float32, so that averages of half-precision values are exact.

    Float64 stays.
    """
    values = as_numbers(values)
    return values if values.dtype == jnp.float64 else values.astype(jnp.float32)


def leading(weight: Any, values: jax.Array) -> jax.Array:
    """Returns a weight as floats, checked to have the leading axes of the values."""
    weight = floating(weight)
    if weight.ndim == 0 or weight.shape != values.shape[: weight.ndim]:
        raise LossError(
            f"The weight of a mean has shape {weight.shape}, which does not match the leading "
            f"axes of the values, {values.shape}. Pass one weight per example, "
            f"{values.shape[:1]}, or one per value, {values.shape}."
        )
    return weight


def is_whole(values: jax.Array) -> bool:
    """Returns whether an array holds integers or bools."""
    return values.dtype == jnp.bool_ or bool(jnp.issubdtype(values.dtype, jnp.integer))


def check_axis(name: str, values: jax.Array) -> None:
    """Raises LossError for a number instead of values per example."""
    if not values.ndim:
        raise LossError(
            f"{name} needs values per example, [batch, ...]; got a number. Pass an array with one "
            "entry per example."
        )


def check_num_classes(name: str, num_classes: Any) -> int:
    """Returns the number of classes as an int.

    Raises:
        ConfigError: it is missing, not an integer, or less than 2.
    """
    if num_classes is None:
        raise ConfigError(
            f"{name}.per_example needs num_classes, since a batch may lack some classes. Pass "
            "num_classes=10 for ten classes."
        )
    if not isinstance(num_classes, int | np.integer) or isinstance(num_classes, bool):
        raise ConfigError(f"num_classes must be an integer; got {num_classes!r}.")
    if num_classes < 2:
        raise ConfigError(
            f"num_classes must be at least 2; got {num_classes}. Pass 2 for labels that are true "
            "or false."
        )
    return int(num_classes)
