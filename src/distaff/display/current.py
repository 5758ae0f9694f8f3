"""The display of a trainer: it draws on the standard output of the time at which a run begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import RenderableType

from distaff.display.protocol import Display
from distaff.typing import Scalars

T = TypeVar("T")


class CurrentDisplay:
    """Chooses a display when a run begins, and keeps it until it is closed.

    A trainer may be made before standard output is redirected, closed or replaced. What it shows
    outside of a run goes to a display chosen for that alone.

    Args:
        choose: returns the display that suits the standard output of now.
    """

    def __init__(self, choose: Callable[[], Display]) -> None:
        self._choose = choose
        self._chosen: Display | None = None

    def start(self, num_epochs: int, steps_per_epoch: int | None) -> None:
        """Chooses a display, and begins to show a training."""
        self.close()
        self._chosen = self._choose()
        self._chosen.start(num_epochs, steps_per_epoch)

    def compiling(self, what: str) -> None:
        """Says that a program compiles."""
        if self._chosen is not None:
            self._chosen.compiling(what)

    def running(self) -> None:
        """Says that the compilation is over."""
        if self._chosen is not None:
            self._chosen.running()

    def advance(self, step: int, epoch: int, examples: int) -> None:
        """Notes completed steps."""
        if self._chosen is not None:
            self._chosen.advance(step, epoch, examples)

    def update(self, metrics: Scalars) -> None:
        """Replaces the metrics that are shown."""
        if self._chosen is not None:
            self._chosen.update(metrics)

    def epoch_line(
        self,
        epoch: int,
        num_epochs: int,
        step: int,
        metrics: Scalars,
        seconds: float,
        is_best: bool,
    ) -> None:
        """Writes the line of one completed epoch."""
        display = self._chosen or self._choose()
        display.epoch_line(epoch, num_epochs, step, metrics, seconds, is_best)

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Yields the items, and shows how many are done."""
        return (self._chosen or self._choose()).track(iterable, description, total)

    def table(self, rows: Mapping[str, Scalars]) -> None:
        """Writes metrics by split."""
        (self._chosen or self._choose()).table(rows)

    def print(self, content: RenderableType) -> None:
        """Writes a text, or anything that rich can render."""
        (self._chosen or self._choose()).print(content)

    def close(self) -> None:
        """Closes the chosen display; a second call does nothing."""
        chosen, self._chosen = self._chosen, None
        if chosen is not None:
            chosen.close()
