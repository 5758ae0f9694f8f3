"""Limited: yields only the first batches of each epoch, to try out code on little data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Self

import jax
import numpy as np

from distaff.core.typing import Batch
from distaff.core.views.brief import brief, length
from distaff.data.loader import Loader, abandon, close_made, first_batch, in_order, num_batches
from distaff.errors import BatchError


class Limited:
    """A loader whose epochs end after some batches; the rest of each epoch is abandoned.

    Args:
        loader: source of the batches.
        num_batches: maximal number of batches in an epoch, at least 1.

    >>> [batch.tolist() for batch in Limited(ArrayLoader(np.arange(6), batch_size=2), 2)]
    [[0, 1], [2, 3]]
    """

    def __init__(self, loader: Loader, num_batches: int) -> None:
        self.loader, self._most = loader, num_batches
        self._taken, self._is_over = 0, False
        self._resumed = self._is_behind = False

    def __repr__(self) -> str:
        return brief(self, repr(self.loader), length(self))

    def __len__(self) -> int:
        length = num_batches(self.loader)
        return self._most if length is None else min(length, self._most)

    def __iter__(self) -> Iterator[Batch]:
        # `set_state` restored the end of an epoch: the loader would continue it.
        if self._is_behind:
            abandon(self.loader)
        left = self._most - (self._taken if self._resumed else 0)
        self._taken, self._is_over = self._most - left, False
        self._is_behind, self._resumed = not left, False
        if left:
            yield from self._some(left)
        self._taken, self._is_over = 0, self._taken == self._most

    def _some(self, count: int) -> Iterator[Batch]:
        batches: Any = iter(self.loader)
        try:
            for batch in islice(batches, count):
                self._taken += 1
                yield batch
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def peek(self) -> Batch:
        """Returns the next batch without consuming it."""
        return first_batch(self.loader)

    def in_order(self) -> Self | None:
        """Returns a loader of the first batches in the order of the data; see `Loader`."""
        view = in_order(self.loader)
        return None if view is None else type(self)(view, self._most)

    def close_made(self) -> bool:
        """Closes the loaders that the loader made itself; returns whether there were any."""
        return close_made(self.loader)

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the loader, and the number of batches yielded in the epoch."""
        inner = dict(self.loader.get_state())
        return {"taken": self._taken, "is_over": int(self._is_over), "loader": inner}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position that `get_state` returned.

        Raises:
            BatchError: the position was saved by another loader.
        """
        taken, is_over = state.get("taken"), state.get("is_over")
        fits = type(taken) is int and 0 <= taken <= self._most and is_over in (0, 1)
        if state.keys() != {"taken", "is_over", "loader"} or not fits:
            raise BatchError(
                f"An epoch is limited to {self._most} batches; the saved position is "
                f"{dict(state)}. Resume with the same limit, or start a new run."
            )
        self.loader.set_state(state["loader"])
        self._taken, self._is_over = int(state["taken"]), bool(is_over)
        self._resumed, self._is_behind = not is_over, bool(is_over)


def limited(loader: Loader, num_batches: int | None) -> Loader:
    """Limits the number of batches in an epoch; None for no limit."""
    return loader if num_batches is None else Limited(loader, num_batches)


def unlimited(loader: Loader) -> Loader:
    """Returns the loader inside a `Limited`; other loaders are returned unchanged."""
    return loader.loader if isinstance(loader, Limited) else loader


def first_batches(loader: Loader, count: int) -> list[Batch]:
    """Returns copies of the next `count` batches, or fewer, and restores the position if possible.

    A loader that cannot go back, such as a `Stream`, continues after these batches.
    """
    state = loader.get_state()
    batches = [jax.tree.map(np.array, batch) for batch in islice(loader, count)]
    try:
        loader.set_state(state)
    except BatchError:
        loader.set_state(loader.get_state())
    return batches
