"""Grouped: collects examples in groups, and makes batches of the groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from distaff.core.typing import Batch
from distaff.data.examples.examples import Examples
from distaff.data.examples.order import Order
from distaff.data.sequences.sequences import SequencePart
from distaff.errors import BatchError


class Piece(NamedTuple):
    """A part of an example: `part` is the `number`-th part of example `index`."""

    index: int
    number: int
    part: SequencePart


@dataclasses.dataclass
class Group:
    """Pieces that belong together, and the sum of their lengths.

    `num_batches` is the number of batches made of this group in the epoch; after a resume it is
    unknown, and 1.
    """

    pieces: list[Piece] = dataclasses.field(default_factory=list)
    length: int = 0
    num_batches: int = 0

    def add(self, piece: Piece) -> None:
        """Adds a piece."""
        self.pieces.append(piece)
        self.length += piece.part.length


class Grouping(Protocol):
    """Assigns pieces to groups, and makes batches of groups. It has no state."""

    def empty(self) -> list[Group]:
        """Returns the groups at the start of an epoch."""
        ...

    def parts(self, index: int, example: Any) -> Sequence[SequencePart]:
        """Returns the parts of an example, or none to omit it. Must be deterministic."""
        ...

    def put(self, groups: list[Group], piece: Piece) -> Batch | None:
        """Adds a piece to one of the groups; returns a batch if one is full."""
        ...

    def rest(self, groups: list[Group]) -> Iterator[Batch]:
        """Yields the last batches of an epoch, and removes them from the groups."""
        ...


class Grouped:
    """Batches of grouped examples, as a source for `Positioned`.

    A position is the number of examples read, and the pieces in the groups, which are read again
    when the position is restored.
    """

    has_one_order = True

    def __init__(self, examples: Examples, order: Order, grouping: Grouping) -> None:
        self._examples, self._order, self._grouping = examples, order, grouping
        self._groups: list[Group] = grouping.empty()
        self._num_read = self._num_parts = 0

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        """Returns the batches of an epoch, or the rest of it."""
        self._num_read = self._num_parts = 0
        self._groups = self._grouping.empty()
        if batch:
            self._num_read, self._num_parts = saved["examples"], saved["parts"]
            self._groups = self._held(saved["groups"])
        return self._read(epoch, bool(batch))

    def position(self) -> dict[str, Any]:
        """Returns the number of examples read, of parts of the next one, and the groups."""
        groups = [[[piece.index, piece.number] for piece in g.pieces] for g in self._groups]
        return {"examples": self._num_read, "parts": self._num_parts, "groups": groups}

    def _held(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[Group]:
        """Reads the pieces in the groups of a position, each example once and in order."""
        indices = sorted({index for group in groups for index, _ in group})
        parts = {index: self._grouping.parts(index, self._examples[index]) for index in indices}
        held = [Group(num_batches=1) for _ in groups]
        for group, pieces in zip(held, groups, strict=True):
            for index, number in pieces:
                group.add(Piece(index, number, parts[index][number]))
        return held

    def _read(self, epoch: int, has_batch: bool) -> Iterator[Batch]:
        for index in self._order.epoch(epoch, self._num_read):
            parts = self._grouping.parts(index, self._examples[index])
            for number in range(self._num_parts, len(parts)):
                self._num_parts = number + 1
                batch = self._grouping.put(self._groups, Piece(index, number, parts[number]))
                if batch is not None:
                    has_batch = True
                    yield batch
            self._num_read, self._num_parts = self._num_read + 1, 0
        for batch in self._grouping.rest(self._groups):
            has_batch = True
            yield batch
        if not has_batch:
            raise BatchError(
                f"The examples must fill at least one batch; {len(self._examples)} examples fill "
                "none, or are all too long. Lower batch_size, or keep short batches with "
                "remainder='keep'."
            )
