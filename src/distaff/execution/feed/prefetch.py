"""Prefetches the items of slow generators in a thread."""

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
"""Items the thread is ahead: those in the queue, and the one being read."""

_HAND_OVER_SECONDS = 5e-4
"""Seconds per item above which a thread pays for its hand-over and its share of the GIL."""

_PATIENCE_SECONDS = 1e-2
"""Total seconds above that limit after which the thread takes over."""

_JOIN_SECONDS = 5.0
"""Longest wait for a stopped thread, which may hang in a read."""


class ReadTimes:
    """Detects slow reads with a cumulative sum, so that a single slow read does not decide."""

    def __init__(self) -> None:
        self._lost = 0.0

    @property
    def slow(self) -> bool:
        """Whether several items in a row were slow."""
        return self._lost > _PATIENCE_SECONDS

    def record_seconds(self, seconds: float) -> None:
        """Records the seconds that an item took."""
        lost = max(0.0, self._lost + seconds - _HAND_OVER_SECONDS)
        self._lost = min(lost, 2 * _PATIENCE_SECONDS)


class Prefetch(Generic[T]):
    """Yields the items of generators, prefetched by a thread if they are slow.

    Items keep their order. At first the caller's thread reads a generator; if items are slow, a new
    thread reads the rest. An error of the generator is raised in place of its item. The read times
    carry over from one generator to the next.

    Args:
        times: decides whether items are slow.
        clock: returns seconds, monotonically.
        lock: held while an item is read, so that data shared by several loaders are read by one at
            a time.
    """

    def __init__(
        self,
        times: ReadTimes | None = None,
        clock: Callable[[], float] = time.perf_counter,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._times, self._clock, self._lock = times or ReadTimes(), clock, lock or nullcontext()
        self._reader: _Worker | None = None

    @property
    def busy(self) -> bool:
        """Whether a thread is still reading a generator, for example because the read hangs."""
        return self._reader is not None and self._reader.thread.is_alive()

    def wait(self) -> None:
        """Waits until no thread reads a generator."""
        if self._reader is not None:
            self._reader.thread.join()
        self._reader = None

    def read(self, items: Generator[T], steady: Callable[[], bool] = lambda: True) -> Generator[T]:
        """Yields the items of a generator, and closes it.

        Args:
            items: the generator.
            steady: returns whether items may be read before the previous one was used; called until
                it returns True.
        """
        self.wait()  # only one thread reads, even if the previous one hung
        try:
            first = True  # its time, such as to open files, is not typical
            while not (self._times.slow and steady()):
                start = self._clock()
                with self._lock:
                    item: Any = next(items, _END)
                if item is _END:
                    return
                if not first:
                    self._times.record_seconds(self._clock() - start)
                first = False
                yield item
                del item
            yield from self._read_in_thread(items)
        finally:
            if not self.busy:
                items.close()

    def _read_in_thread(self, items: Generator[T]) -> Generator[T]:
        self._reader = reader = _Worker.start(items, self._times, self._clock, self._lock)
        try:
            while (result := reader.results.get()).error is None:
                reader.wanted.release()
                yield result.item
                del result
        finally:
            reader.stop()
        if not isinstance(result.error, _EndError):
            raise result.error


class _EndError(Exception):
    """The generator is exhausted."""


class _Result(NamedTuple):
    item: Any
    error: BaseException | None


class _Worker(NamedTuple):
    """A thread that reads a generator, and the queue of its results."""

    thread: threading.Thread
    results: SimpleQueue[_Result]
    wanted: threading.Semaphore
    stopped: threading.Event

    @classmethod
    def start(
        cls,
        items: Generator[Any],
        times: ReadTimes,
        clock: Callable[[], float],
        lock: AbstractContextManager[Any],
    ) -> _Worker:
        results: SimpleQueue[_Result] = SimpleQueue()
        wanted, stopped = threading.Semaphore(DEPTH), threading.Event()

        def run() -> None:
            try:
                while wanted.acquire() and not stopped.is_set():
                    start = clock()
                    with lock:
                        item = next(items, _END)
                    times.record_seconds(clock() - start)
                    if item is _END:
                        break
                    results.put(_Result(item, None))
                    del item
                results.put(_Result(None, _EndError()))
            except BaseException as error:
                results.put(_Result(None, error))
            finally:
                items.close()

        # A daemon, so that Python does not wait for a read that hangs.
        thread = threading.Thread(
            target=copy_context().run, args=(run,), name="read ahead", daemon=True
        )
        thread.start()
        return cls(thread, results, wanted, stopped)

    def stop(self) -> None:
        """Stops the thread after its current item."""
        self.stopped.set()
        self.wanted.release()
        self.thread.join(_JOIN_SECONDS)
        if self.thread.is_alive():
            _log.warning(
                "the loader is still reading its next batch; the run no longer waits for it"
            )


_END: Any = object()
