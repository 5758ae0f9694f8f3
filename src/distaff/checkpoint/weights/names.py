"""Names of a model's arrays: "/"-joined paths, as in parameter groups and errors."""

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
"""Maximum number of leaves in an error; an untrusted file may have any number."""


def as_variables(tree: PyTree) -> Variables:
    """Returns the arrays of a model as `Variables`.

    Args:
        tree: `Variables`, a `TrainState`, a dict with the key `params` and other collections, as in
            Linen, or parameters alone.
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
    """Returns the collections of a model by the prefix of their names, which is "" for `params`."""
    others = {**(variables.collections or {})}
    if variables.batch_stats is not None:
        others["batch_stats"] = variables.batch_stats
    return {"": variables.params, **{f"{name}/": tree for name, tree in others.items()}}


def named(tree: PyTree) -> dict[str, Any]:
    """Returns the arrays of a model by name.

    The name of a parameter is its path, `encoder/Dense_0/kernel`; the name of any other array
    starts with its collection, `batch_stats/BatchNorm_0/mean`. See `as_variables` for `tree`.

    Raises:
        CheckpointError: two arrays have the same name.
    """
    found: dict[str, Any] = {}
    for prefix, part in parts(as_variables(tree)).items():
        for path, leaf in jax.tree.leaves_with_path(part):
            name = prefix + leaf_name(path)
            if name in found:
                raise CheckpointError(
                    f"Each array needs a unique name; two are called {name!r}. Rename a module."
                )
            found[name] = leaf
    return found


def as_patterns(patterns: Any) -> tuple[str, ...]:
    """Returns one or several shell patterns as a tuple.

    Raises:
        ConfigError: `patterns` is something else.
    """
    found = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise ConfigError(
            f"only is a shell pattern such as 'encoder/*', or several; got {patterns!r}."
        )
    return tuple(found)


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Returns the names that match at least one pattern, in their order.

    Raises:
        ConfigError: a pattern matches none.
    """
    for pattern in patterns:
        is_trivial = pattern == "*" and not names
        if not (is_trivial or any(fnmatch.fnmatchcase(name, pattern) for name in names)):
            raise ConfigError(
                f"A pattern must match the name of an array; {pattern!r} matches none. Patterns "
                f"are shell patterns, in which * matches any text.{listed(map(repr, names))}"
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, each) for each in patterns)]


def listed(lines: Any) -> str:
    """Returns indented lines, each after a line break, up to a maximum number."""
    lines = list(lines)
    more = [f"and {len(lines) - _ALL} more"] if len(lines) > _ALL else []
    return "".join(f"\n  {line}" for line in lines[:_ALL] + more)
