"""Flax Linen modules behind the functional face."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from distaff.errors import leaf_name
from distaff.models.adapter import LayerRow, Variables
from distaff.typing import Key

_TRAIN_FLAGS = ("train", "training", "is_training")
_EVAL_FLAGS = ("deterministic", "use_running_average")


class LinenModel:
    """A `flax.linen.Module` as pure functions.

    Whether to train is told under the name the called method has for it: `train`, `training`,
    `is_training`, or, inverted, `deterministic` or `use_running_average`; a method with none of
    them is called without. Every random stream, whatever its name, draws from the one key that a
    pass is given (Linen falls back to the stream `params` for names it does not find).

    Args:
        module: an unbound Linen module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """`module.apply`."""
        return self.module.apply

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Makes the variables for inputs shaped like these, as in training."""
        return _split(self._init(key, *inputs))

    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; in training, every collection but `params` may change."""
        collections = _join(variables)
        mutable = [name for name in collections if name != "params"] if train else []
        call = functools.partial(
            self.module.apply,
            collections,
            *inputs,
            rngs=None if key is None else _streams(key),
            **{**self._mode(kwargs.get("method"), train), **kwargs},
        )
        if "mutable" in kwargs or not mutable:
            return call(), variables
        outputs, changed = call(mutable=mutable)
        return outputs, _split({**collections, **changed})

    def bind(self, variables: Variables) -> nn.Module:
        """Returns `module.bind(variables)`: call it as in Linen, `bound(x, train=False)`."""
        return self.module.bind(_join(variables))

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in order of call, by abstract evaluation."""
        rows: dict[tuple[str, ...], tuple[str, str]] = {}

        def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            called, kind = context.method_name == "__call__", type(context.module).__name__
            if called:
                rows.setdefault(context.module.path, (kind, ""))
            outputs = next_call(*args, **kwargs)
            if called:
                rows[context.module.path] = (kind, _describe(outputs))
            return outputs

        def init(key: Key, *inputs: Any) -> Any:
            with nn.intercept_methods(record):
                return self._init(key, *inputs)

        variables = jax.eval_shape(init, key, *inputs)
        owned = _by_module(variables, set(rows))
        return [
            LayerRow("/".join(path), kind, output, tuple(owned.get(path, ())))
            for path, (kind, output) in rows.items()
        ]

    def _init(self, key: Key, *inputs: Any) -> Any:
        mode: dict[str, Any] = self._mode(None, True)
        return self.module.init(_streams(key), *inputs, **mode)

    def _mode(self, method: Callable[..., Any] | str | None, train: bool) -> dict[str, bool]:
        if method is None:
            method = type(self.module).__call__
        elif isinstance(method, str):
            method = getattr(type(self.module), method)
        accepted = inspect.signature(method).parameters
        for name in _TRAIN_FLAGS:
            if name in accepted:
                return {name: train}
        for name in _EVAL_FLAGS:
            if name in accepted:
                return {name: not train}
        return {}


def _streams(key: Key) -> dict[str, Key]:
    return {"params": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}


def _join(variables: Variables) -> dict[str, Any]:
    collections = {"params": variables.params, **(variables.collections or {})}
    if variables.batch_stats is not None:
        collections["batch_stats"] = variables.batch_stats
    return collections


def _split(collections: Mapping[str, Any]) -> Variables:
    rest = dict(collections)
    params, batch_stats = rest.pop("params", {}), rest.pop("batch_stats", None)
    return Variables(params, batch_stats, rest or None)


def _describe(outputs: Any) -> str:
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "shape")]
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for leaf in leaves)


def _by_module(variables: Any, modules: set[tuple[str, ...]]) -> dict[tuple[str, ...], list[Any]]:
    """Gives each array to the deepest called module whose path its own path starts with."""
    owned: dict[tuple[str, ...], list[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(variables):
        collection, *names = leaf_name(path).split("/")
        depth = next(n for n in range(len(names) - 1, -1, -1) if tuple(names[:n]) in modules)
        row = (collection, "/".join(names[depth:]), tuple(leaf.shape), leaf.dtype)
        owned.setdefault(tuple(names[:depth]), []).append(row)
    return owned
