"""The arguments of metrics: arrays of numbers, given to `per_example`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.errors import ConfigError, LossError, MetricError


def guarded(init: Callable[..., None]) -> Callable[..., None]:
    """Wraps the constructor of a metric, which takes sums rather than the arrays of a batch.

    The wrapper raises MetricError for arguments of `per_example`, whose arrays `compares` names; a
    metric that may be constructed from arrays compares none.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) == 2 and self.compares and np.ndim(args[1]) > 0:
            raise MetricError(_remedy(self, signature))
        try:
            return init(self, *args, **kwargs)
        except TypeError:
            if not hasattr(self, "per_example") or _fits(signature, self, *args, **kwargs):
                raise
        raise MetricError(_remedy(self, signature))

    return constructor


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
