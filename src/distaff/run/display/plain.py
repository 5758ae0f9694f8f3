"""The display for output to a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console, RenderableType

from distaff.core.typing import Scalars
from distaff.run.display.lines import epoch_text
from distaff.run.display.pace import Pace
from distaff.run.display.protocol import Display

T = TypeVar("T")


class PlainDisplay(Display):
    """Prints lines of plain text, without control characters."""

    def __init__(
        self,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.perf_counter,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._finish = finish
        self._stream = stream
        self._console = Console(
            file=stream,
            force_terminal=False,
            force_jupyter=False,  # would print tables into the notebook, not to the stream
            color_system=None,
            width=100,
            highlight=False,
        )
        self._clock = clock
        self._pace = Pace(clock)
        self._step_width = 1

    def start(self, num_epochs: int, steps_per_epoch: int | None) -> None:
        self._step_width = len(str(num_epochs * steps_per_epoch)) if steps_per_epoch else 6
        self._pace = Pace(self._clock)

    def compiling(self, what: str) -> None:
        self._pace.hold("compiling")

    def running(self) -> None:
        self._pace.release("compiling")

    def advance(self, step: int, epoch: int, examples: int) -> None:
        self._pace.examples += examples

    def epoch_line(
        self,
        epoch: int,
        num_epochs: int,
        step: int,
        metrics: Scalars,
        seconds: float,
        is_best: bool,
    ) -> None:
        padded_step = f"{step:{self._step_width}}"
        rate = self._pace.lap()
        self.print(
            epoch_text(epoch, num_epochs, padded_step, metrics, seconds, rate, is_best, None)
        )

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        self._pace.hold("track")
        try:
            yield from iterable
        finally:
            self._pace.release("track")

    def print(self, content: RenderableType) -> None:
        if isinstance(content, str):
            print(content, file=self._stream, flush=True)
        else:
            self._console.print(content)
            self._stream.flush()

    def close(self) -> None:
        self._finish()
