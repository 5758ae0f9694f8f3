"""Positioned: a loader over data that can be started at any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from distaff.core.typing import Batch
from distaff.errors import BatchError

_EPOCH_END = object()
_KEYS = {"epoch", "batch", "source"}


class Restartable(Protocol):
    """Data that can be iterated from a saved position, in the terms of its own library."""

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        """Returns the batches of an epoch, or the rest of it; only one iteration runs at a time.

        Args:
            epoch: number of the epoch, from 0.
            batch: number of batches to skip.
            saved: result of `position` after the last skipped batch; at the start of an epoch, its
                result at the end of the previous one. None before the first batch.
        """
        ...

    def position(self) -> Any:
        """Returns the position after the last yielded batch, as JSON values."""
        ...


class FirstEpoch:
    """Data whose first epoch is repeated."""

    def __init__(self, source: Restartable) -> None:
        self._source = source
        self.has_one_order = bool(getattr(source, "has_one_order", False))

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        """Returns the batches of the first epoch, or the rest of it."""
        return self._source.start(0, batch, saved)

    def position(self) -> Any:
        """Returns the position of the source."""
        return self._source.position()


class Positioned:
    """A loader over data of another library that restores a position without reading up to it.

    Args:
        source: the data.
        length: number of batches in an epoch; None if unknown.
        identity: JSON values that must be equal to restore a position, such as the batch size.
        num_shapes: number of distinct shapes of the batches.
        in_order: returns a loader of the same data for evaluation; see `Loader`. Without it, an
            evaluation reads the next epoch, and then restores the position.
    """

    def __init__(
        self,
        source: Restartable,
        *,
        length: int | None = None,
        identity: Mapping[str, Any] | None = None,
        num_shapes: int = 1,
        in_order: Callable[[], Any] | None = None,
    ) -> None:
        self.num_shapes, self._in_order = num_shapes, in_order
        self._source, self._length, self._identity = source, length, dict(identity or {})
        self._epoch, self._batch, self._saved = 0, 0, None
        self._running: Iterator[Batch] | None = None
        self._is_new = self._resumed = False
        self._ahead: list[tuple[Batch, dict[str, Any]]] = []
        self._place: dict[str, Any] | None = None

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("The number of batches is unknown: pass steps_per_epoch.")
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self._batch and not self._resumed:
            self._go_to(self._epoch + 1, 0, None)
        self._resumed = False
        while (batch := self._pull()) is not _EPOCH_END:
            yield batch

    @property
    def has_one_order(self) -> bool:
        """Whether the source says that equal sources have the same order; see `Loader`."""
        return bool(getattr(self._source, "has_one_order", False))

    def in_order(self) -> Any:
        """Returns a loader for evaluation, or None; see `Loader`."""
        return None if self._in_order is None else self._in_order()

    def peek(self) -> Batch | None:
        """Returns the next batch without consuming it, or None if the data is empty."""
        if self._ahead:
            return self._ahead[0][0]
        state, resumed = self.get_state(), self._resumed
        batch = self._pull()
        if batch is not _EPOCH_END:
            self._batch -= 1
            self._ahead = [(batch, state)]
            return batch
        # Nothing is left of a resumed epoch: return the first batch of the next one.
        batch = self._pull()
        self._go_to(state["epoch"], state["batch"], state["source"])
        self._resumed = resumed
        return None if batch is _EPOCH_END else batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last yielded batch, as JSON values."""
        if self._ahead:
            return self._ahead[0][1]
        if self._place is None:
            # Before the first batch, the position of a library may be undefined.
            is_inside = self._running is not None and self._batch and not self._is_new
            saved = self._source.position() if is_inside else self._saved
            numbers = {"epoch": self._epoch, "batch": self._batch}
            self._place = {**numbers, "source": saved, **self._identity}
        return dict(self._place)

    def identity(self) -> dict[str, Any]:
        """Returns the values that must be equal to restore a position."""
        return dict(self._identity)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position at once; the next `iter()` yields the rest of that epoch.

        Args:
            state: the result of `get_state` of a loader of the same data.

        Raises:
            BatchError: the state is of other data, or the library does not accept it.
        """
        found = {name: state.get(name) for name in self._identity}
        numbers = [state.get("epoch"), state.get("batch")]
        fits = state.keys() == _KEYS | found.keys() and found == self._identity
        if not fits or not all(type(number) is int and number >= 0 for number in numbers):
            raise BatchError(
                "A position can only be restored in a loader with the same options and data; "
                f"saved: {dict(state)}, this loader: {self.get_state()}. Make the loader with the "
                "saved options and data, or start a new run."
            )
        if dict(state) != self.get_state():
            self._go_to(state["epoch"], state["batch"], state["source"])
            self._start()
        self._resumed = True

    def close(self) -> None:
        """Stops the running iteration, such as its workers, and abandons the epoch."""
        if self._running is not None:
            self._go_to(self._epoch + 1, 0, None)

    def _pull(self) -> Any:
        """Consumes and returns the next batch, or `_EPOCH_END`."""
        batch: Any = self._ahead.pop()[0] if self._ahead else self._read()
        self._is_new, self._place = False, None
        if batch is not _EPOCH_END:
            self._batch += 1
        elif self._batch:
            self._go_to(self._epoch + 1, 0, self._source.position())
        else:
            self._running = None
        return batch

    def _read(self) -> Any:
        """Reads the next batch; after an error, the next call tries the same position again."""
        place = self.get_state()
        try:
            return next(self._start(), _EPOCH_END)
        except BaseException:
            self._go_to(place["epoch"], place["batch"], place["source"])
            raise

    def _start(self) -> Iterator[Batch]:
        if self._running is None:
            self._is_new = True
            try:
                self._running = iter(self._source.start(self._epoch, self._batch, self._saved))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise BatchError(
                    f"The data could not be started at epoch {self._epoch}, batch {self._batch}: "
                    f"{error!r}. Use the number of workers, the batch size and the data that the "
                    "position was saved with, or start a new run."
                ) from error
        return self._running

    def _go_to(self, epoch: int, batch: int, saved: Any) -> None:
        close = getattr(self._running, "close", None)
        self._running, self._ahead, self._place = None, [], None
        self._epoch, self._batch, self._saved = epoch, batch, saved
        if close is not None:
            with suppress(ValueError):  # another thread is still reading
                close()
