"""The space of a search: which options vary, by dotted path, and between what values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

from distaff.core.config.encoding import override, to_json
from distaff.errors import ConfigError


@dataclass(frozen=True)
class Float:
    """A real number from `low` to `high`, both included.

    Args:
        low: the smallest value.
        high: the largest one.
        log: whether its logarithm is searched evenly, as for learning rates.

    Raises:
        ConfigError: the bounds are not finite, or not in order, or not positive where `log` is on.
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
    """A whole number from `low` to `high`, both included.

    Args:
        low: the smallest value.
        high: the largest one.
        log: whether its logarithm is searched evenly, as for widths of layers.

    Raises:
        ConfigError: the bounds are not whole, or not in order, or not positive where `log` is on.
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
        ConfigError: there is none, one is there twice, or one is of another kind.
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
                "A Choice is between different strings, finite numbers, booleans or None, such as "
                f"Choice('relu', 'gelu'); got Choice{values!r}."
            )

    def ends(self) -> tuple[Any, ...]:
        """Returns all values."""
        return self.values


Dimension: TypeAlias = Float | Int | Choice
"""How one option varies."""

Space: TypeAlias = Mapping[str, Dimension]
"""What varies, by dotted path: `{"optimizer.learning_rate": Float(1e-4, 1e-2, log=True)}`.

A path leads through dataclasses and mappings; of a mapping such as `optimizer.options`, keys that
the config has can vary.
"""


def check_space(config: Any, space: Space) -> None:
    """Checks that each path exists in a config, and that its extreme values are allowed there.

    Raises:
        ConfigError: one does not, or is not; or the space is empty.
    """
    if not space:
        raise ConfigError('A search needs a space such as {"optimizer.learning_rate": Float(...)}.')
    for path, dimension in space.items():
        if not isinstance(dimension, Dimension):
            raise ConfigError(
                f"The space holds a Float, an Int or a Choice by path; {path!r} has {dimension!r}."
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
    """Returns what a config holds at the paths of a space."""
    return {path: _value_at(config, path) for path in space}


def _value_at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def contains(dimension: Dimension, value: Any) -> bool:
    """Tells whether a value is one that a dimension can take."""
    if isinstance(dimension, Choice):
        return value in dimension.values
    kinds = int if isinstance(dimension, Int) else int | float
    return _is_number(value, kinds) and dimension.low <= value <= dimension.high


def _check_bounds(dimension: Float | Int, kinds: Any) -> None:
    bounds = (dimension.low, dimension.high)
    if not all(_is_number(bound, kinds) for bound in bounds) or dimension.low > dimension.high:
        raise ConfigError(
            f"Bounds are finite numbers with low <= high, whole ones in an Int; got {dimension}."
        )
    if dimension.log and dimension.low <= 0:
        raise ConfigError(
            f"A logarithm needs low > 0; got {dimension}. Raise low, or use log=False."
        )


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
