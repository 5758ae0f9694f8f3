"""Place: the axis of an array along which the examples of a batch lie."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

import numpy as np


class AxisKind(Enum):
    """How an array depends on the examples of a batch."""

    FREE = auto()
    """Independent of all examples."""
    ROWS = auto()
    """Along one axis, each entry depends on its own example alone."""
    SINGLE = auto()
    """The whole array depends on a single example, inside a loop over examples."""
    MIXED = auto()
    """May depend on several examples at once."""


class Place(NamedTuple):
    """The position of the examples in an array.

    Attributes:
        kind: how the array depends on the examples.
        axis: the axis of the examples; for `ROWS` only.
        block: number of consecutive entries of that axis per example.
        value: the array itself, if it is a small constant.
        own: columns of the last axis that hold the index of their own example.
    """

    kind: AxisKind
    axis: int = 0
    block: int = 1
    value: np.ndarray | None = None
    own: frozenset[int] = frozenset()

    @property
    def has_examples(self) -> bool:
        """Whether the array depends on any example."""
        return self.kind is not AxisKind.FREE

    def plain(self) -> Place:
        """Returns the place without facts about values."""
        return self._replace(value=None, own=frozenset())


FREE, SINGLE, MIXED = Place(AxisKind.FREE), Place(AxisKind.SINGLE), Place(AxisKind.MIXED)


def rows(axis: int, block: int = 1) -> Place:
    """Returns the place of an array with the examples along an axis."""
    return Place(AxisKind.ROWS, int(axis), int(block))


def combined(places: Iterable[Place]) -> Place:
    """Returns the place of an elementwise result; mixed if its operands' places differ."""
    found = {place.plain() for place in places if place.has_examples}
    if not found:
        return FREE
    return found.pop() if len(found) == 1 else MIXED
