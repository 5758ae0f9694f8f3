"""Reader: a loader read row by row, that knows its position within a batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax

from distaff.core.typing import Batch
from distaff.data.examples.fingerprint import fingerprint
from distaff.data.loader import Loader, as_loader, close_made, held_by_jax, num_examples
from distaff.errors import BatchError, ChangedBatchesError


class _Held(NamedTuple):
    """A batch in line: its arrays, their rows and fingerprint, and the position before it."""

    batch: Batch
    size: int
    mark: int
    before: dict[str, Any]


class Reader:
    """Reads a loader row by row, or batch by batch, from one epoch into the next.

    It goes on from where the loader stands, and remembers where that was before the batch of which
    rows are left: a loader that cannot go back need not. What is looked at stays in line until it
    is taken, so that nothing is lost where another loader fails meanwhile.

    Args:
        given: what `as_loader` takes.
        name: what errors call it.
        whole: whether batches are read as they are, and not by row.

    Attributes:
        loader: what it reads.
    """

    def __init__(self, given: Any, *, name: str, whole: bool = False) -> None:
        self.name, self.loader = name, as_loader(given, name=name)
        self._given, self._whole = given, whole
        self._forget()

    def position(self) -> dict[str, Any]:
        """Returns where the loader stood before the batch that is held, and the rows used of it."""
        mark = self._line[0].mark if self._used else 0
        before = self._line[0].before if self._line else self._here()
        return {"loader": before, "used": self._used, "fingerprint": mark}

    def seek(self, position: Mapping[str, Any]) -> ChangedBatchesError | None:
        """Goes to what `position` returned.

        Returns:
            What it found changed on the way, where it has come there all the same.

        Raises:
            BatchError: it does not come there; it then stays where it is, if it can.
        """
        changed = None
        if position["loader"] != self.position()["loader"]:
            self._running = None
            with self._named():
                changed = self._move_to(position["loader"])
            self._forget()
        used = position["used"]
        if used and not self._line:
            self._hold()
        self._used = 0
        if not used:
            return changed
        size, mark = self._line[0].size, self._line[0].mark
        if used >= size or position["fingerprint"] != mark:
            changed = ChangedBatchesError(
                f"The {self.name} loader does not yield the batch again of which {used} rows were "
                "used. Resume with the data that the run was started with, and seed what shuffles "
                "or augments."
            )
        self.take(min(used, size))
        return changed

    def look(self, count: int) -> Iterator[Batch]:
        """Yields the next `count` rows, in one part for each batch that they are of."""
        start, index = self._used, 0
        while count:
            if index == len(self._line):
                self._hold()
            held = self._line[index]
            part = slice(start, start + count)
            yield jax.tree.map(lambda leaf, part=part: leaf[part], held.batch)
            count -= min(count, held.size - start)
            start, index = 0, index + 1

    def look_at_batch(self) -> tuple[Batch, int]:
        """Returns the next batch, whole, and how many rows it has."""
        if not self._line:
            self._hold()
        return self._line[0].batch, self._line[0].size

    def take(self, count: int) -> None:
        """Takes rows that were looked at out of the line."""
        self._used += count
        while self._line and self._used >= self._line[0].size:
            self._used -= self._line.pop(0).size

    def close_made(self) -> bool:
        """Closes what was made of an iterable, here or further in; returns whether that was any.

        It begins anew then: from the start, unless that was an iterator, which goes on.
        """
        if self.loader is not self._given:
            self._close()
            if self._begins_anew:
                self.loader = as_loader(self._given, name=self.name)
        elif not close_made(self.loader):
            return False
        self._forget()
        return True

    @property
    def _begins_anew(self) -> bool:
        return self.loader is not self._given and not isinstance(self._given, Iterator)

    def _close(self) -> None:
        close = getattr(self.loader, "close", None)
        if close is not None:
            close()

    def _move_to(self, state: Mapping[str, Any]) -> ChangedBatchesError | None:
        """Moves the loader; where it cannot go back, a new one is made that is read up to there."""
        try:
            return _moved(self.loader, state)
        except BatchError:
            if not self._begins_anew:
                raise
            anew = as_loader(self._given, name=self.name)
            changed = _moved(anew, state)
            self._close()
            self.loader = anew
            return changed

    def _forget(self) -> None:
        self._running: Iterator[Batch] | None = None
        self._line: list[_Held] = []
        self._used = 0
        self._stands: dict[str, Any] | None = None

    def _here(self) -> dict[str, Any]:
        """Returns the position of the loader, which is behind all that is in line."""
        if self._stands is None:
            self._stands = dict(self.loader.get_state())
        return self._stands

    def _hold(self) -> None:
        """Puts the next batch in line; after an error the place is the one before it."""
        before = self._here()  # kept before the loader moves on: it may not be able to go back
        try:
            batch = self._next()
            size = num_examples(batch, name=self.name)
        except BaseException:
            self._running = None
            with suppress(Exception):  # a Stream goes on from where it is
                self.loader.set_state(before)
            raise
        finally:
            self._stands = None
        mark = 0
        if not self._whole:
            batch = held_by_jax(batch)
            mark = fingerprint(batch)
        self._line.append(_Held(batch, size, mark, before))

    def _next(self) -> Batch:
        with self._named():
            if self._running is None:
                self.loader.set_state(self.loader.get_state())  # to go on from where it stands
                self._running = iter(self.loader)
            batch = next(self._running, None)
            if batch is None:
                self._running = iter(self.loader)
                batch = next(self._running, None)
        if batch is None:
            raise BatchError(
                f"The {self.name} loader must yield at least one batch in an epoch; it yields "
                "none. Check its source, its filters, and whether it was already used up."
            )
        return batch

    @contextmanager
    def _named(self) -> Generator[None]:
        try:
            yield
        except BatchError as error:
            raise type(error)(f"the {self.name} loader: {error}") from error


def _moved(loader: Loader, state: Mapping[str, Any]) -> ChangedBatchesError | None:
    """Moves a loader; returns the error of one that has come there all the same."""
    try:
        loader.set_state(state)
    except ChangedBatchesError as error:
        return error
    return None
