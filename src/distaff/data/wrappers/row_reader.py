"""Reader: reads a loader row by row, and saves its position within a batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax

from distaff.core.typing import Batch
from distaff.data.examples.fingerprint import fingerprint
from distaff.data.loader import (
    Loader,
    as_loader,
    canonicalize,
    close_made,
    empty_loader,
    num_examples,
)
from distaff.errors import BatchError, ChangedBatchesError


class _Held(NamedTuple):
    """A buffered batch: its number of rows and fingerprint, and the position before it."""

    batch: Batch
    size: int
    mark: int
    before: dict[str, Any]


class Reader:
    """Reads a loader row by row, or in whole batches, across epochs.

    It starts at the loader's current position, and remembers the position before the current batch,
    so the loader need not be able to go back. Rows stay buffered until they are taken, so none are
    lost if another loader fails.

    Args:
        data: a loader, or data that `as_loader` accepts.
        name: name of the loader, for errors.
        whole: whether to read whole batches, unchanged, instead of rows.
    """

    def __init__(self, data: Any, *, name: str, whole: bool = False) -> None:
        self.name, self.loader = name, as_loader(data, name=name)
        self._data, self._whole = data, whole
        self._reset()

    def position(self) -> dict[str, Any]:
        """Returns the loader's position before the current batch, and the rows used of it."""
        mark = self._buffer[0].mark if self._used else 0
        before = self._buffer[0].before if self._buffer else self._here()
        return {"loader": before, "used": self._used, "fingerprint": mark}

    def seek(self, position: Mapping[str, Any]) -> ChangedBatchesError | None:
        """Restores a result of `position`.

        Returns:
            An error if the loader reached the position, but yielded other batches than before.

        Raises:
            BatchError: the loader cannot reach the position; it keeps its own, if it can.
        """
        changed = None
        if position["loader"] != self.position()["loader"]:
            self._running = None
            with self._named():
                changed = self._move_to(position["loader"])
            self._reset()
        used = position["used"]
        if used and not self._buffer:
            self._read()
        self._used = 0
        if not used:
            return changed
        size, mark = self._buffer[0].size, self._buffer[0].mark
        if used >= size or position["fingerprint"] != mark:
            changed = ChangedBatchesError(
                f"The {self.name} loader does not yield the same batch again, of which {used} rows "
                "were used. Resume with the data that the run was started with, and seed its "
                "shuffling and augmentation."
            )
        self.take(min(used, size))
        return changed

    def look(self, count: int) -> Iterator[Batch]:
        """Yields the next `count` rows without taking them, in one part for each batch."""
        start, index = self._used, 0
        while count:
            if index == len(self._buffer):
                self._read()
            held = self._buffer[index]
            part = slice(start, start + count)
            yield jax.tree.map(lambda leaf, part=part: leaf[part], held.batch)
            count -= min(count, held.size - start)
            start, index = 0, index + 1

    def look_at_batch(self) -> tuple[Batch, int]:
        """Returns the next whole batch without taking it, and its number of rows."""
        if not self._buffer:
            self._read()
        return self._buffer[0].batch, self._buffer[0].size

    def take(self, count: int) -> None:
        """Removes rows that were looked at from the buffer."""
        self._used += count
        while self._buffer and self._used >= self._buffer[0].size:
            self._used -= self._buffer.pop(0).size

    def close_made(self) -> bool:
        """Closes the loaders made from iterables; returns whether there were any.

        A closed loader starts again, except that a one-shot iterator continues.
        """
        if self.loader is not self._data:
            self._close()
            if self._can_restart:
                self.loader = as_loader(self._data, name=self.name)
        elif not close_made(self.loader):
            return False
        self._reset()
        return True

    @property
    def _can_restart(self) -> bool:
        return self.loader is not self._data and not isinstance(self._data, Iterator)

    def _close(self) -> None:
        close = getattr(self.loader, "close", None)
        if close is not None:
            close()

    def _move_to(self, state: Mapping[str, Any]) -> ChangedBatchesError | None:
        """Moves the loader; if it cannot go back, makes a new one that reads up to the position."""
        try:
            return _set_state(self.loader, state)
        except BatchError:
            if not self._can_restart:
                raise
            restarted = as_loader(self._data, name=self.name)
            changed = _set_state(restarted, state)
            self._close()
            self.loader = restarted
            return changed

    def _reset(self) -> None:
        self._running: Iterator[Batch] | None = None
        self._buffer: list[_Held] = []
        self._used = 0
        self._state: dict[str, Any] | None = None

    def _here(self) -> dict[str, Any]:
        """Returns the position of the loader, which is after all buffered batches."""
        if self._state is None:
            self._state = dict(self.loader.get_state())
        return self._state

    def _read(self) -> None:
        """Buffers the next batch; after an error, the next call tries the same position again."""
        before = self._here()  # saved before the loader moves: it may not be able to go back
        try:
            batch = self._next()
            size = num_examples(batch, name=self.name)
        except BaseException:
            self._running = None
            with suppress(Exception):  # a Stream cannot go back
                self.loader.set_state(before)
            raise
        finally:
            self._state = None
        mark = 0
        if not self._whole:
            batch = canonicalize(batch)
            mark = fingerprint(batch)
        self._buffer.append(_Held(batch, size, mark, before))

    def _next(self) -> Batch:
        with self._named():
            if self._running is None:
                self.loader.set_state(self.loader.get_state())  # continue its epoch
                self._running = iter(self.loader)
            batch = next(self._running, None)
            if batch is None:
                self._running = iter(self.loader)
                batch = next(self._running, None)
        if batch is None:
            raise empty_loader(self.name)
        return batch

    @contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except BatchError as error:
            raise type(error)(f"the {self.name} loader: {error}") from error


def _set_state(loader: Loader, state: Mapping[str, Any]) -> ChangedBatchesError | None:
    """Moves a loader; returns the error if it reached the position with other batches."""
    try:
        loader.set_state(state)
    except ChangedBatchesError as error:
        return error
    return None
