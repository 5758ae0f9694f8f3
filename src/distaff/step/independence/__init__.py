"""Checks whether the outputs for an example depend on the other examples of its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.core.typing import Batch, PyTree
from distaff.step.independence.place import FREE, AxisKind, rows
from distaff.step.independence.walk import Walk

__all__ = ["keeps_apart"]


def keeps_apart(trace: Callable[[PyTree, Batch], Any], state: PyTree, batch: Batch) -> bool:
    """Returns whether each output of a program for an example depends on that example alone.

    The answer comes from the jaxpr, so it is the same in every run: comparing outputs could agree
    by chance, for example where a parameter is 0. A program without a jaxpr counts as mixing
    examples, as does one that computes with the batch size.

    Args:
        trace: `(state, batch) -> jaxpr` of a function whose outputs are `[batch, ...]`; returns
            None if it has no jaxpr.
        state: inputs that do not depend on the examples.
        batch: arrays, or their shapes, `[batch, ...]`, of at least two examples.
    """
    size = np.shape(jax.tree.leaves(batch)[0])[0]
    if size < 2:
        return False
    closed = trace(state, batch)
    if closed is None:
        return False
    found = _Found.of(closed, state, batch)
    if not found.is_apart or not found.may_count(size):
        return found.is_apart
    larger = jax.tree.map(lambda leaf: _sized(leaf, size + 1), batch)
    try:
        return _Found.of(trace(state, larger), state, larger) == found
    except Exception:  # the program takes batches of one size only
        return False


class _Found(NamedTuple):
    """The result of a `Walk` through a program, and its numbers.

    Attributes:
        is_apart: whether the outputs keep the examples apart, along their first axis.
        numbers: see `Walk`.
        other_numbers: see `Walk`.
    """

    is_apart: bool
    numbers: list[float]
    other_numbers: list[float]

    @classmethod
    def of(cls, closed: Any, state: PyTree, batch: Batch) -> _Found:
        walk = Walk()
        inputs = [FREE] * len(jax.tree.leaves(state)) + [rows(0)] * len(jax.tree.leaves(batch))
        try:
            places = walk(closed, inputs)
        except Exception:  # another version of JAX may define a primitive differently
            return cls(is_apart=False, numbers=[], other_numbers=[])
        is_apart = all(place.kind is AxisKind.FREE or place.plain() == rows(0) for place in places)
        return cls(is_apart, walk.numbers, walk.other_numbers)

    def may_count(self, size: int) -> bool:
        """Returns whether a number may be derived from the batch size."""
        known = [size, 1 / size, math.log(size)]
        counted = [*known, size - 1, 1 / (size - 1)]
        return _has(self.numbers, known) or _has(self.other_numbers, counted)


def _has(numbers: list[float], suspects: list[float]) -> bool:
    found = np.abs(np.array(numbers, np.complex128))
    return bool(np.isclose(found[:, None], np.array(suspects), rtol=1e-5).any())


def _sized(leaf: Any, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))
