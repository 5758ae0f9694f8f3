"""The display for a terminal: a progress bar with a status, and lines above it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from distaff.core.typing import Scalars
from distaff.run.display.lines import clock_time, epoch_text, number
from distaff.run.display.pace import Pace, Stopwatch
from distaff.run.display.protocol import Display

T = TypeVar("T")

_REFRESH_PER_SECOND = 4
_STATUS_WIDTH = 34
_MAX_WIDTH = 100


@dataclass(frozen=True)
class _Tracked:
    """Progress of an evaluation or a prediction."""

    description: str
    done: int
    total: int | None

    def __str__(self) -> str:
        total = "" if self.total is None else f"/{self.total}"
        return f"{self.description} {self.done}{total}"


class TerminalDisplay(Display):
    """Updates two lines at the bottom of a terminal, and prints everything else above them.

    The methods only record values. A thread of rich draws them a few times per second, which costs
    a step nothing.
    """

    def __init__(
        self,
        console: Console,
        *,
        clock: Callable[[], float] = time.perf_counter,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._finish = finish
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._begin(0, None)

    def _begin(self, num_epochs: int, num_steps: int | None) -> None:
        self._pace = Pace(self._clock)
        self._elapsed = Stopwatch(self._clock)
        self._num_epochs = num_epochs
        self._num_steps = num_steps
        self._epoch = 0
        self._step = 0
        self._first_advance: tuple[float, int] | None = None
        self._compiling: tuple[str, float] | None = None
        self._tracked: _Tracked | None = None
        self._metrics: tuple[str, ...] = ()

    def start(self, num_epochs: int, steps_per_epoch: int | None) -> None:
        self._begin(num_epochs, num_epochs * steps_per_epoch if steps_per_epoch else None)
        self._open()

    def compiling(self, what: str) -> None:
        self._pace.hold("compiling")
        self._elapsed.run(False)
        self._compiling = (what, self._clock())

    def running(self) -> None:
        self._compiling = None
        self._elapsed.run(True)
        self._pace.release("compiling")

    def advance(self, step: int, epoch: int, examples: int) -> None:
        if self._first_advance is None:
            self._first_advance = (self._elapsed.seconds(), step)
        self._step = step
        self._epoch = epoch
        self._pace.examples += examples

    def update(self, metrics: Scalars) -> None:
        self._metrics = tuple(
            f"{name.rpartition('/')[2]} {number(value)}" for name, value in metrics.items()
        )

    def epoch_line(
        self,
        epoch: int,
        num_epochs: int,
        step: int,
        metrics: Scalars,
        seconds: float,
        is_best: bool,
    ) -> None:
        padded_step = f"{step:{self._step_width()}}"
        rate = self._pace.lap()
        width = self._console.width
        line = epoch_text(epoch, num_epochs, padded_step, metrics, seconds, rate, is_best, width)
        self._console.print(Text(line, style="bold" if is_best else ""))

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        opened = self._open()  # outside of a training the bar closes with the iterable
        self._pace.hold("track")
        try:
            for done, item in enumerate(iterable):
                self._tracked = _Tracked(description, done, total)
                yield item
        finally:
            self._tracked = None
            self._pace.release("track")
            if opened:
                self.close()

    def print(self, content: RenderableType) -> None:
        is_text = isinstance(content, str)
        self._console.print(content, markup=False, highlight=False, soft_wrap=is_text)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            self._begin(0, None)
            self._finish()

    def _open(self) -> bool:
        """Shows the bar; returns False if it is already shown."""
        if self._live is not None:
            return False
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=_REFRESH_PER_SECOND,
            transient=True,
        )
        self._live.start()
        return True

    def _render(self) -> Text:
        width = min(self._console.width, _MAX_WIDTH) - _STATUS_WIDTH - 2
        done, rest = "━─" if self._console.encoding.startswith("utf") else "=-"
        num_done = round(self._fraction() * width)
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(done * num_done, "bar.complete")
        text.append(rest * (width - num_done), "bar.back")
        text.append(f"  {self._status()}")
        if self._epoch:
            text.append(f"\n{self._numbers()}")
        return text

    def _fraction(self) -> float:
        tracked = self._tracked
        if not self._num_epochs:
            return tracked.done / tracked.total if tracked and tracked.total else 0.0
        if self._num_steps:
            return min(1.0, self._step / self._num_steps)
        return max(0, self._epoch - 1) / self._num_epochs

    def _status(self) -> str:
        compiling, first, tracked = self._compiling, self._first_advance, self._tracked
        if compiling:
            what, since = compiling
            return f"compiling {what} {self._clock() - since:.0f} s"
        if tracked:
            return str(tracked)
        if not (self._num_steps and first and self._step > first[1]):
            return ""
        seconds_per_step = (self._elapsed.seconds() - first[0]) / (self._step - first[1])
        return f"{clock_time((self._num_steps - self._step) * seconds_per_step)} left"

    def _numbers(self) -> str:
        total = f"/{self._num_steps}" if self._num_steps else ""
        fields = [
            f"epoch {self._epoch:{len(str(self._num_epochs))}}/{self._num_epochs}",
            f"step {self._step:{self._step_width()}}{total}",
            *self._metrics,
            f"{self._pace.recent():6.0f} examples/s",
        ]
        return "  ".join(fields)

    def _step_width(self) -> int:
        return len(str(self._num_steps)) if self._num_steps else 6
