"""Rematerialization of Flax NNX modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from distaff.models.remat.checkpointed import Results, split
from distaff.models.remat.options import RematConfig


def rematerialize(modules: Mapping[tuple[str, ...], Any], remat: RematConfig) -> None:
    """Gives matching modules a class whose call is computed again in the backward pass, in place.

    Args:
        modules: a module and its submodules by path; those inside a matching one do not change.
        remat: the modules that match.
    """
    done: set[tuple[str, ...]] = set()
    for path in sorted(modules, key=len):
        is_inside = any(path[:n] in done for n in range(1, len(path)))
        if not is_inside and remat.matches("/".join(path)):
            done.add(path)
            object.__setattr__(modules[path], "__class__", _again(type(modules[path]), remat))


@functools.cache
def _again(cls: Any, remat: RematConfig) -> Any:
    """Returns a subclass whose call is computed again; it is also used inside loops over layers."""
    method: Callable[..., Any] = cls.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        dynamic, rebuild = split((args, kwargs), _is_dynamic, is_leaf=_is_node)
        results = Results(cls.__name__)
        unchanged: set[Any] = set()

        def run(module: Any, dynamic: Mapping[int, Any]) -> dict[int, jax.Array]:
            args, kwargs = rebuild(dynamic)
            before = _values(module)
            found = results.take(method(module, *args, **kwargs), dynamic)
            after = _values(module)
            unchanged.update(path for path, x in before.items() if after.get(path) is x)
            return found

        before = _values(self)
        arrays = nnx.remat(run, policy=remat.saveable)(self, dynamic)
        for path, variable in _variables(self).items():
            if path in unchanged:  # The same object, by which a pass knows what it has changed.
                variable.set_value(before[path])
        return results.rebuilt(arrays, dynamic)

    namespace = {"__call__": functools.wraps(method)(call), "__module__": cls.__module__}
    return type(cls)(cls.__name__, (cls,), {**namespace, "__qualname__": cls.__qualname__})


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Module | nnx.Variable | nnx.Rngs | nnx.RngStream)


def _is_dynamic(leaf: Any) -> bool:
    return _is_node(leaf) or isinstance(leaf, jax.Array)


def _variables(module: Any) -> dict[Any, Any]:
    """Returns the variables of a module by path."""
    leaves = nnx.iter_graph(module)
    return {path: leaf for path, leaf in leaves if isinstance(leaf, nnx.Variable)}


def _values(module: Any) -> dict[Any, Any]:
    return {path: leaf.get_value() for path, leaf in _variables(module).items()}
