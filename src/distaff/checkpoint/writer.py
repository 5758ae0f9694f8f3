"""One thread that writes checkpoints, and the line of those that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from distaff.typing import PyTree


class Save(NamedTuple):
    """A checkpoint to be written.

    Attributes:
        step: completed optimizer updates.
        arrays: on the host, and changed by nobody.
        info: strict JSON.
        num_bytes: of the arrays.
    """

    step: int
    arrays: PyTree
    info: dict[str, Any]
    num_bytes: int


class Writer:
    """Writes saves one after the other, in a thread that lives while there is something to write.

    After a failure nothing more is written until `failure` was asked.

    Args:
        write: writes one save. What it raises is kept for `failure`.
    """

    def __init__(self, write: Callable[[Save], None]) -> None:
        self._write = write
        self._changed = threading.Condition()
        self._line: list[Save] = []  # the first one is being written
        self._failure: tuple[int, BaseException] | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of the saves that wait, and of the one being written."""
        with self._changed:
            return sum(save.num_bytes for save in self._line)

    def steps(self) -> tuple[int, ...]:
        """Returns the steps of the saves that wait, and of the one being written."""
        with self._changed:
            return tuple(save.step for save in self._line)

    def put(self, save: Save, kept: Set[int]) -> None:
        """Puts a save at the end of the line, and takes those out of it that are not kept.

        Args:
            save: the newest save.
            kept: steps of those that are not outdated by it; the one being written goes on.
        """
        with self._changed:
            if self._failure is not None:
                return
            waiting = [each for each in self._line[1:] if each.step in kept]
            idle = not self._line
            self._line = [*self._line[:1], *waiting, save]
            if idle:
                # Not a daemon: Python waits for it before it ends.
                threading.Thread(target=self._run, args=(save,), name="checkpoint").start()

    def wait(self) -> None:
        """Returns when the line is empty."""
        with self._changed:
            self._changed.wait_for(lambda: not self._line)

    def failure(self) -> tuple[int, BaseException] | None:
        """Returns, once, the step that could not be written and why; None where all is well."""
        with self._changed:
            failure, self._failure = self._failure, None
            return failure

    def _run(self, save: Save | None) -> None:
        while save is not None:
            try:
                self._write(save)
            except BaseException as error:
                with self._changed:
                    self._failure, self._line = (save.step, error), []
            with self._changed:
                del self._line[:1]
                self._changed.notify_all()
                save = self._line[0] if self._line else None
