"""Positioned: a loader over data that knows its own position, and can be started anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from distaff.core.typing import Batch
from distaff.errors import BatchError

_EPOCH_END = object()
_KEYS = {"epoch", "batch", "source"}


class Restartable(Protocol):
    """Data of another library, which it can iterate from a position in the library's own terms."""

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        """Returns the batches of an epoch, or the rest of it; one iteration runs at a time.

        Args:
            epoch: which one, counted from 0.
            batch: how many batches of it are left out.
            saved: what `position` returned after the last of them; at the start of an epoch, what
                it returned at the end of the one before. None where nothing was handed out before.
        """
        ...

    def position(self) -> Any:
        """Returns the position after the last batch handed out, of values that JSON has."""
        ...


class FirstEpoch:
    """Data of which every epoch is like the first one.

    Args:
        source: the data.
    """

    def __init__(self, source: Restartable) -> None:
        self._source = source

    def start(self, epoch: int, batch: int, saved: Any) -> Iterator[Batch]:
        """Returns the batches of the first epoch, or the rest of it."""
        return self._source.start(0, batch, saved)

    def position(self) -> Any:
        """Returns the position after the last batch handed out, of values that JSON has."""
        return self._source.position()


class Positioned:
    """A loader over data of another library, which goes to a position without reading up to it.

    Args:
        source: the data.
        length: batches in an epoch; None where that is not known.
        identity: facts that a position is only good with, of values that JSON has.
        num_shapes: as `distaff.data.num_shapes` tells of loaders.
        in_order: makes a loader of the same data to evaluate on; see `Loader`. Without it, an
            evaluation reads the next epoch, and goes back to where it was.
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
            raise TypeError("The number of batches is not known: pass steps_per_epoch.")
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self._batch and not self._resumed:
            self._go_to(self._epoch + 1, 0, None)
        self._resumed = False
        while (batch := self._pull()) is not _EPOCH_END:
            yield batch

    def in_order(self) -> Any:
        """Returns a loader to evaluate on, or None; see `Loader`."""
        return None if self._in_order is None else self._in_order()

    def peek(self) -> Batch | None:
        """Returns the next batch, which stays in line, or None where there is none."""
        if self._ahead:
            return self._ahead[0][0]
        state, resumed = self.get_state(), self._resumed
        batch = self._pull()
        if batch is not _EPOCH_END:
            self._batch -= 1
            self._ahead = [(batch, state)]
            return batch
        # Of a resumed epoch nothing was left: what follows is the one after it.
        batch = self._pull()
        self._go_to(state["epoch"], state["batch"], state["source"])
        self._resumed = resumed
        return None if batch is _EPOCH_END else batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was handed out, fit for JSON."""
        if self._ahead:
            return self._ahead[0][1]
        if self._place is None:
            # Before its first batch, a library may not know its position.
            is_inside = self._running is not None and self._batch and not self._is_new
            saved = self._source.position() if is_inside else self._saved
            numbers = {"epoch": self._epoch, "batch": self._batch}
            self._place = {**numbers, "source": saved, **self._identity}
        return dict(self._place)

    def identity(self) -> dict[str, Any]:
        """Returns the facts that a position is only good with."""
        return dict(self._identity)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position at once; the next `iter()` yields the rest of that epoch.

        Args:
            state: what `get_state` returned, of a loader of the same data.

        Raises:
            BatchError: it is of other data, or the library refuses it.
        """
        found = {name: state.get(name) for name in self._identity}
        numbers = [state.get("epoch"), state.get("batch")]
        fits = state.keys() == _KEYS | found.keys() and found == self._identity
        if not fits or not all(type(number) is int and number >= 0 for number in numbers):
            raise BatchError(
                "A position can be restored only in a loader like the one that saved it; "
                f"saved: {dict(state)}, this loader: {self.get_state()}. Make the loader with the "
                "saved options and data, or start a new run."
            )
        if dict(state) != self.get_state():
            self._go_to(state["epoch"], state["batch"], state["source"])
            self._start()
        self._resumed = True

    def close(self) -> None:
        """Ends what the library has running, such as workers; a new epoch begins anew."""
        if self._running is not None:
            self._go_to(self._epoch + 1, 0, None)

    def _pull(self) -> Any:
        """Returns the next batch, or `_EPOCH_END`, and counts it."""
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
        """Reads on; after an error the place is the one before it, where reading begins again."""
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
                    f"{error!r}. Give them the number of workers, the batch size and the data that "
                    "the position was saved with, or start a new run."
                ) from error
        return self._running

    def _go_to(self, epoch: int, batch: int, saved: Any) -> None:
        close = getattr(self._running, "close", None)
        self._running, self._ahead, self._place = None, [], None
        self._epoch, self._batch, self._saved = epoch, batch, saved
        if close is not None:
            with suppress(ValueError):  # a thread that hangs in the source is left alone
                close()
