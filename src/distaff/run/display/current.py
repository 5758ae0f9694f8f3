"""The display of a trainer, which follows standard output when it is redirected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import RenderableType

from distaff.core.typing import Scalars
from distaff.run.display.lines import EpochLine
from distaff.run.display.protocol import Display

T = TypeVar("T")


class CurrentDisplay(Display):
    """Chooses a display when a run begins, and keeps it until it is closed.

    Standard output may be redirected, closed or replaced after the trainer is created. Outside of
    a run, each call chooses a display.
    """

    def __init__(self, choose: Callable[[], Display]) -> None:
        self._choose = choose
        self._chosen: Display | None = None

    @property
    def _display(self) -> Display:
        return self._chosen or self._choose()

    def start(self, num_epochs: int | None, steps_per_epoch: int | None) -> None:
        self.close()
        self._chosen = self._choose()
        self._chosen.start(num_epochs, steps_per_epoch)

    def compiling(self, what: str) -> None:
        self._display.compiling(what)

    def running(self) -> None:
        self._display.running()

    def advance(self, step: int, epoch: int, examples: int) -> None:
        self._display.advance(step, epoch, examples)

    def update(self, metrics: Scalars) -> None:
        self._display.update(metrics)

    def epoch_line(self, line: EpochLine) -> None:
        self._display.epoch_line(line)

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        return self._display.track(iterable, description, total)

    def table(self, rows: Mapping[str, Scalars]) -> None:
        self._display.table(rows)

    def print(self, content: RenderableType) -> None:
        self._display.print(content)

    def close(self) -> None:
        chosen, self._chosen = self._chosen, None
        if chosen is not None:
            chosen.close()
