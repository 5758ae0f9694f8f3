"""Throughput: where the time of a run goes, and how fast its steps are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import jax
import jax.monitoring

T = TypeVar("T")

PARTS = (
    *("device", "host", "data", "logging", "callbacks"),
    *("evaluation", "checkpoint", "compile", "other"),
)
"""What the time of a run is spent on, as the host's clock tells it; each second counts once.

`device`: the host waits for results, or is in a call in which they are computed. `host`: it hands
programs to the device, which the call ends before it has done. `data`: it gets the next batches,
and the device has nothing left to do when they come. `compile`: tracing, lowering and compiling, or
reading from the compile cache, wherever it happens. `other` is what none of these is.

What can be told apart and what cannot: where the device computes beside the host, as a GPU does and
a CPU with large programs, `host` is the price of the calls alone, and batches that come while it is
still at work have cost nothing and count as `device`. A CPU runs small programs inside the call:
one whose results are there when it returns counts as `device`, the host's part of it included. Of
many steps in one program that part is small; of single small steps it may be half.
"""

TRAINING = ("device", "host", "data", "logging", "callbacks")
"""The parts that make up the training itself."""


class Throughput(NamedTuple):
    """How fast a run was, or a stretch of it.

    Attributes:
        steps: steps that were run.
        examples: examples in them.
        seconds: wall time of each of `PARTS`.
        programs: programs that were compiled, those from the compile cache included.
        cached: those from the compile cache.
    """

    steps: int
    examples: int
    seconds: dict[str, float]
    programs: int
    cached: int

    @property
    def training_seconds(self) -> float:
        """Wall time of the training itself, without evaluation, checkpoints and compiling."""
        return sum(self.seconds[part] for part in TRAINING)

    def compiled(self) -> str:
        """Returns in a few words what was compiled, and for how long."""
        seconds, programs = self.seconds["compile"], self.programs
        return f"compiled in {seconds:.1f} s ({programs} programs, {self.cached} cached)"

    def per_second(self, number: float) -> float:
        """Returns a number of things of the whole training per second of it; 0 without any."""
        return number / self.training_seconds if self.training_seconds > 0 else 0.0

    def since(self, earlier: Throughput) -> Throughput:
        """Returns what was counted after an earlier reading."""
        return Throughput(
            self.steps - earlier.steps,
            self.examples - earlier.examples,
            {part: self.seconds[part] - earlier.seconds[part] for part in PARTS},
            self.programs - earlier.programs,
            self.cached - earlier.cached,
        )


class Timers:
    """Counts the seconds of a run by what they are spent on; each second counts once.

    Args:
        clock: gives a time in seconds that never goes back.

    Attributes:
        since: when the current part began; at most one step ago.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps = self.examples = 0
        self._clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self.since = "other", clock()
        self._before, self._compiled = _COMPILED.copy(), _COMPILED["seconds"]
        self._handed: Any = None
        self._lap, self._lap_since = self.read(), self.since

    def count(self, steps: int, batch_size: int) -> int:
        """Counts steps, and returns the examples in them."""
        self.steps += steps
        self.examples += steps * batch_size
        return steps * batch_size

    @contextmanager
    def spent(self, part: str) -> Generator[None]:
        """Counts the time inside as spent on a part; on that part alone, where parts are nested."""
        outer = self.turn_to(part)
        try:
            yield
        finally:
            self.turn_to(outer)

    def timed(self, items: Iterable[T], part: str) -> Iterator[T]:
        """Yields items, and counts the time to get each of them."""
        iterator: Any = iter(items)
        while True:
            outer = self.turn_to(part)
            try:
                item: Any = next(iterator, _END)
            finally:
                self.turn_to(outer)
            if item is _END:
                return
            yield item

    def fetched(self, chunks: Iterable[T]) -> Iterator[T]:
        """Yields chunks, and counts the time to get each of them: as `data`, or see `PARTS`."""
        iterator: Any = iter(chunks)
        while True:
            outer = self.turn_to("data")
            try:
                chunk: Any = next(iterator, _END)
                if self._handed is not None and not self._handed.is_ready():
                    self._part = "device"
            finally:
                self.turn_to(outer)
            if chunk is _END:
                return
            yield chunk

    def handed(self, result: Any) -> None:
        """Hears that a program was handed over; called at the end of the part `host`.

        Args:
            result: an array that the program makes, which is not donated before the next call. It
                is asked whether it is ready, and neither read nor waited for.
        """
        self._handed = result
        if self._calls_compute and result.is_ready():
            self._part = "device"

    @cached_property
    def _calls_compute(self) -> bool:
        return jax.default_backend() == "cpu"

    def lap(self, seconds: float) -> Throughput | None:
        """Returns what was counted since the last lap, or None until it has lasted this long."""
        if self._clock() - self._lap_since < seconds:
            return None
        before, self._lap = self._lap, self.read()
        self._lap_since = self.since
        return self._lap.since(before)

    def read(self) -> Throughput:
        """Returns what was counted so far."""
        self.turn_to(self._part)
        programs, cached = (
            int(_COMPILED[name] - self._before[name]) for name in ("programs", "cached")
        )
        return Throughput(self.steps, self.examples, dict(self._seconds), programs, cached)

    def turn_to(self, part: str) -> str:
        """Counts the time from here on as spent on a part, and returns the one before.

        `spent` is the safe way; this one costs a step less.
        """
        now, outer, compiled = self._clock(), self._part, _COMPILED["seconds"]
        compiling = compiled - self._compiled
        self._seconds["compile"] += compiling
        self._seconds[outer] += now - self.since - compiling
        self._part, self.since, self._compiled = part, now, compiled
        return outer


_END = object()

# Of this process, since this module was imported. JAX keeps its listeners for good.
_COMPILED = {"seconds": 0.0, "programs": 0, "cached": 0}
_BACKEND = "/jax/core/compile/backend_compile_duration"
_COMPILING = (
    *(_BACKEND, "/jax/core/compile/jaxpr_to_mlir_module_duration"),
    "/jax/core/compile/jaxpr_trace_duration",
)
_spans: deque[tuple[float, float]] = deque(maxlen=1000)  # of compiling: from when, for how long


def _hear_duration(event: str, duration_secs: float, **_: str | int) -> None:
    if event not in _COMPILING:
        return
    _COMPILED["programs"] += event == _BACKEND
    start = time.perf_counter() - duration_secs
    # What is traced inside of another trace ends before it, and would count twice.
    while _spans and _spans[-1][0] + _spans[-1][1] / 2 > start:
        _COMPILED["seconds"] -= _spans.pop()[1]
    _COMPILED["seconds"] += duration_secs
    _spans.append((start, duration_secs))


def _hear(event: str, **_: str | int) -> None:
    _COMPILED["cached"] += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_duration_secs_listener(_hear_duration)
jax.monitoring.register_event_listener(_hear)
