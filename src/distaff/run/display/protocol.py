"""The interface of displays, which show a run's progress, and their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, Literal, TypeVar

from rich.console import RenderableType

from distaff.core.config.options import Options, option
from distaff.core.typing import Scalars
from distaff.errors import ConfigError
from distaff.run.display.lines import EpochLine, metrics_table

T = TypeVar("T")


def _depth(name: str, value: Any) -> Any:
    is_level = isinstance(value, Integral) and value >= 0
    if value is not None and value != "auto" and not is_level:
        raise ConfigError(
            f'{name} must be "auto", or an integer, at least 0, or None; got {value!r}.'
        )
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisplayOptions(Options):
    """Options of the display."""

    table_depth: int | Literal["auto"] | None = option(
        "auto",
        """Levels of modules in the model table; 0 for the whole model in one line, None for every
        array of every module. "auto" shows every array of a small model, and folds a large one to
        30 lines; `model.txt` then has every array.""",
        check=_depth,
        resume="same run",
    )
    enable_progress_bar: bool = option(
        True, "Whether to show progress, tables and results.", resume="same run"
    )


class Display:
    """Shows a run. Close it on errors, too: `contextlib.closing(display)`.

    By default each method does nothing, except that `track` yields the items and `table` prints.
    """

    def start(self, num_epochs: int | None, steps_per_epoch: int | None) -> None:
        """Starts showing a training.

        Args:
            num_epochs: epochs of the whole run; None if unknown.
            steps_per_epoch: optimizer updates per epoch; None if unknown (shows no time left).
        """

    def compiling(self, what: str) -> None:
        """Shows that a program, such as `"the train step"`, compiles; stops the rate's clock."""

    def running(self) -> None:
        """Shows that the compilation has finished."""

    def advance(self, step: int, epoch: int, examples: int) -> None:
        """Records completed steps. Cheap enough for every step: it draws nothing.

        Args:
            step: optimizer updates completed since the start of the run.
            epoch: the epoch they belong to, counted from 1.
            examples: examples seen since the last call.
        """

    def update(self, metrics: Scalars) -> None:
        """Replaces the metrics of the live display."""

    def epoch_line(self, line: EpochLine) -> None:
        """Prints the line of one completed epoch."""

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Yields the items of an evaluation or a prediction, and shows how many are done.

        Args:
            iterable: the items.
            description: the label to show, such as `"val"`.
            total: number of items; None if unknown.
        """
        return iter(iterable)

    def table(self, rows: Mapping[str, Scalars]) -> None:
        """Prints metrics by split: `{"train": {"loss": 0.31}, "test": {"loss": 0.35}}`."""
        self.print(metrics_table(rows))

    def print(self, content: RenderableType) -> None:
        """Prints a text, or anything that rich can render, above the live display."""

    def close(self) -> None:
        """Removes the live display. A second call does nothing."""


class NullDisplay(Display):
    """Draws nothing."""
