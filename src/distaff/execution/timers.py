"""Measures how a run spends its time, and the throughput of its steps."""

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
"""The parts of a run's time, measured with the host's clock; each second counts once.

`device`: the host waits for results, or runs a call that computes them. `host`: it dispatches
programs that the device finishes after the call. `data`: it fetches the next batches, and the
device is idle when they arrive. `compile`: tracing, lowering, compiling, and reading the compile
cache, in any part. `other`: everything else.

If the device computes concurrently with the host (GPUs; CPUs with large programs), `host` is the
cost of dispatch only, and time to fetch batches while the device is busy counts as `device`. A CPU
runs small programs inside the call: a call whose results are ready when it returns counts as
`device`, including its dispatch. With many steps per program the dispatch is negligible; with
single small steps it may be half of the time.
"""

TRAINING = ("device", "host", "data", "logging", "callbacks")
"""The parts of training itself: all but evaluation, checkpoints, compiling and other."""


class Throughput(NamedTuple):
    """Steps and seconds of a run, or of a part of it.

    Attributes:
        steps: completed steps.
        examples: examples in these steps.
        seconds: wall time by `PARTS`.
        programs: compiled programs, including programs read from the compile cache.
        cached: programs read from the compile cache.
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
        """Describes the number of compiled programs and the seconds that took."""
        seconds, programs = self.seconds["compile"], self.programs
        return f"compiled in {seconds:.1f} s ({programs} programs, {self.cached} cached)"

    def per_second(self, number: float) -> float:
        """Divides a number by the training seconds; 0 if there are none."""
        return number / self.training_seconds if self.training_seconds > 0 else 0.0

    def since(self, earlier: Throughput) -> Throughput:
        """Returns the difference to an earlier reading."""
        return Throughput(
            self.steps - earlier.steps,
            self.examples - earlier.examples,
            {part: self.seconds[part] - earlier.seconds[part] for part in PARTS},
            self.programs - earlier.programs,
            self.cached - earlier.cached,
        )


class Timers:
    """Measures the seconds of a run by `PARTS`; each second counts once.

    Args:
        clock: returns seconds, monotonically.

    Attributes:
        since: start of the current part, on `clock`; at most one step ago.
        calls: programs of steps that were counted.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps = self.examples = self.calls = 0
        self._clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self.since = "other", clock()
        self._before, self._compiled = _COMPILED.copy(), _COMPILED["seconds"]
        self._handed: Any = None
        self._lap, self._lap_since = self.read(), self.since

    def count(self, steps: int, batch_size: int) -> int:
        """Counts the steps of a program, and returns their number of examples."""
        self.calls += 1
        self.steps += steps
        self.examples += steps * batch_size
        return steps * batch_size

    @contextmanager
    def spent(self, part: str) -> Generator[None]:
        """Counts the time in the block as spent on a part; nested blocks count only their own."""
        outer = self.turn_to(part)
        try:
            yield
        finally:
            self.turn_to(outer)

    def timed(self, items: Iterable[T], part: str) -> Iterator[T]:
        """Yields items, and counts the time to fetch each of them as spent on a part."""
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
        """Yields chunks, and counts the time to fetch each of them as `data`.

        If the device is still busy when the chunk arrives, the time counts as `device`.
        """
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
        """Records a dispatched program; call it at the end of the part `host`.

        Args:
            result: an output of the program that is not donated before the next call. Only
                `is_ready` is called, which does not wait.
        """
        self._handed = result
        if self._calls_compute and result.is_ready():
            self._part = "device"

    @cached_property
    def _calls_compute(self) -> bool:
        return jax.default_backend() == "cpu"

    def lap(self, seconds: float) -> Throughput | None:
        """Returns the throughput since the last lap; None if the lap is shorter than `seconds`."""
        if self._clock() - self._lap_since < seconds:
            return None
        before, self._lap = self._lap, self.read()
        self._lap_since = self.since
        return self._lap.since(before)

    def read(self) -> Throughput:
        """Returns the throughput so far."""
        self.turn_to(self._part)
        programs, cached = (
            int(_COMPILED[name] - self._before[name]) for name in ("programs", "cached")
        )
        return Throughput(self.steps, self.examples, dict(self._seconds), programs, cached)

    def turn_to(self, part: str) -> str:
        """Counts the time from now on as spent on a part, and returns the previous part.

        Prefer `spent`, which restores the part; this is faster in every step.
        """
        now, outer, compiled = self._clock(), self._part, _COMPILED["seconds"]
        compiling = compiled - self._compiled
        self._seconds["compile"] += compiling
        self._seconds[outer] += now - self.since - compiling
        self._part, self.since, self._compiled = part, now, compiled
        return outer


_END = object()

# Totals of this process since this module was imported: JAX's listeners cannot be removed.
_COMPILED = {"seconds": 0.0, "programs": 0, "cached": 0}
_BACKEND = "/jax/core/compile/backend_compile_duration"
_COMPILING = (
    *(_BACKEND, "/jax/core/compile/jaxpr_to_mlir_module_duration"),
    "/jax/core/compile/jaxpr_trace_duration",
)
_spans: deque[tuple[float, float]] = deque(maxlen=1000)  # start and duration of compiles


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    if event not in _COMPILING:
        return
    _COMPILED["programs"] += event == _BACKEND
    start = time.perf_counter() - duration_secs
    # A trace nested in another trace ends before it, and would count twice.
    while _spans and _spans[-1][0] + _spans[-1][1] / 2 > start:
        _COMPILED["seconds"] -= _spans.pop()[1]
    _COMPILED["seconds"] += duration_secs
    _spans.append((start, duration_secs))


def _on_event(event: str, **_: str | int) -> None:
    _COMPILED["cached"] += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)
