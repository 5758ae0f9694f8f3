"""Evaluates small constants of a program, such as the indices of the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distaff.step.independence.place import FREE, Place

_MAX_SIZE = 2**16


def _iota(params: Any) -> np.ndarray:
    shape, axis = params["shape"], params["dimension"]
    ends = [1] * len(shape)
    ends[axis] = shape[axis]
    counted = np.arange(shape[axis]).reshape(ends)
    return np.broadcast_to(counted, shape).astype(np.dtype(params["dtype"]))


def _broadcast(params: Any, value: np.ndarray) -> np.ndarray:
    shape, axes = params["shape"], params["broadcast_dimensions"]
    ends = [1] * len(shape)
    for axis, length in zip(axes, value.shape, strict=True):
        ends[axis] = length
    return np.broadcast_to(value.reshape(ends), shape)


_FOLDS: dict[str, Callable[..., np.ndarray]] = {
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda params, value: value.reshape(params["new_sizes"]),
    "convert_element_type": lambda params, value: value.astype(np.dtype(params["new_dtype"])),
    "concatenate": lambda params, *values: np.concatenate(values, params["dimension"]),
    "squeeze": lambda params, value: value.squeeze(tuple(params["dimensions"])),
    "select_n": lambda params, which, *cases: np.where(which, cases[1], cases[0]),
    "lt": lambda params, a, b: a < b,
    "add": lambda params, a, b: a + b,
    "sub": lambda params, a, b: a - b,
    "mul": lambda params, a, b: a * b,
}


def folded(equation: Any, places: Sequence[Place]) -> Place:
    """Returns the place of an equation's only result, with its value if it is a small constant.

    None of the operands depends on examples.
    """
    fold = _FOLDS.get(equation.primitive.name)
    values = [place.value for place in places]
    size = getattr(equation.outvars[0].aval, "size", _MAX_SIZE + 1)
    if fold is None or any(value is None for value in values) or size > _MAX_SIZE:
        return FREE
    if equation.primitive.name == "iota" and np.dtype(equation.params["dtype"]).kind not in "iu":
        return FREE
    return FREE._replace(value=np.asarray(fold(equation.params, *values)))


def counted_axis(column: np.ndarray, size: int) -> int | None:
    """Returns the axis along which a constant counts 0, 1, ..., `size - 1`; None without one."""
    for axis, length in enumerate(column.shape):
        ends = [1] * column.ndim
        ends[axis] = length
        if length == size and (column == np.arange(size).reshape(ends)).all():
            return axis
    return None
