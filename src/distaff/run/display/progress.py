"""Where a run stands, for displays: position, metrics, rate and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from distaff.core.typing import Scalars
from distaff.core.views.amounts import clock_time
from distaff.run.display.lines import epoch_text, fit, live_fields
from distaff.run.display.pace import Pace, Stopwatch

T = TypeVar("T")


class _Tracked(NamedTuple):
    """Progress of an evaluation or a prediction."""

    description: str
    done: int
    total: int | None

    def __str__(self) -> str:
        total = "" if self.total is None else f"/{self.total}"
        return f"{self.description} {self.done}{total}"


class Progress:
    """Where a run stands. Recording is cheap enough for every step; another thread may read.

    Args:
        clock: returns a monotonic time in seconds.

    Attributes:
        epoch: the current epoch, from 1; 0 before the first step.
        step: completed optimizer updates.
        num_epochs: epochs of the run; 0 outside of a training, None if unknown.
        pace: examples per second.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.begin(0, None)

    def begin(self, num_epochs: int | None, steps_per_epoch: int | None) -> None:
        """Begins a training; 0 epochs for none."""
        self.pace, self._elapsed = Pace(self._clock), Stopwatch(self._clock)
        self.num_epochs = num_epochs
        self._num_steps = num_epochs * steps_per_epoch if num_epochs and steps_per_epoch else None
        self.epoch = self.step = 0
        self._first_advance: tuple[float, int] | None = None
        self._compiling: tuple[str, float] | None = None
        self._tracked: _Tracked | None = None
        self._metrics: list[tuple[int, str]] = []

    def compiling(self, what: str) -> None:
        """Records that a program compiles."""
        self.pace.hold("compiling")
        self._elapsed.run(False)
        self._compiling = (what, self._clock())

    def running(self) -> None:
        """Records that the compilation has finished."""
        self._compiling = None
        self._elapsed.run(True)
        self.pace.release("compiling")

    def advance(self, step: int, epoch: int, examples: int) -> None:
        """Records completed steps."""
        if self._first_advance is None:
            self._first_advance = (self._elapsed.seconds(), step)
        self.step, self.epoch = step, epoch
        self.pace.examples += examples

    def update(self, metrics: Scalars) -> None:
        """Replaces the metrics."""
        self._metrics = live_fields(metrics)

    def track(self, iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yields the items of an evaluation or a prediction, and records how many are done."""
        self.pace.hold("track")
        try:
            for done, item in enumerate(iterable):
                self._tracked = _Tracked(description, done, total)
                yield item
        finally:
            self._tracked = None
            self.pace.release("track")

    def fraction(self) -> float:
        """Returns the completed part of the training, or else of the evaluation, from 0 to 1."""
        tracked = self._tracked
        if self.num_epochs == 0:
            return tracked.done / tracked.total if tracked and tracked.total else 0.0
        if self._num_steps:
            return min(1.0, self.step / self._num_steps)
        return max(0, self.epoch - 1) / self.num_epochs if self.num_epochs else 0.0

    def status(self, *, with_seconds: bool = True) -> str:
        """Returns what happens now, or the time left.

        Args:
            with_seconds: whether to show how long a compilation has taken so far.
        """
        compiling, tracked = self._compiling, self._tracked
        if compiling:
            what, since = compiling
            seconds = f" {self._clock() - since:.0f} s" if with_seconds else " …"
            return f"compiling {what}{seconds}"
        return str(tracked) if tracked else self.left()

    def left(self) -> str:
        """Returns the time left; empty if it is unknown."""
        first = self._first_advance
        if not (self._num_steps and first and self.step > first[1]):
            return ""
        seconds_per_step = (self._elapsed.seconds() - first[0]) / (self.step - first[1])
        return f"{clock_time((self._num_steps - self.step) * seconds_per_step)} left"

    def numbers(self, width: int | None, *, with_status: bool = False) -> str:
        """Returns position, metrics, learning rate and examples per second as a line.

        Args:
            width: available columns; metrics after the first are dropped if necessary. None for no
                limit.
            with_status: whether to append the status.
        """
        total = f"/{self._num_steps}" if self._num_steps else ""
        fields = [
            (0, epoch_text(self.epoch, self.num_epochs)),
            (0, f"step {self.step:{self.step_width()}}{total}"),
            *self._metrics,
            (2, f"{self.pace.recent():6.0f} examples/s"),
        ]
        status = self.status() if with_status else ""
        return fit([*fields, (0, status)] if status else fields, width=width)

    def step_width(self) -> int:
        """Returns the number of characters for a step."""
        return len(str(self._num_steps)) if self._num_steps else 6
