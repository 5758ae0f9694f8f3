"""Cadences: `"500 steps"`, `"1e8 tokens"`, `"10m"`, or a number of an option's obvious unit."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from distaff.core.config.checks import as_float
from distaff.core.config.durations import seconds_of
from distaff.errors import ConfigError, nearest

Unit: TypeAlias = Literal["steps", "epochs", "examples", "tokens", "seconds"]

_EXAMPLES: dict[Unit, str] = {
    "steps": "'500 steps'",
    "epochs": "'2 epochs'",
    "examples": "'50000 examples'",
    "tokens": "'1e9 tokens'",
    "seconds": "'10m'",
}
_WORDS: dict[str, Unit] = {
    word: unit for unit in _EXAMPLES if unit != "seconds" for word in (unit, unit.removesuffix("s"))
}
_COUNT = re.compile(r"\s*([0-9][0-9_.]*(?:e\+?[0-9]+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


class Count(NamedTuple):
    """The examples, tokens or seconds of a run so far.

    Attributes:
        before: their number before the last step.
        now: their number after it.
    """

    before: float
    now: float


@dataclasses.dataclass(frozen=True)
class Every:
    """How often something is done: at each multiple of a number of steps or epochs, or by time.

    >>> str(Every(500, "steps")), str(Every(1, "epochs")), str(Every(600, "seconds"))
    ('500 steps', '1 epoch', '600s')

    Args:
        count: number of units, positive; an integer except for seconds.
        unit: `"steps"`, `"epochs"`, `"examples"`, `"tokens"` or `"seconds"`. Steps are completed
            optimizer steps of the model, over all epochs and runs; examples and tokens count in the
            training batches of one run.

    Raises:
        ConfigError: `count` or `unit` is out of range.
    """

    count: float
    unit: Unit

    def __post_init__(self) -> None:
        count = as_float(self.count)
        is_whole = self.unit == "seconds" or count % 1 == 0
        if self.unit not in _EXAMPLES or not 0 < count < math.inf or not is_whole:
            raise ConfigError(
                "Every needs a positive number of seconds, or a positive integer of steps, epochs, "
                f"examples or tokens; got Every({self.count!r}, {self.unit!r})."
            )
        object.__setattr__(self, "count", count if self.unit == "seconds" else int(count))

    def __str__(self) -> str:
        if self.unit == "seconds":
            return f"{np.format_float_positional(self.count, trim='-')}s"
        return f"{self.count} {self.unit.removesuffix('s') if self.count == 1 else self.unit}"

    def left(self, step: int) -> int:
        """Returns the number of steps until it is next due, at least 1, for a number of steps."""
        return int(self.count) - step % int(self.count)

    def is_due(self, unit: Unit, number: int) -> bool:
        """Whether it is due after so many completed steps or epochs; False for another unit."""
        return self.unit == unit and number % int(self.count) == 0

    def is_passed(self, count: Count) -> bool:
        """Whether the last step reached or passed a multiple of it."""
        return count.now // self.count > count.before // self.count


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The form of an option that says how often something is done.

    Args:
        units: the units that the option accepts.
        number: the unit of a number without a unit; None to require a unit.
        why: why there are no other units, for the error.
    """

    units: tuple[Unit, ...]
    number: Unit | None = None
    why: str = ""

    def check(self, name: str, value: Any) -> Any:
        """Returns a valid value in the user's spelling, and an `Every` as a string.

        Raises:
            ConfigError: the value is not a cadence, or has another unit.
        """
        every = self.parse(name, value)
        if isinstance(value, str | timedelta):
            return value
        return str(every) if isinstance(value, Every) else every.count

    def parse(self, name: str, value: Any) -> Every:
        """Parses a value.

        >>> Cadence(("seconds", "steps"), number="seconds").parse("save_every", "500 steps")
        Every(count=500, unit='steps')

        Args:
            name: name of the option, for the error.
            value: an `Every`; a string such as `"500 steps"`, `"2 epochs"` or a duration; or a
                number, if the option has an obvious unit.

        Raises:
            ConfigError: the value is not a cadence, or has another unit.
        """
        try:
            every = self._parsed(value)
        except ConfigError:
            every = None
        if every is not None and every.unit in self.units:
            return every
        examples = [_EXAMPLES[unit] for unit in self.units]
        listed = " or ".join(filter(None, (", ".join(examples[:-1]), examples[-1])))
        number = f", or a number of {self.number}" if self.number else ""
        raise ConfigError(
            f"{name} must be a positive cadence such as {listed}{number}; got {value!r}. "
            f"{self._remedy(value, every)}".rstrip()
        )

    def _parsed(self, value: Any) -> Every | None:
        """Returns the cadence; None, or an error, for any other value."""
        if isinstance(value, Every):
            return value
        if isinstance(value, timedelta):
            return Every(value.total_seconds(), "seconds")
        match = _COUNT.fullmatch(value) if isinstance(value, str) else None
        unit = _WORDS.get(match[2].lower()) if match else None
        if match and (unit or not match[2]):
            value = _number_in(match[1])
        elif isinstance(value, str):
            return Every(seconds_of(value), "seconds")
        unit = unit or self.number
        return None if unit is None else Every(value, unit)

    def _remedy(self, value: Any, every: Every | None) -> str:
        if every is not None:
            return self.why or f"It has no unit {every.unit!r}."
        found = re.search(r"[a-zA-Z]+$", value.strip()) if isinstance(value, str) else None
        word = found[0] if found else ""
        if word and word.lower() not in _WORDS:
            return f"It has no unit {word!r}. {nearest(word.lower(), self.units)}"
        if self.number is None and not math.isnan(as_float(value)):
            return "Write the unit, too."
        return ""


def _number_in(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
