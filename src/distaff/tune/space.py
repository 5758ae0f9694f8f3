"""The space of a search: options by dotted path, their ranges, and their conditions."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from distaff.core.config.encoding import override, to_json
from distaff.errors import ConfigError, nearest
from distaff.tune.dimension import (
    Choice,
    Dimension,
    bounds_by_path,
    conditions,
    contains,
    is_number,
    is_searched,
    resolved,
)

Space: TypeAlias = Mapping[str, Dimension]
"""Ranges by dotted path: `{"optimizer.learning_rate": Float(1e-4, 1e-2, log=True)}`.

A path leads through dataclasses and mappings. In a mapping such as `optimizer.options`, the key
must exist.
"""

SpaceFn: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""A space as a function: from an Optuna trial to the values of the options by dotted path."""


def check_space(config: Any, space: Space) -> None:
    """Checks that each path exists in a config, which accepts the extreme values.

    Raises:
        ConfigError: a path is unknown, a value is invalid, a condition cannot hold, options depend
            on each other in a circle, or the space is empty.
    """
    if not isinstance(space, Mapping) or not space:
        raise ConfigError('A search needs a space such as {"optimizer.learning_rate": Float(...)}.')
    for path, dimension in space.items():
        if not isinstance(dimension, Dimension):
            raise ConfigError(
                f"The space must map paths to Float, Int or Choice; {path!r} has {dimension!r}."
            )
    for path in in_order(space):
        _check_dimension(config, space, path)


def in_order(space: Space) -> list[str]:
    """Returns the paths of a space, each after those on which it depends.

    Raises:
        ConfigError: a condition or bound names no option of the space, or there is a circle.
    """
    graph: dict[str, list[str]] = {}
    for path, dimension in space.items():
        graph[path] = [*(dimension.when or {}), *bounds_by_path(dimension)]
        for other in graph[path]:
            if other not in space:
                raise ConfigError(
                    f"{path!r} depends on {other!r}, which is not in the space. "
                    f"{nearest(other, space)}"
                )
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise ConfigError(
            f"Options depend on each other in a circle: {' on '.join(map(repr, error.args[1]))}. "
            "Remove one of the conditions."
        ) from error
    placed: dict[str, None] = {}

    def place(path: str) -> None:
        for other in graph[path]:
            place(other)
        placed.setdefault(path)

    for path in space:
        place(path)
    return list(placed)


def own_values(config: Any, space: Space) -> dict[str, Any] | None:
    """Returns the config's own values of the options that it searches; None if one is outside."""
    found: dict[str, Any] = {}
    for path in in_order(space):
        if not is_searched(space[path], found):
            continue
        value = value_at(config, path)
        try:
            is_inside = contains(resolved(space[path], found), value)
        except ConfigError:  # no range is left between the bounds
            is_inside = False
        if not is_inside:
            return None
        found[path] = value
    return found


def _check_dimension(config: Any, space: Space, path: str) -> None:
    dimension, needed = space[path], _needed(space, path)
    for other, allowed in needed.items():
        if not any(_can_be(space, other, value) for value in allowed):
            raise ConfigError(
                f"{path!r} is searched only if {other!r} is {' or '.join(map(repr, allowed))}, "
                f"which it never is: {space[other]}. Correct the condition."
            )
    for other in bounds_by_path(dimension):
        if _needed(space, other).items() - needed.items():
            raise ConfigError(
                f"{path!r} has the bound {other!r}, which is not searched in all of its trials. "
                f"Give {path!r} the same conditions."
            )
    parents = {other: allowed[0] for other, allowed in needed.items()}
    is_choice = isinstance(dimension, Choice)
    for value in dimension.ends() if is_choice else _extent(space, path):
        try:
            override(config, {**parents, path: value})
        except ConfigError as error:
            raise ConfigError(f"{path!r} cannot be searched as {dimension}: {error}") from error


def _can_be(space: Space, path: str, value: Any) -> bool:
    dimension = space[path]
    if not isinstance(dimension, Choice):
        low, high = _extent(space, path)
        dimension = replace(dimension, low=low, high=high)
    return contains(dimension, value)


def _extent(space: Space, path: str) -> tuple[Any, ...]:
    """Returns the extreme values that an option can have.

    Raises:
        ConfigError: a bound is an option without numbers, or the bounds cross.
    """
    dimension = space[path]
    if isinstance(dimension, Choice):
        values: Any = dimension.values
        if not all(is_number(value, int | float) for value in values):
            raise ConfigError(f"{path!r} is a bound, so all its values must be numbers.")
        return min(values), max(values)
    bounds: tuple[Any, Any] = (dimension.low, dimension.high)
    lows, highs = (
        _extent(space, bound) if isinstance(bound, str) else (bound, bound) for bound in bounds
    )
    if lows[1] > highs[0]:
        raise ConfigError(
            f"The bounds of {path!r} must not cross, but low can be {lows[1]} where high is "
            f"{highs[0]}: {dimension}. Change the ranges of its bounds."
        )
    return replace(dimension, low=lows[0], high=highs[1]).ends()


def _needed(space: Space, path: str) -> dict[str, tuple[Any, ...]]:
    """Returns the values of other options that a trial must have to search an option."""
    found: dict[str, tuple[Any, ...]] = {}
    for other, allowed in conditions(space[path]).items():
        for each, values in {**_needed(space, other), other: allowed}.items():
            both = tuple(value for value in values if value in found.get(each, values))
            if not both:
                raise ConfigError(
                    f"{path!r} is never searched: {each!r} would have to be "
                    f"{' or '.join(map(repr, found[each]))}, and also "
                    f"{' or '.join(map(repr, values))}. Correct the conditions."
                )
            found[each] = both
    return found


def space_to_json(space: Space) -> dict[str, Any]:
    """Returns a space as strict JSON."""
    found = {}
    for path, dimension in sorted(space.items()):
        fields = to_json(dimension)
        if dimension.when is None:
            del fields["when"]
        found[path] = {"kind": type(dimension).__name__, **fields}
    return found


def values_of(config: Any, space: Space) -> dict[str, Any]:
    """Returns the values of a config at the paths of a space."""
    return {path: value_at(config, path) for path in space}


def value_at(config: Any, path: str) -> Any:
    """Returns the value of a config at a dotted path."""
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def drawn(space: Space, suggest: Callable[[str, Dimension], Any]) -> dict[str, Any]:
    """Returns the values of a trial, each from a function of the path and its range."""
    values: dict[str, Any] = {}
    for path in in_order(space):
        if is_searched(space[path], values):
            values[path] = suggest(path, resolved(space[path], values))
    return values


def stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as a storage without tuples holds them."""
    return {n: repr(value) if isinstance(value, tuple) else value for n, value in values.items()}


def restored(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values from a storage, with their tuples."""
    choices = {path: x.labels() for path, x in space.items() if isinstance(x, Choice)}
    return {
        path: choices[path].get(value, value) if path in choices else value
        for path, value in values.items()
    }


def with_tuples(value: Any) -> Any:
    """Returns a value from JSON with tuples for its lists."""
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value
