"""The names of a model's arrays: "/"-joined paths, as parameter groups and errors have them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from distaff.core.typing import PyTree
from distaff.errors import CheckpointError, ConfigError, leaf_name
from distaff.models import Variables
from distaff.step.state import TrainState

_ALL = 500
"""How many leaves an error lists; a stranger's file may have any number."""


def as_variables(tree: PyTree) -> Variables:
    """Returns the arrays of a model as `Variables`.

    Args:
        tree: `Variables`, a `TrainState`, a dict with the key `params` and other collections
            beside it, as Linen has it, or parameters alone.
    """
    if isinstance(tree, Variables):
        return tree
    if isinstance(tree, TrainState):
        return Variables(tree.params, tree.batch_stats, tree.collections)
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        rest = {name: value for name, value in tree.items() if name != "params"}
        return Variables(tree["params"], rest.pop("batch_stats", None), rest or None)
    return Variables(tree)


def parts(variables: Variables) -> dict[str, PyTree]:
    """Returns the collections of a model by the prefix of their arrays; that of `params` is ""."""
    others = {**(variables.collections or {})}
    if variables.batch_stats is not None:
        others["batch_stats"] = variables.batch_stats
    return {"": variables.params, **{f"{name}/": tree for name, tree in others.items()}}


def named(tree: PyTree) -> dict[str, Any]:
    """Returns the arrays of a model by name.

    A parameter has its path as name, `encoder/Dense_0/kernel`; an array of any other collection
    has the collection before it, `batch_stats/BatchNorm_0/mean`.

    Args:
        tree: see `as_variables`.

    Raises:
        CheckpointError: two arrays have the same name.
    """
    found: dict[str, Any] = {}
    for prefix, part in parts(as_variables(tree)).items():
        for path, leaf in jax.tree.leaves_with_path(part):
            name = prefix + leaf_name(path)
            if name in found:
                raise CheckpointError(
                    f"Each array has a name of its own; two are called {name!r}. Rename a module."
                )
            found[name] = leaf
    return found


def as_patterns(patterns: Any) -> tuple[str, ...]:
    """Returns shell patterns as a tuple.

    Args:
        patterns: one or several, as those of parameter groups.

    Raises:
        ConfigError: it is something else.
    """
    found = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise ConfigError(
            f"only is a shell pattern such as 'encoder/*', or several; got {patterns!r}."
        )
    return tuple(found)


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Returns the names that at least one pattern matches, in their order.

    Raises:
        ConfigError: a pattern matches none.
    """
    for pattern in patterns:
        is_all_of_none = pattern == "*" and not names
        if not (is_all_of_none or any(fnmatch.fnmatchcase(name, pattern) for name in names)):
            raise ConfigError(
                f"A pattern must match the name of an array, and {pattern!r} matches none. It is a "
                f"shell pattern, in which * stands for any text.{listed(map(repr, names))}"
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, each) for each in patterns)]


def listed(lines: Any) -> str:
    """Returns lines below each other, after a line break; the first few hundred of them."""
    lines = list(lines)
    more = [f"and {len(lines) - _ALL} more"] if len(lines) > _ALL else []
    return "".join(f"\n  {line}" for line in lines[:_ALL] + more)
