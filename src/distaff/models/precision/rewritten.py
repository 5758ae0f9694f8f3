"""Evaluates a pass of a model with rules for some of its operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distaff.core.rewriter import Rewriter, Rule
from distaff.errors import ConfigError, leaf_name

_OUTPUTS = (jax.Array, bool, int, float, complex, str, bytes, np.ndarray, np.generic)


def rewritten(
    function: Callable[[Any], Any],
    variables: Any,
    rules: Mapping[str, Rule],
    option: str,
    model: str,
) -> Any:
    """Returns `function(variables)`, evaluated with rules.

    Args:
        function: a pass of a model; it may close over its inputs.
        variables: a pytree of arrays, whose paths are the names of their sources.
        rules: rules by primitive; see `Rewriter`.
        option: name of the trainer's option, for errors.
        model: name of the model, for errors.

    Raises:
        ConfigError: the pass returns something else than a pytree of arrays.
    """
    found: list[Any] = []

    def traced(variables: Any) -> list[jax.Array]:
        found[:], structure = jax.tree.flatten(function(variables))
        found.append(structure)
        _check_outputs(found[:-1], option, model)
        return [leaf for leaf in found[:-1] if isinstance(leaf, jax.Array)]

    paths = [path for path, _ in jax.tree.leaves_with_path(variables)]
    sources = [frozenset({_name_in_collection(path)}) for path in paths]
    results = iter(Rewriter(rules)(traced, variables, sources=sources))
    *leaves, structure = found
    outputs = [next(results) if isinstance(x, jax.Array) else x for x in leaves]
    return jax.tree.unflatten(structure, outputs)


def _name_in_collection(path: tuple[Any, ...]) -> str:
    """Returns the path of a variable in its collection, as patterns for parameters have it."""
    collections = ("collections",) if len(path) > 2 else ()
    start = 1 + (leaf_name(path[:1]) in collections)
    return leaf_name(path[start:])


def _check_outputs(leaves: list[Any], option: str, model: str) -> None:
    for leaf in leaves:
        if not isinstance(leaf, _OUTPUTS):
            raise ConfigError(
                f"{option} needs a model whose outputs are a pytree of arrays, because its forward "
                f"pass is evaluated again with other rules; {model} returned an object of the "
                f"class {type(leaf).__name__}. Return arrays, and create the object in the loss."
            )
