"""Reports from a thread that a process is alive while it trains."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Self

SECONDS_PER_BEAT = 30.0


class Heart:
    """Calls a function every 30 seconds from a thread, within a `with` block.

    An error of a call is ignored: the next one may reach the storage again.

    Args:
        beat: the function.
        every: seconds between calls.
    """

    def __init__(self, beat: Callable[[], object], every: float = SECONDS_PER_BEAT) -> None:
        self._beat, self._every = beat, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distaff-heart", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            with contextlib.suppress(Exception):
                self._beat()
