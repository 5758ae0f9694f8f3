"""Assignment of parameters to the groups of an optimizer, by path."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError, leaf_name, nearest
from distaff.optim.config import ParamGroup


def group_labels(groups: Sequence[ParamGroup]) -> Callable[[Params], PyTree]:
    """Returns a function from parameters to labels, for `optax.partition`.

    The label of a parameter is the index of the first group whose pattern matches its path, or
    `len(groups)` if none does. The function raises ConfigError if a group gets no parameter.
    """

    def labels(params: Params) -> PyTree:
        labelled = jax.tree_util.tree_map_with_path(
            lambda path, _: _first_match(leaf_name(path), groups), params
        )
        used = set(jax.tree.leaves(labelled))
        for index, group in enumerate(groups):
            if index not in used:
                raise _without_parameters(group.pattern, params)
        return labelled

    return labels


def is_trained(groups: Sequence[ParamGroup]) -> Callable[[Params], PyTree]:
    """Returns a function from parameters to a mask, which is False for frozen ones."""
    labels = group_labels(groups)
    freezes = [*(group.freeze for group in groups), False]
    return lambda params: jax.tree.map(lambda label: not freezes[label], labels(params))


def keeps_statistics(groups: Sequence[ParamGroup]) -> Callable[[str], bool] | None:
    """Returns a predicate for paths of frozen running statistics; None if no group freezes any."""
    if not any(group.freeze and group.freeze_statistics for group in groups):
        return None

    keeps = [*(group.freeze and group.freeze_statistics for group in groups), False]
    return lambda name: keeps[_first_match(name, groups)]


def _first_match(name: str, groups: Sequence[ParamGroup]) -> int:
    matching = (i for i, g in enumerate(groups) if fnmatch.fnmatchcase(name, g.pattern))
    return next(matching, len(groups))


def group_names(groups: Sequence[ParamGroup]) -> list[str]:
    """Returns the name of each group in the log: its pattern without special characters."""
    names: list[str] = []
    for index, group in enumerate(groups):
        name = re.sub(r"[^\w./-]+", "", group.pattern).strip("/.") or "all"
        names.append(f"{name}_{index}" if name in names else name)
    return names


def frozen() -> optax.GradientTransformation:
    """Returns the transformation that leaves parameters unchanged, bit for bit."""
    # optax.set_to_zero would turn -0.0 into 0.0, but x + -0.0 is x for every x.
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
    )


def _without_parameters(pattern: str, params: Params) -> ConfigError:
    names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    if fnmatch.filter(names, pattern):
        return ConfigError(
            f"ParamGroup({pattern!r}) has no effect: earlier groups match all its parameters, and "
            "the first match counts. Put the narrower pattern first."
        )
    return ConfigError(
        "The pattern of a ParamGroup must match the path of a parameter, and "
        f"{pattern!r} matches none. {nearest(pattern, names)}"
    )
