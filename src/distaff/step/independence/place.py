"""Place: where in an array the examples of a batch lie, and what becomes of it in another one."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

import numpy as np


class AxisKind(Enum):
    """How an array depends on the examples of a batch."""

    FREE = auto()
    """It depends on none."""
    ROWS = auto()
    """Along one axis, each entry depends on its own example alone."""
    SINGLE = auto()
    """All of it depends on one example alone, inside a loop over examples."""
    MIXED = auto()
    """It may depend on several examples at once."""


class Place(NamedTuple):
    """Where an array keeps the examples.

    Attributes:
        kind: how it depends on them.
        axis: the axis of the examples; only of `ROWS`.
        block: consecutive entries of that axis that belong to one example.
        value: the array itself, where it is a small constant.
        own: columns of the last axis that hold the number of the example they belong to.
    """

    kind: AxisKind
    axis: int = 0
    block: int = 1
    value: np.ndarray | None = None
    own: frozenset[int] = frozenset()

    @property
    def has_examples(self) -> bool:
        """Whether it depends on any example."""
        return self.kind is not AxisKind.FREE

    def plain(self) -> Place:
        """Returns it without what is known of its values."""
        return self._replace(value=None, own=frozenset())


FREE, SINGLE, MIXED = Place(AxisKind.FREE), Place(AxisKind.SINGLE), Place(AxisKind.MIXED)


def rows(axis: int, block: int = 1) -> Place:
    """Returns the place of an array that has the examples along an axis."""
    return Place(AxisKind.ROWS, int(axis), int(block))


def combined(places: Iterable[Place]) -> Place:
    """Returns the place of what is made of arrays entry by entry: all that have rows agree."""
    found = {place.plain() for place in places if place.has_examples}
    if not found:
        return FREE
    return found.pop() if len(found) == 1 else MIXED
