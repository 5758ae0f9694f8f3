"""Reading ahead: items that take long to get are got by a thread, others where they are used."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

_log = logging.getLogger("distaff")

T = TypeVar("T")

DEPTH = 2
"""How many items the thread gets ahead: those that wait, and the one it is at."""

_HAND_OVER_SECONDS = 5e-4
"""What an item may take before a thread is worth its hand-over, and its part of Python's lock."""

_PATIENCE_SECONDS = 1e-2
"""How much longer than that items may have taken in all; then the thread takes over."""

_JOIN_SECONDS = 5.0
"""How long a reader that is stopped is waited for: it may hang in a read that never ends."""


class ReadTimes:
    """Tells slow from fast, by a cumulative sum: neither one hiccup nor one slow start decides."""

    def __init__(self) -> None:
        self._lost = 0.0

    @property
    def slow(self) -> bool:
        """Whether items have taken long, one after another."""
        return self._lost > _PATIENCE_SECONDS

    def record_seconds(self, seconds: float) -> None:
        """Hears how long an item took."""
        lost = max(0.0, self._lost + seconds - _HAND_OVER_SECONDS)
        self._lost = min(lost, 2 * _PATIENCE_SECONDS)


class Prefetch(Generic[T]):
    """Hands out the items of generators, and gets them ahead where that takes long.

    Items and their order are those of the generator. One thread at a time goes on with it: the one
    that calls at first, then one that is started for the rest. An error of the generator is raised
    where its item would have been handed out. The pace is remembered from one generator to the
    next.

    Args:
        pace: decides.
        clock: gives a time in seconds that never goes back.
        lock: held while an item is got: data that two of them read are read by one at a time.
    """

    def __init__(
        self,
        pace: ReadTimes | None = None,
        clock: Callable[[], float] = time.perf_counter,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._pace, self._clock, self._lock = pace or ReadTimes(), clock, lock or nullcontext()
        self._reader: _Worker | None = None

    @property
    def busy(self) -> bool:
        """Whether a thread is still at a generator, such as one that hangs in a read."""
        return self._reader is not None and self._reader.thread.is_alive()

    def wait(self) -> None:
        """Returns when no thread is at a generator."""
        if self._reader is not None:
            self._reader.thread.join()
        self._reader = None

    def read(self, items: Generator[T], steady: Callable[[], bool] = lambda: True) -> Generator[T]:
        """Yields the items of a generator, and closes it.

        Args:
            items: what to read.
            steady: whether the next items may be got before the last one was used; asked until it
                is true once.
        """
        self.wait()  # one thread at a time, also after one that hung
        try:
            first = True  # opening files, or a new order, says nothing of the items after it
            while not (self._pace.slow and steady()):
                start = self._clock()
                with self._lock:
                    item: Any = next(items, _END)
                if item is _END:
                    return
                if not first:
                    self._pace.record_seconds(self._clock() - start)
                first = False
                yield item
                del item
            yield from self._read_in_thread(items)
        finally:
            if not self.busy:
                items.close()

    def _read_in_thread(self, items: Generator[T]) -> Generator[T]:
        self._reader = reader = _Worker.start(items, self._pace, self._clock, self._lock)
        try:
            while (got := reader.got.get()).error is None:
                reader.wanted.release()
                yield got.item
                del got
        finally:
            reader.stop()
        if not isinstance(got.error, _EndError):
            raise got.error


class _EndError(Exception):
    """The generator has no more items."""


class _Got(NamedTuple):
    item: Any
    error: BaseException | None


class _Worker(NamedTuple):
    """A thread that goes on with a generator, and what passes between it and its reader."""

    thread: threading.Thread
    got: SimpleQueue[_Got]
    wanted: threading.Semaphore
    stopped: threading.Event

    @classmethod
    def start(
        cls,
        items: Generator[Any],
        pace: ReadTimes,
        clock: Callable[[], float],
        lock: AbstractContextManager[Any],
    ) -> _Worker:
        got: SimpleQueue[_Got] = SimpleQueue()
        wanted, stopped = threading.Semaphore(DEPTH), threading.Event()

        def run() -> None:
            try:
                while wanted.acquire() and not stopped.is_set():
                    start = clock()
                    with lock:
                        item = next(items, _END)
                    pace.record_seconds(clock() - start)
                    if item is _END:
                        break
                    got.put(_Got(item, None))
                    del item
                got.put(_Got(None, _EndError()))
            except BaseException as error:
                got.put(_Got(None, error))
            finally:
                items.close()

        # A daemon: Python does not wait for a read that hangs.
        thread = threading.Thread(
            target=copy_context().run, args=(run,), name="read ahead", daemon=True
        )
        thread.start()
        return cls(thread, got, wanted, stopped)

    def stop(self) -> None:
        """Ends the thread, after the item that it is at."""
        self.stopped.set()
        self.wanted.release()
        self.thread.join(_JOIN_SECONDS)
        if self.thread.is_alive():
            _log.warning("the loader is still at its next batch, and is left alone with it")


_END: Any = object()
