"""Throughput: where the time of a run goes, and how fast its steps are."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import jax.monitoring

T = TypeVar("T")

PARTS = ("steps", "data", "logging", "callbacks", "evaluation", "checkpoint", "compile", "other")
"""What the time of a run is spent on.

`steps` is dispatching steps and waiting for them; `compile` is lowering and compiling, or reading
from the compile cache, wherever it happens; `other` is what none of these is.
"""


class Throughput(NamedTuple):
    """How fast a run was.

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
        """Wall time of the training itself: steps, data, logging and callbacks."""
        return sum(self.seconds[part] for part in ("steps", "data", "logging", "callbacks"))

    def compiled(self) -> str:
        """Returns in a few words what was compiled, and for how long."""
        seconds, programs = self.seconds["compile"], self.programs
        return f"compiled in {seconds:.1f} s ({programs} programs, {self.cached} cached)"

    def line(self) -> str:
        """Returns all of it in one line of text."""
        seconds = self.training_seconds or float("inf")
        each = 1e3 * seconds / max(self.steps, 1)
        total = sum(self.seconds.values())
        shares = ", ".join(
            f"{part} {self.seconds[part] / total:.0%}"
            for part in PARTS
            if total and self.seconds[part] / total >= 0.005
        )
        return (
            f"{self.steps / seconds:,.0f} steps/s, {self.examples / seconds:,.0f} examples/s, "
            f"{each:.3g} ms per step; {total:.1f}s: {shares}; "
            f"{self.programs} programs compiled, {self.cached} of them cached"
        )


class Ledger:
    """Counts the seconds of a run by what they are spent on; each second counts once.

    Args:
        clock: gives a time in seconds that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps = self.examples = 0
        self._clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "other", clock()
        self._before, self._compiled = _COMPILED.copy(), _COMPILED["seconds"]

    @contextmanager
    def spent(self, part: str) -> Generator[None]:
        """Counts the time inside as spent on a part; on that part alone, where parts are nested."""
        outer = self._turn_to(part)
        try:
            yield
        finally:
            self._turn_to(outer)

    def timed(self, items: Iterable[T], part: str) -> Iterator[T]:
        """Yields items, and counts the time to get each of them."""
        iterator: Any = iter(items)
        while True:
            outer = self._turn_to(part)
            try:
                item: Any = next(iterator, _END)
            finally:
                self._turn_to(outer)
            if item is _END:
                return
            yield item

    def read(self) -> Throughput:
        """Returns what was counted so far."""
        self._turn_to(self._part)
        programs, cached = (
            int(_COMPILED[name] - self._before[name]) for name in ("programs", "cached")
        )
        return Throughput(self.steps, self.examples, dict(self._seconds), programs, cached)

    def _turn_to(self, part: str) -> str:
        now, outer = self._clock(), self._part
        compiling = _COMPILED["seconds"] - self._compiled
        self._seconds["compile"] += compiling
        self._seconds[outer] += now - self._since - compiling
        self._part, self._since, self._compiled = part, now, _COMPILED["seconds"]
        return outer


_END = object()

# Of this process, since this module was imported. JAX keeps its listeners for good.
_COMPILED = {"seconds": 0.0, "programs": 0, "cached": 0}
_BACKEND = "/jax/core/compile/backend_compile_duration"
# Tracing is left out: what is traced inside of another trace would count twice.
_COMPILING = (_BACKEND, "/jax/core/compile/jaxpr_to_mlir_module_duration")


def _hear_duration(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _COMPILING:
        _COMPILED["seconds"] += duration_secs
        _COMPILED["programs"] += event == _BACKEND


def _hear(event: str, **_: str | int) -> None:
    _COMPILED["cached"] += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_duration_secs_listener(_hear_duration)
jax.monitoring.register_event_listener(_hear)
