"""`jax.checkpoint` for functions whose arguments and results are not all arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff.errors import ConfigError

_PLAIN = (bool, int, float, complex, str, bytes, np.ndarray, np.generic)


def checkpointed(
    function: Callable[..., Any], policy: Callable[..., bool] | None, model: str
) -> Callable[..., Any]:
    """Returns a function whose intermediate results are computed again in the backward pass.

    Args:
        function: a function of pytrees; leaves that are not arrays are constants.
        policy: what is stored all the same; see `jax.checkpoint`.
        model: name of the module, for errors.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays, rebuild = split((args, kwargs))
        results = Results(model)

        def traced(arrays: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
            args, kwargs = rebuild(arrays)
            return results.take(function(*args, **kwargs), arrays)

        return results.rebuilt(jax.checkpoint(traced, policy=policy)(arrays), arrays)

    return run


def split(
    tree: Any,
    is_dynamic: Callable[[Any], bool] = lambda leaf: isinstance(leaf, jax.Array),
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[dict[int, Any], Callable[[Mapping[int, Any]], Any]]:
    """Splits a pytree into its arrays by number, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    dynamic = {n: leaf for n, leaf in enumerate(leaves) if is_dynamic(leaf)}
    constants = {n: leaf for n, leaf in enumerate(leaves) if n not in dynamic}

    def rebuild(arrays: Mapping[int, Any]) -> Any:
        by_number = {**constants, **arrays}
        return jax.tree.unflatten(structure, [by_number[n] for n in range(len(by_number))])

    return dynamic, rebuild


class _Input(NamedTuple):
    """A result that is an input, unchanged."""

    number: int


class _Output(NamedTuple):
    """A result that a function computes."""

    number: int
    dtype: Any


class Results:
    """The results of one call, taken apart inside the trace and put together outside.

    An unchanged input is not a result of the program: outside it is the same object, by which a
    pass knows what it has changed.

    Args:
        model: name of the module, for errors.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._leaves: list[Any] = []
        self._structure: Any = None

    def take(self, results: Any, inputs: Mapping[int, Any]) -> dict[int, jax.Array]:
        """Returns the arrays among results that a call computes, by number.

        Raises:
            ConfigError: a result is neither an array nor a plain value.
        """
        leaves, self._structure = jax.tree.flatten(results)
        of_input = {id(leaf): n for n, leaf in inputs.items()}
        found: dict[int, jax.Array] = {}
        self._leaves = []
        for number, leaf in enumerate(leaves):
            if id(leaf) in of_input:
                self._leaves.append(_Input(of_input[id(leaf)]))
            elif isinstance(leaf, jax.Array):
                self._leaves.append(_Output(number, leaf.dtype))
                found[number] = leaf
            else:
                self._leaves.append(self._plain(leaf))
        return found

    def rebuilt(self, arrays: Mapping[int, Any], inputs: Mapping[int, Any]) -> Any:
        """Returns the results, given their arrays and the inputs of the call."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, _Input):
                return inputs[leaf.number]
            if not isinstance(leaf, _Output):
                return leaf
            found = arrays[leaf.number]
            # A constant may come out of a gradient of `jax.checkpoint` as a Python number.
            return found if isinstance(found, jax.Array) else jnp.asarray(found, leaf.dtype)

        return jax.tree.unflatten(self._structure, [value(leaf) for leaf in self._leaves])

    def _plain(self, leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN):
            return leaf
        raise ConfigError(
            "remat needs modules whose outputs are pytrees of arrays, because they are computed "
            f"again in the backward pass; {self._model} returned an object of the class "
            f"{type(leaf).__name__}. Return arrays, and create the object outside."
        )
