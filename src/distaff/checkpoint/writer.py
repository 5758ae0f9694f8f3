"""A queue of checkpoints, and the thread that writes them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from distaff.core.typing import PyTree


class Save(NamedTuple):
    """A checkpoint to write.

    Attributes:
        step: completed optimizer updates.
        arrays: immutable arrays on the host.
        info: strict JSON.
        num_bytes: size of the arrays.
    """

    step: int
    arrays: PyTree
    info: dict[str, Any]
    num_bytes: int


_PAUSE_SECONDS = 1.0
"""Minimum time between the starts of two writes, so that they do not slow down short epochs."""


class Writer:
    """Writes saves one at a time, in a thread that lives while the queue is not empty.

    Writes start at least `pause` seconds apart, unless a caller waits for them.

    Args:
        write: writes one save; `failure` returns its exceptions.
        pause: seconds.
        goes_on: whether to write further saves after a failure; if False, the queue is emptied and
            new saves are ignored until `failure` is called.

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
        """The size of the saves in the queue, including the one being written."""
        with self._changed:
            return sum(save.num_bytes for save in self._line)

    def steps(self) -> tuple[int, ...]:
        """Returns the steps of the saves in the queue, including the one being written."""
        with self._changed:
            return tuple(save.step for save in self._line)

    def info(self, step: int) -> dict[str, Any] | None:
        """Returns the `info` of the last save of a step in the queue; None without one."""
        with self._changed:
            return next((each.info for each in self._line[::-1] if each.step == step), None)

    def put(self, save: Save, kept: Set[int]) -> None:
        """Appends a save to the queue, and removes waiting saves whose step is not in `kept`."""
        with self._changed:
            if self.failures and not self._goes_on:
                return
            waiting = [each for each in self._line[self._is_writing :] if each.step in kept]
            idle = not self._line
            self._line = [*self._line[: self._is_writing], *waiting, save]
            if idle:
                # Not a daemon: Python waits for it at exit.
                threading.Thread(target=self._run, name="checkpoint").start()

    def wait(self) -> None:
        """Waits until the queue is empty; writes do not pause meanwhile."""
        with self._changed:
            self._num_waiting += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._line)
            self._num_waiting -= 1

    def failure(self) -> tuple[int, BaseException] | None:
        """Removes and returns the oldest failure, its step and exception; None without any."""
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
        """Keeps a failure, and empties the queue unless `goes_on`."""
        with self._changed:
            self.failures.append((step, error))
            if not self._goes_on:
                self._line, self._is_writing = [], False
                self._changed.notify_all()

    def _next(self) -> Save | None:
        """Removes the written save, and returns the next one after the pause."""
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
