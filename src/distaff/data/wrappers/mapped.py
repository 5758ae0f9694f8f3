"""MappedLoader: applies a function to each batch of a loader."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from distaff.core.typing import Batch
from distaff.core.views.brief import brief, length
from distaff.data.loader import Loader, abandon, close_made, first_batch, in_order, num_batches


class MappedLoader:
    """Applies a function to each batch of a loader on demand.

    Use it to store compact data: keep pictures in bytes, and scale them batch by batch.

    Args:
        loader: source of the batches.
        function: `batch -> batch`. It must have no state and no randomness, since only the position
            of the loader is saved, and must return new arrays instead of modifying its batch.

    >>> loader = ArrayLoader({"x": np.arange(4, dtype=np.uint8)}, batch_size=2)
    >>> halved = MappedLoader(loader, lambda batch: {"x": batch["x"] / np.float32(2)})
    >>> [batch["x"].tolist() for batch in halved]
    [[0.0, 0.5], [1.0, 1.5]]
    """

    def __init__(self, loader: Loader, function: Callable[[Batch], Batch]) -> None:
        self.loader = loader
        self._function = function

    @property
    def arrays(self) -> Any:
        """The function of all arrays of an `ArrayLoader`, computed at each access."""
        loader: Any = self.loader
        return self._function(loader.arrays)

    def __repr__(self) -> str:
        return brief(self, repr(self.loader), length(self))

    def __len__(self) -> int:
        length = num_batches(self.loader)
        if length is None:
            name = type(self.loader).__name__
            raise TypeError(f"The number of batches of {name} is unknown: pass steps_per_epoch.")
        return length

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield self._function(batch)

    def peek(self) -> Batch:
        """Returns the next batch without consuming it."""
        return self._function(first_batch(self.loader))

    def in_order(self) -> Self | None:
        """Returns a loader of the mapped batches in the order of the data; see `Loader`."""
        loader = in_order(self.loader)
        if loader is None:
            return None
        view = copy.copy(self)
        view.loader = loader
        return view

    def abandon(self) -> None:
        """Makes the next `iter()` begin a new epoch."""
        abandon(self.loader)

    def close_made(self) -> bool:
        """Closes the loaders that the loader made itself; returns whether there were any."""
        return close_made(self.loader)

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the loader."""
        return self.loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position that `get_state` returned.

        Raises:
            BatchError: the loader does not accept the position.
        """
        self.loader.set_state(state)
