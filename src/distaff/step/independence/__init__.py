"""Independence: whether the outputs for an example depend on the other examples of its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from distaff.core.typing import Batch, PyTree
from distaff.step.independence.place import FREE, AxisKind, Place, rows
from distaff.step.independence.walk import Walk

__all__ = ["FREE", "Kind", "Place", "Walk", "keeps_apart", "places_of", "rows"]


def keeps_apart(trace: Callable[[PyTree, Batch], Any], state: PyTree, batch: Batch) -> bool:
    """Returns whether each output of a program, for an example, depends on that example alone.

    It is read from the program, and so the same in every run: no numbers are compared, which would
    be equal by chance where a parameter is 0. A program that cannot be read counts as one that
    mixes examples, and so does one that computes with the size of its batch.

    Args:
        trace: `(state, batch) -> jaxpr`, of a function whose outputs are `[batch, ...]`; or
            `-> None`, where it cannot be read.
        state: what no example has a part in.
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
    except Exception:  # it takes batches of one size only
        return False


def places_of(state: PyTree, batch: Batch) -> list[Place]:
    """Returns the places of the inputs of a program `(state, batch)`."""
    return [FREE] * len(jax.tree.leaves(state)) + [rows(0)] * len(jax.tree.leaves(batch))


class _Found(NamedTuple):
    """What a program tells of itself.

    Attributes:
        is_apart: whether its outputs keep the examples apart, along their first axis.
        numbers: as `Walk` has them.
        other_numbers: likewise.
    """

    is_apart: bool
    numbers: list[float]
    other_numbers: list[float]

    @classmethod
    def of(cls, closed: Any, state: PyTree, batch: Batch) -> _Found:
        walk = Walk()
        try:
            places = walk(closed, places_of(state, batch))
        except Exception:  # another version of JAX may have a primitive in another form
            return cls(is_apart=False, numbers=[], other_numbers=[])
        is_apart = all(place.kind is AxisKind.FREE or place.plain() == rows(0) for place in places)
        return cls(is_apart, walk.numbers, walk.other_numbers)

    def may_count(self, size: int) -> bool:
        """Returns whether a number may come from the size of the batch."""
        known = [size, 1 / size, math.log(size)]
        counted = [*known, size - 1, 1 / (size - 1)]
        return _has(self.numbers, known) or _has(self.other_numbers, counted)


def _has(numbers: list[float], suspects: list[float]) -> bool:
    found = np.abs(np.array(numbers, np.complex128))
    return bool(np.isclose(found[:, None], np.array(suspects), rtol=1e-5).any())


def _sized(leaf: Any, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))
