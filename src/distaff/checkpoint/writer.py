"""One thread that writes checkpoints, and the line of those that wait for it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from distaff.core.typing import PyTree


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


_PAUSE_SECONDS = 1.0
"""From the begin of one write to that of the next: a loop of short epochs is not slowed by them."""


class Writer:
    """Writes saves one after the other, in a thread that lives while there is something to write.

    Writes begin a pause apart, unless somebody waits for them. After a failure nothing more is
    written until `failure` was asked, unless it `goes_on`.

    Args:
        write: writes one save. What it raises is kept for `failure`.
        pause: seconds.
        goes_on: whether saves that wait are written after a failure, and new ones taken.

    Attributes:
        failures: steps that could not be written and why; `failure` takes the next one.
    """

    def __init__(
        self,
        write: Callable[[Save], None],
        pause: float = _PAUSE_SECONDS,
        *,
        goes_on: bool = False,
    ) -> None:
        self._write, self._pause, self._goes_on = write, pause, goes_on
        self._begun, self._num_waiting = -math.inf, 0
        self._changed = threading.Condition()
        self._line: list[Save] = []
        self._is_writing = False  # the first one of them
        self.failures: list[tuple[int, BaseException]] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of the saves that wait, and of the one being written."""
        with self._changed:
            return sum(save.num_bytes for save in self._line)

    def steps(self) -> tuple[int, ...]:
        """Returns the steps of the saves that wait, and of the one being written."""
        with self._changed:
            return tuple(save.step for save in self._line)

    def info(self, step: int) -> dict[str, Any] | None:
        """Returns the `info` of the last save of a step that waits; None if none does."""
        with self._changed:
            return next((each.info for each in self._line[::-1] if each.step == step), None)

    def put(self, save: Save, kept: Set[int]) -> None:
        """Puts a save at the end of the line, and takes those out of it that are not kept.

        Args:
            save: the newest save.
            kept: steps of those that are not outdated by it; the one being written goes on.
        """
        with self._changed:
            if self.failures and not self._goes_on:
                return
            waiting = [each for each in self._line[self._is_writing :] if each.step in kept]
            idle = not self._line
            self._line = [*self._line[: self._is_writing], *waiting, save]
            if idle:
                # Not a daemon: Python waits for it before it ends.
                threading.Thread(target=self._run, name="checkpoint").start()

    def wait(self) -> None:
        """Returns when the line is empty; writes make no pause meanwhile."""
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._line)
            self._num_waiting -= 1

    def failure(self) -> tuple[int, BaseException] | None:
        """Returns, once, the next step that could not be written and why; None after the last."""
        with self._changed:
            return self.failures.pop(0) if self.failures else None

    def _run(self) -> None:
        while (save := self._next()) is not None:
            try:
                self._write(save)
            except BaseException as error:
                self._note(save.step, error)
                if not self._goes_on:
                    return

    def _note(self, step: int, error: BaseException) -> None:
        """Keeps a failure, and empties the line where it does not go on."""
        with self._changed:
            self.failures.append((step, error))
            if not self._goes_on:
                self._line, self._is_writing = [], False
                self._changed.notify_all()

    def _next(self) -> Save | None:
        """Takes the save that was written out of the line, and returns the next one in its time."""
        with self._changed:
            if self._is_writing:
                del self._line[:1]
                self._is_writing = False
                self._changed.notify_all()
            if not self._line:
                return None
            pause = self._begun + self._pause - time.monotonic()
            self._changed.wait_for(lambda: self._num_waiting > 0, timeout=max(pause, 0.0))
            self._begun, self._is_writing = time.monotonic(), True
            return self._line[0]
