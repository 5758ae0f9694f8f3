"""Short descriptions of objects, for `repr` and for notebooks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from distaff.core.views import html
from distaff.errors import leaf_name

_MOST_LEAVES = 6


def brief(owner: Any, *facts: str) -> str:
    """Returns `Class(fact, fact)`, without empty facts."""
    return f"{type(owner).__name__}({', '.join(filter(None, facts))})"


def num_values(tree: Any) -> int:
    """Returns the number of values in the arrays of a pytree."""
    return sum(math.prod(shape) for _, shape, _ in leaves(tree))


def leaves(tree: Any) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Yields name, shape and dtype of each array of a pytree; reads no values."""
    import jax  # here, so that the help of a command starts without it

    for path, leaf in jax.tree.leaves_with_path(tree):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            yield leaf_name(path), tuple(leaf.shape), leaf.dtype


def spec(tree: Any) -> str:
    """Returns the arrays of a pytree: `image float32[64, 8, 8, 1], label int32[64]`."""
    found = [f"{name} {dtype}{list(shape)}" for name, shape, dtype in leaves(tree)]
    more = len(found) - _MOST_LEAVES
    return ", ".join([*found[:_MOST_LEAVES], *([f"{more} more"] if more > 0 else [])])


def arrays_table(tree: Any) -> str:
    """Returns the arrays of a pytree as an HTML table."""
    rows = [
        [name, str(list(shape)), str(dtype), f"{math.prod(shape):,}"]
        for name, shape, dtype in leaves(tree)
    ]
    return html.table(["array", "shape", "dtype", "values"], rows, left=3)


def length(loader: Any) -> str:
    """Returns the number of batches of a loader in words; empty if it is unknown."""
    try:
        return f"{len(loader):,} batches"
    except TypeError:
        return ""


def scalar(value: Any) -> str:
    """Returns a number of the host or the device; its shape if it cannot be read."""
    import numpy as np

    try:
        return str(np.asarray(value))
    except Exception:  # traced, or donated to a step
        return str(getattr(value, "aval", "?"))


def changed(instance: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that differ from their defaults."""
    found = {}
    for field in dataclasses.fields(instance):
        factory: Any = field.default_factory
        is_made = factory is not dataclasses.MISSING
        value, default = getattr(instance, field.name), factory() if is_made else field.default
        if field.repr and (type(value) is not type(default) or not _is_equal(value, default)):
            found[field.name] = value
    return found


def brief_fields(instance: Any, *, first: str = "") -> str:
    """Returns `Class(name=value)` with the fields that differ from their defaults.

    Args:
        instance: a dataclass instance.
        first: a field to show first, by position, also if it has its default.
    """
    shown = [repr(getattr(instance, first))] if first else []
    own = [f"{name}={value!r}" for name, value in changed(instance).items() if name != first]
    return brief(instance, *shown, *own)


def fields_table(instance: Any) -> str:
    """Returns the fields of a dataclass as HTML: those that were changed, and all on a click."""
    own = changed(instance)
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    title = html.preformatted(type(instance).__name__)
    shown = [[name, repr(value)] for name, value in own.items()]
    rest = [[name, repr(value)] for name, value in values.items() if name not in own]
    head = html.table(["", ""], shown, left=2) if shown else ""
    return f"{title}{head}{html.details('defaults', html.table(['', ''], rest, left=2))}"


def _is_equal(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    except Exception:  # such as arrays
        return False
