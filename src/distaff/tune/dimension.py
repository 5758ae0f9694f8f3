"""The ranges of options in a search: `Float`, `Int` and `Choice`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeAlias

from distaff.errors import ConfigError

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | None"
"""One value of a `Choice`."""

When: TypeAlias = Mapping[str, Any] | None
"""Conditions by path: `{"optimizer.name": "sgd"}`, or a list of values of which any will do."""


@dataclass(frozen=True)
class Float:
    """A real number from `low` to `high`, inclusive.

    Args:
        low: the smallest value, or the path of another option of the space that gives it.
        high: the largest value, or a path.
        log: whether to sample on a logarithmic scale, as for learning rates.
        when: values of other options of the space that a trial must have for this one to be
            searched: `{"optimizer.name": "sgd"}`. A list means any of its values. In other trials
            the option has the config's own value.

    Raises:
        ConfigError: the bounds are not finite, not in order, or not positive with `log`.
    """

    low: float | str
    high: float | str
    _: KW_ONLY
    log: bool = False
    when: When = None

    def __post_init__(self) -> None:
        _check_bounds(self, int | float)

    def ends(self) -> tuple[float, float]:
        """Returns the extreme values, if they are numbers."""
        return float(self.low), float(self.high)


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`, inclusive.

    Args:
        low: the smallest value, or the path of another option of the space that gives it.
        high: the largest value, or a path.
        log: whether to sample on a logarithmic scale, as for widths of layers.
        when: conditions on other options, as of `Float`.

    Raises:
        ConfigError: the bounds are not integers, not in order, or not positive with `log`.
    """

    low: int | str
    high: int | str
    _: KW_ONLY
    log: bool = False
    when: When = None

    def __post_init__(self) -> None:
        _check_bounds(self, int)

    def ends(self) -> tuple[int, int]:
        """Returns the extreme values, if they are numbers."""
        return int(self.low), int(self.high)


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Args:
        *values: strings, finite numbers, booleans, None, or tuples of these.
        when: conditions on other options, as of `Float`.

    Raises:
        ConfigError: there are no values, duplicates, or values of another type.
    """

    values: tuple[Value, ...]
    when: When = None

    def __init__(self, *values: Value, when: When = None) -> None:
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "when", when)
        known = all(map(_is_value, values))
        if not known or not values or len(set(values)) < len(values):
            raise ConfigError(
                "A Choice needs different strings, finite numbers, booleans, None or tuples of "
                f"these, such as Choice('relu', 'gelu'); got Choice{values!r}."
            )

    def ends(self) -> tuple[Any, ...]:
        """Returns all values."""
        return self.values

    def labels(self) -> dict[Any, Any]:
        """Returns the values by what a storage without tuples holds: a tuple's text."""
        return {repr(each) if isinstance(each, tuple) else each: each for each in self.values}


Dimension: TypeAlias = Float | Int | Choice
"""The range of one option."""


def is_searched(dimension: Dimension, values: Mapping[str, Any]) -> bool:
    """Whether a trial with these values searches an option."""
    return all(
        path in values and values[path] in allowed
        for path, allowed in conditions(dimension).items()
    )


def resolved(dimension: Dimension, values: Mapping[str, Any]) -> Dimension:
    """Returns a range whose bounds are numbers, given the values of the options before it."""
    bounds = bounds_by_path(dimension)
    if isinstance(dimension, Choice) or not bounds:
        return dimension
    low, high = (
        values[bound] if isinstance(bound, str) else bound
        for bound in (dimension.low, dimension.high)
    )
    return replace(dimension, low=low, high=high)


def conditions(dimension: Dimension) -> dict[str, tuple[Any, ...]]:
    """Returns the allowed values of other options, by path."""
    when = dimension.when or {}
    return {
        path: tuple(value) if isinstance(value, list) else (value,) for path, value in when.items()
    }


def bounds_by_path(dimension: Dimension) -> list[str]:
    """Returns the paths that a dimension has as bounds."""
    if isinstance(dimension, Choice):
        return []
    return [bound for bound in (dimension.low, dimension.high) if isinstance(bound, str)]


def contains(dimension: Dimension, value: Any) -> bool:
    """Whether a dimension contains a value. Its bounds must be numbers."""
    if isinstance(dimension, Choice):
        return value in dimension.values
    kinds = int if isinstance(dimension, Int) else int | float
    low, high = dimension.ends()
    return is_number(value, kinds) and low <= value <= high


def _check_bounds(dimension: Float | Int, kinds: Any) -> None:
    bounds = (dimension.low, dimension.high)
    numbers: list[Any] = [bound for bound in bounds if not _is_path(bound)]
    if not all(is_number(bound, kinds) for bound in numbers) or numbers != sorted(numbers):
        raise ConfigError(
            f"Bounds must be finite numbers with low <= high, whole in an Int, or paths of other "
            f"options; got {dimension}."
        )
    if dimension.log and not _is_path(dimension.low) and numbers[0] <= 0:
        raise ConfigError(
            f"log=True requires low > 0; got {dimension}. Raise low, or use log=False."
        )


def _is_path(bound: Any) -> bool:
    return isinstance(bound, str) and all(part.isidentifier() for part in bound.split("."))


def is_number(value: Any, kinds: Any) -> bool:
    """Whether a value is a finite number of a kind, and no boolean."""
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _is_value(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_value, value))
    return isinstance(value, bool | str | None) or is_number(value, int | float)
