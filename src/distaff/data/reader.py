"""Reader: a loader read row by row, that knows its position within a batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from distaff.data.fingerprint import fingerprint
from distaff.data.loader import as_held_by_jax, as_loader, num_examples
from distaff.errors import BatchError, ChangedBatchesError
from distaff.typing import Batch


class Reader:
    """Reads a loader row by row, or batch by batch, from one epoch into the next.

    It goes on from where the loader stands, and remembers where that was before the batch of which
    rows are left: a loader that cannot go back need not.

    Args:
        given: what `as_loader` takes.
        name: what errors call it.

    Attributes:
        loader: what it reads.
        is_made: whether that was made of what was given.
    """

    def __init__(self, given: Any, *, name: str) -> None:
        self.name, self.loader = name, as_loader(given, name=name)
        self.is_made = self.loader is not given
        self._forget()

    def position(self) -> dict[str, Any]:
        """Returns where the loader stood before the batch that is held, and the rows used of it."""
        if self._before is None:
            self._before = dict(self.loader.get_state())
        mark = self._mark if self._used else 0
        return {"loader": self._before, "used": self._used, "fingerprint": mark}

    def go_to(self, position: Mapping[str, Any]) -> ChangedBatchesError | None:
        """Goes to what `position` returned.

        Returns:
            What it found changed on the way, where it has come there all the same.

        Raises:
            BatchError: it does not come there; it then stays where it is, if it can.
        """
        changed = None
        if position["loader"] != self.position()["loader"]:
            self._running = None
            try:
                with self._named():
                    self.loader.set_state(position["loader"])
            except ChangedBatchesError as error:
                changed = error
            self._forget()
        used = position["used"]
        if used and self._held is None:
            self._hold()
        if used and (used >= self._size or position["fingerprint"] != self._mark):
            changed = ChangedBatchesError(
                f"The {self.name} loader does not yield the batch again of which {used} rows were "
                "used. Resume with the data that the run was started with, and seed what shuffles "
                "or augments."
            )
        if self._held is not None and used >= self._size:
            self._drop()
        else:
            self._used = used
        return changed

    def rows(self, count: int) -> Iterator[Batch]:
        """Yields the next `count` rows, in one part for each batch that they are of."""
        while count:
            if self._held is None:
                self._hold()
            part = slice(self._used, self._used + count)
            rows = jax.tree.map(lambda leaf, part=part: leaf[part], self._held)
            taken = min(count, self._size - self._used)
            self._used += taken
            count -= taken
            if self._used == self._size:
                self._drop()
            yield rows

    def batch(self) -> Batch:
        """Returns the next batch, whole."""
        batch = self._next()
        self._before = None
        return batch

    def close(self) -> None:
        """Closes the loader, which begins a new epoch then."""
        self._forget()
        close = getattr(self.loader, "close", None)
        if close is not None:
            close()

    def _forget(self) -> None:
        self._running: Iterator[Batch] | None = None
        self._drop()

    def _drop(self) -> None:
        self._held: Batch | None = None
        self._used = self._size = self._mark = 0
        self._before: dict[str, Any] | None = None

    def _hold(self) -> None:
        self.position()  # kept before the loader moves on: it may not be able to go back
        batch = self._next()
        self._size = num_examples(batch, name=self.name)
        self._held = jax.tree.map(as_held_by_jax, batch)
        self._mark = fingerprint(self._held)

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
