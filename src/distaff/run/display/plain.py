"""The display for output to a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console, RenderableType

from distaff.core.typing import Scalars
from distaff.run.display.lines import EpochLine
from distaff.run.display.progress import Progress
from distaff.run.display.protocol import Display

T = TypeVar("T")


_SILENT_SECONDS = 30.0
"""Most seconds without a line in a long epoch or evaluation."""


class PlainDisplay(Display):
    """Prints lines of plain text, without control characters.

    Within a long epoch or evaluation, it prints a line of progress every 30 seconds.
    """

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
            width=80,
            highlight=False,
        )
        self._clock, self._spoke_at = clock, clock()
        self._progress = Progress(clock)

    def start(self, num_epochs: int | None, steps_per_epoch: int | None) -> None:
        self._progress.begin(num_epochs, steps_per_epoch)
        self._spoke_at = self._clock()

    def compiling(self, what: str) -> None:
        self._progress.compiling(what)

    def running(self) -> None:
        self._progress.running()
        self._spoke_at = self._clock()

    def advance(self, step: int, epoch: int, examples: int) -> None:
        self._progress.advance(step, epoch, examples)
        self._speak_if_silent()

    def update(self, metrics: Scalars) -> None:
        self._progress.update(metrics)

    def _speak_if_silent(self) -> None:
        """Prints a line of progress if the last line is 30 seconds old."""
        if self._clock() - self._spoke_at < _SILENT_SECONDS:
            return
        progress = self._progress
        self.print(
            progress.numbers(None, with_status=True) if progress.epoch else progress.status()
        )

    def epoch_line(self, line: EpochLine) -> None:
        self.print(line.text(self._progress.step_width(), self._progress.pace.lap()))

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        self._spoke_at = self._clock()
        for item in self._progress.track(iterable, description, total):
            self._speak_if_silent()
            yield item

    def print(self, content: RenderableType) -> None:
        self._spoke_at = self._clock()
        if isinstance(content, str):
            print(content, file=self._stream, flush=True)
        else:
            self._console.print(content)
            self._stream.flush()

    def close(self) -> None:
        self._finish()
