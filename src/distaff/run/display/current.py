"""The display of a trainer: it draws on the standard output of the time at which a run begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import RenderableType

from distaff.core.typing import Scalars
from distaff.run.display.protocol import Display, NullDisplay

T = TypeVar("T")


class CurrentDisplay(Display):
    """Chooses a display when a run begins, and keeps it until it is closed.

    A trainer may be made before standard output is redirected, closed or replaced. What it shows
    outside of a run goes to a display chosen for that alone.

    Args:
        choose: returns the display that suits the standard output of now.
    """

    def __init__(self, choose: Callable[[], Display]) -> None:
        self._choose = choose
        self._chosen: Display | None = None

    @property
    def _of_run(self) -> Display:
        return self._chosen or NullDisplay()

    @property
    def _of_now(self) -> Display:
        return self._chosen or self._choose()

    def start(self, num_epochs: int, steps_per_epoch: int | None) -> None:
        self.close()
        self._chosen = self._choose()
        self._chosen.start(num_epochs, steps_per_epoch)

    def compiling(self, what: str) -> None:
        self._of_run.compiling(what)

    def running(self) -> None:
        self._of_run.running()

    def advance(self, step: int, epoch: int, examples: int) -> None:
        self._of_run.advance(step, epoch, examples)

    def update(self, metrics: Scalars) -> None:
        self._of_run.update(metrics)

    def epoch_line(
        self,
        epoch: int,
        num_epochs: int,
        step: int,
        metrics: Scalars,
        seconds: float,
        is_best: bool,
    ) -> None:
        self._of_now.epoch_line(epoch, num_epochs, step, metrics, seconds, is_best)

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        return self._of_now.track(iterable, description, total)

    def table(self, rows: Mapping[str, Scalars]) -> None:
        self._of_now.table(rows)

    def print(self, content: RenderableType) -> None:
        self._of_now.print(content)

    def close(self) -> None:
        chosen, self._chosen = self._of_run, None
        chosen.close()
