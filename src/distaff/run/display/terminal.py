"""The display for a terminal: a progress bar with a status, and lines above it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from distaff.core.typing import Scalars
from distaff.run.display.lines import EpochLine
from distaff.run.display.progress import Progress
from distaff.run.display.protocol import Display

T = TypeVar("T")

_REFRESH_PER_SECOND = 4
_STATUS_WIDTH = 34
_MAX_WIDTH = 100


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
        self._live: Live | None = None
        self._progress = Progress(clock)

    def start(self, num_epochs: int | None, steps_per_epoch: int | None) -> None:
        self._progress.begin(num_epochs, steps_per_epoch)
        self._open()

    def compiling(self, what: str) -> None:
        self._progress.compiling(what)

    def running(self) -> None:
        self._progress.running()

    def advance(self, step: int, epoch: int, examples: int) -> None:
        self._progress.advance(step, epoch, examples)

    def update(self, metrics: Scalars) -> None:
        self._progress.update(metrics)

    def epoch_line(self, line: EpochLine) -> None:
        rate, width = self._progress.pace.lap(), self._console.width
        text = line.text(self._progress.step_width(), rate, width)
        self._console.print(Text(text, style="bold" if line.is_best else ""))

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        opened = self._open()  # outside of a training the bar closes with the iterable
        try:
            yield from self._progress.track(iterable, description, total)
        finally:
            if opened:
                self.close()

    def print(self, content: RenderableType) -> None:
        is_text = isinstance(content, str)
        self._console.print(content, markup=False, highlight=False, soft_wrap=is_text)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            self._progress.begin(0, None)
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
        progress = self._progress
        width = min(self._console.width, _MAX_WIDTH) - _STATUS_WIDTH - 2
        done, rest = "━─" if self._console.encoding.startswith("utf") else "=-"
        num_done = round(progress.fraction() * width)
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(done * num_done, "bar.complete")
        text.append(rest * (width - num_done), "bar.back")
        text.append(f"  {progress.status()}")
        if progress.epoch:
            text.append(f"\n{progress.numbers(self._console.width)}")
        return text
