"""The space of a search: options by dotted path, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

from distaff.core.config.encoding import override, to_json
from distaff.errors import ConfigError


@dataclass(frozen=True)
class Float:
    """A real number from `low` to `high`, inclusive.

    Args:
        low: the smallest value.
        high: the largest value.
        log: whether to sample on a logarithmic scale, as for learning rates.

    Raises:
        ConfigError: the bounds are not finite, not in order, or not positive with `log`.
    """

    low: float
    high: float
    _: KW_ONLY
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self, int | float)

    def ends(self) -> tuple[float, float]:
        """Returns the extreme values."""
        return float(self.low), float(self.high)


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`, inclusive.

    Args:
        low: the smallest value.
        high: the largest value.
        log: whether to sample on a logarithmic scale, as for widths of layers.

    Raises:
        ConfigError: the bounds are not integers, not in order, or not positive with `log`.
    """

    low: int
    high: int
    _: KW_ONLY
    log: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self, int)

    def ends(self) -> tuple[int, int]:
        """Returns the extreme values."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Args:
        *values: strings, finite numbers, booleans or None.

    Raises:
        ConfigError: there are no values, duplicates, or values of another type.
    """

    values: tuple[bool | int | float | str | None, ...]

    def __init__(self, *values: bool | int | float | str | None) -> None:
        object.__setattr__(self, "values", values)
        known = all(
            isinstance(value, bool | str | None) or _is_number(value, int | float)
            for value in values
        )
        if not known or not values or len(set(values)) < len(values):
            raise ConfigError(
                "A Choice needs different strings, finite numbers, booleans or None, such as "
                f"Choice('relu', 'gelu'); got Choice{values!r}."
            )

    def ends(self) -> tuple[Any, ...]:
        """Returns all values."""
        return self.values


Dimension: TypeAlias = Float | Int | Choice
"""The range of one option."""

Space: TypeAlias = Mapping[str, Dimension]
"""Ranges by dotted path: `{"optimizer.learning_rate": Float(1e-4, 1e-2, log=True)}`.

A path leads through dataclasses and mappings. In a mapping such as `optimizer.options`, the key
must exist.
"""


def check_space(config: Any, space: Space) -> None:
    """Checks that each path exists in a config, which accepts the extreme values.

    Raises:
        ConfigError: a path is unknown, a value is invalid, or the space is empty.
    """
    if not space:
        raise ConfigError('A search needs a space such as {"optimizer.learning_rate": Float(...)}.')
    for path, dimension in space.items():
        if not isinstance(dimension, Dimension):
            raise ConfigError(
                f"The space must map paths to Float, Int or Choice; {path!r} has {dimension!r}."
            )
        for value in dimension.ends():
            try:
                override(config, {path: value})
            except ConfigError as error:
                raise ConfigError(f"{path!r} cannot be searched as {dimension}: {error}") from error


def space_to_json(space: Space) -> dict[str, Any]:
    """Returns a space as strict JSON."""
    return {
        path: {"kind": type(dimension).__name__, **to_json(dimension)}
        for path, dimension in sorted(space.items())
    }


def values_of(config: Any, space: Space) -> dict[str, Any]:
    """Returns the values of a config at the paths of a space."""
    return {path: _value_at(config, path) for path in space}


def _value_at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def contains(dimension: Dimension, value: Any) -> bool:
    """Whether a dimension contains a value."""
    if isinstance(dimension, Choice):
        return value in dimension.values
    kinds = int if isinstance(dimension, Int) else int | float
    return _is_number(value, kinds) and dimension.low <= value <= dimension.high


def _check_bounds(dimension: Float | Int, kinds: Any) -> None:
    bounds = (dimension.low, dimension.high)
    if not all(_is_number(bound, kinds) for bound in bounds) or dimension.low > dimension.high:
        raise ConfigError(
            f"Bounds must be finite numbers with low <= high, whole in an Int; got {dimension}."
        )
    if dimension.log and dimension.low <= 0:
        raise ConfigError(
            f"log=True requires low > 0; got {dimension}. Raise low, or use log=False."
        )


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
