"""When something is due: `Every(100, "steps")`, a value that keeps no count of its own."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Literal, NamedTuple

from distaff.errors import ConfigError, nearest

Unit = Literal["steps", "epochs", "seconds"]


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        step: completed optimizer updates of the whole state.
        epoch: completed passes over the training data.
        seconds: time since training started, by the clock of the loop.
    """

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Every:
    """A cadence: due whenever a multiple of `n` units is reached or passed.

    >>> Every(100, "steps").due(Progress(step=96), Progress(step=104))
    True

    Args:
        n: the interval; a positive integer for steps and epochs, any positive number of seconds.
        unit: "steps", "epochs" or "seconds".

    Raises:
        ConfigError: `n` or `unit` is none of these.
    """

    n: int | float
    unit: Unit

    def __post_init__(self) -> None:
        units = typing.get_args(Unit)
        if self.unit not in units:
            raise ConfigError(f"A cadence has no unit {self.unit!r}. {nearest(self.unit, units)}")
        kinds = (int, float) if self.unit == "seconds" else (int,)
        if type(self.n) not in kinds or not 0 < self.n < math.inf:
            rule = "a positive number" if self.unit == "seconds" else "a positive integer"
            raise ConfigError(
                f"A cadence in {self.unit} must have {rule} as n, but n={self.n!r}. "
                f"For example: Every(1, {self.unit!r})."
            )

    def due(self, previous: Progress, now: Progress) -> bool:
        """Returns whether a multiple of `n` lies in `(previous, now]`.

        Several steps may lie between the two, as when they run in one dispatch: no multiple is
        jumped over, and many at once are due once.

        Args:
            previous: the progress when this was last asked.
            now: the progress at present.
        """
        field = {"steps": "step", "epochs": "epoch", "seconds": "seconds"}[self.unit]
        return getattr(now, field) // self.n > getattr(previous, field) // self.n

    def next_step(self, step: int) -> int:
        """Returns the first step after `step` at which a cadence in steps is due.

        Args:
            step: completed optimizer updates.

        Raises:
            ConfigError: the cadence is in epochs or seconds, whose steps are not known ahead.
        """
        if self.unit != "steps":
            raise ConfigError(
                f"Only a cadence in steps has a next step, but this is {self!r}. Ask `due` instead."
            )
        return int((step // self.n + 1) * self.n)
