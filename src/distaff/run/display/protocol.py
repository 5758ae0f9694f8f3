"""What a display is: how a run shows itself to the person who waits for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, TypeVar

from rich.console import RenderableType

from distaff.core.config.options import Options, option
from distaff.core.typing import Scalars
from distaff.errors import ConfigError

T = TypeVar("T")


def _depth(name: str, value: Any) -> Any:
    if value is not None and (not isinstance(value, Integral) or value < 0):
        raise ConfigError(f"{name} is a whole number, at least 0, or None; got {value!r}.")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisplayOptions(Options):
    """What a trainer shows."""

    table_depth: int | None = option(
        None,
        """Levels of modules in the model table, 0 for the whole model in one line; None for every
        module and each of its arrays.""",
        check=_depth,
        resume="same run",
    )
    enable_progress_bar: bool = option(True, "False draws nothing.", resume="same run")


class Display:
    """Shows a run. Close it also on an error: `contextlib.closing(display)`.

    Each method does nothing here, but `track`, which yields the items.
    """

    def start(self, num_epochs: int, steps_per_epoch: int | None) -> None:
        """Begins to show a training.

        Args:
            num_epochs: epochs of the whole run.
            steps_per_epoch: optimizer updates per epoch; without it no time left is shown.
        """

    def compiling(self, what: str) -> None:
        """Says that a program, such as `"the train step"`, compiles; its time is in no rate."""

    def running(self) -> None:
        """Says that the compilation is over."""

    def advance(self, step: int, epoch: int, examples: int) -> None:
        """Notes completed steps. Called at every step, and cheap: it draws nothing.

        Args:
            step: optimizer updates completed since the beginning of the run.
            epoch: the epoch they belong to, counted from 1.
            examples: examples seen since the last call.
        """

    def update(self, metrics: Scalars) -> None:
        """Replaces the metrics that the live display shows."""

    def epoch_line(
        self,
        epoch: int,
        num_epochs: int,
        step: int,
        metrics: Scalars,
        seconds: float,
        is_best: bool,
    ) -> None:
        """Writes the line of one completed epoch.

        Args:
            epoch: the epoch, counted from 1.
            num_epochs: epochs of the whole run.
            step: optimizer updates completed.
            metrics: metrics as `{"train/loss": 0.31, "val/loss": 0.35}`.
            seconds: how long the epoch took.
            is_best: whether its model is the best so far; the line then ends with a star.
        """

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Yields the items of an evaluation or a prediction, and shows how many are done.

        Args:
            iterable: what to go through.
            description: what is being done, such as `"validating"`.
            total: number of items, where it is known.
        """
        return iter(iterable)

    def table(self, rows: Mapping[str, Scalars]) -> None:
        """Writes metrics by split, such as `{"train": {"loss": 0.31}, "test": {"loss": 0.35}}`."""

    def print(self, content: RenderableType) -> None:
        """Writes a text, or anything that rich can render, above the live display."""

    def close(self) -> None:
        """Removes the live display; a second call does nothing."""


class NullDisplay(Display):
    """Draws nothing."""
