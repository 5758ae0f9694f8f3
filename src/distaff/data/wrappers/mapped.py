"""MappedLoader: a loader whose batches go through a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from distaff.core.typing import Batch
from distaff.data.loader import (
    Loader,
    abandon,
    close_made,
    first_batch,
    in_order,
    num_batches,
    over,
)


class MappedLoader:
    """Applies a function to each batch of a loader, when the batch is asked for.

    What takes little memory in the loader may thus be large in the batch: pictures are kept in
    bytes and scaled batch by batch.

    Args:
        loader: where the batches come from.
        function: `batch -> batch`. It has no memory and no randomness of its own, so that a
            position is the loader's alone, and makes new arrays rather than writing to its batch.

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
        """What the function makes of all arrays of an `ArrayLoader`; made anew at each call."""
        loader: Any = self.loader
        return self._function(loader.arrays)

    def __len__(self) -> int:
        length = num_batches(self.loader)
        if length is None:
            raise TypeError(f"{type(self.loader).__name__} does not know its number of batches.")
        return length

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield self._function(batch)

    def peek(self) -> Batch:
        """Returns the first batch to come, without handing it out."""
        return self._function(first_batch(self.loader))

    def in_order(self) -> Self | None:
        """Returns it over the loader in the data's own order; see `Loader`."""
        return over(self, in_order(self.loader))

    def abandon(self) -> None:
        """Lets the next `iter()` begin a new epoch."""
        abandon(self.loader)

    def close_made(self) -> bool:
        """Closes what the loader has made itself; returns whether that was anything."""
        return close_made(self.loader)

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the loader."""
        return self.loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `get_state` returned.

        Raises:
            BatchError: the loader does not take it.
        """
        self.loader.set_state(state)
