"""Flax Linen modules behind the functional face."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from distaff.models.adapter import LayerRow, Variables
from distaff.models.flags import mode_flag
from distaff.models.layers import by_module, describe, flops, own_flops
from distaff.typing import Key


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

    def ready(self, key: Key) -> None:
        """Returns None: `init` makes the variables."""

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """`module.apply`."""
        return self.module.apply

    @property
    def record(self) -> nn.Module:
        """The module: its class and hyperparameters are written down, and it is rebuilt of them."""
        return self.module

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Makes the variables for inputs shaped like these, as in training.

        A collection that modules sow into is left out: it would grow with every pass.
        """
        collections = dict(self._init(key, *inputs))
        others = [name for name in collections if name not in ("params", "batch_stats")]
        if others:
            mode: dict[str, Any] = self._mode(None, True)
            changing = [name for name in collections if name != "params"]
            again = jax.eval_shape(
                lambda: self.module.apply(
                    collections, *inputs, rngs=_streams(key), mutable=changing, **mode
                )[1]
            )
            for name in others:
                if jax.tree.structure(again[name]) != jax.tree.structure(collections[name]):
                    del collections[name]
        return Variables.of(collections)

    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; in training, every collection but `params` may change.

        `mutable=[...]` names collections to be returned besides, as in Linen: `outputs, changed`.
        """
        collections = variables.by_collection()
        asked = kwargs.pop("mutable", None)
        kept = [name for name in collections if name != "params"] if train else []
        mutable = list(dict.fromkeys([*kept, *(asked or ())]))
        call = functools.partial(
            self.module.apply,
            collections,
            *inputs,
            rngs=None if key is None else _streams(key),
            **{**self._mode(kwargs.get("method"), train), **kwargs},
        )
        if not mutable:
            return call(), variables
        outputs, changed = call(mutable=mutable)
        collections.update({name: changed[name] for name in kept})
        if asked is not None:
            outputs = outputs, {name: changed[name] for name in asked if name in changed}
        return outputs, Variables.of(collections)

    def bind(self, variables: Variables) -> nn.Module:
        """Returns `module.bind(variables)`: call it as in Linen, `bound(x, train=False)`."""
        return self.module.bind(variables.by_collection())

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in order of call, by abstract evaluation.

        Shapes are those of training. FLOPs are those of evaluation, as XLA estimates them before it
        optimizes: a loop's body counts once. A module's first call counts as its own, any other as
        its caller's; so does a module that cannot run apart from its parent.
        """
        rows: dict[tuple[str, ...], tuple[str, str]] = {}

        def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            called, kind = context.method_name == "__call__", type(context.module).__name__
            if called:
                rows.setdefault(context.module.path, (kind, ""))
            outputs = next_call(*args, **kwargs)
            if called:
                rows[context.module.path] = (kind, describe(outputs))
            return outputs

        def init(key: Key, *inputs: Any) -> Any:
            with nn.intercept_methods(record):
                return self._init(key, *inputs)

        variables = jax.eval_shape(init, key, *inputs)
        owned = by_module(variables, set(rows))

        def evaluate(variables: Any, key: Key, inputs: tuple[Any, ...]) -> Any:
            return self.apply(Variables.of(variables), *inputs, train=False, key=key)[0]

        counted = _own_flops(set(rows), evaluate, variables, key, inputs)
        return [
            LayerRow("/".join(path), kind, output, tuple(owned.get(path, ())), counted.get(path))
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
        return mode_flag(method, train)


def _streams(key: Key) -> dict[str, Key]:
    return {"params": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}


def _own_flops(
    modules: set[tuple[str, ...]], forward: Callable[..., Any], *arguments: Any
) -> dict[tuple[str, ...], float]:
    """Lowers the model whole and each module alone, and takes each callee off its caller."""
    callers: dict[tuple[str, ...], tuple[str, ...]] = {}
    calls: dict[tuple[str, ...], _Call] = {}
    active: list[tuple[str, ...]] = [()]

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        listed = path in modules and path != () and context.method_name == "__call__"
        if not listed or path in calls:
            return next_call(*args, **kwargs)
        active.append(path)
        outputs = next_call(*args, **kwargs)
        active.pop()
        callers[path] = active[-1]
        calls[path] = _Call.of(context.module, args, kwargs)
        return outputs

    with nn.intercept_methods(record):
        whole = flops(forward, *arguments)
    if not whole:
        return {}
    known: dict[Any, float | None] = {}
    counts = {path: call.known_flops(known) for path, call in calls.items()}
    return own_flops(whole, counts, callers)


class _Call(NamedTuple):
    """One call of a module; shapes and dtypes stand for its arrays. Equal calls cost the same."""

    module: nn.Module
    leaves: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, bound: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
        module, variables = bound.unbind()
        leaves, structure = jax.tree.flatten((variables, args, dict(kwargs)))
        shapes = (
            jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves
        )
        return cls(module, tuple(shapes), structure)

    def known_flops(self, known: dict[Any, float | None]) -> float | None:
        try:
            if self not in known:
                known[self] = self.flops()
            return known[self]
        except TypeError:  # The module has an attribute that cannot be hashed.
            return self.flops()

    def flops(self) -> float | None:
        arrays = {i: leaf for i, leaf in enumerate(self.leaves) if hasattr(leaf, "shape")}

        def forward(arrays: dict[int, jax.Array], key: Key) -> Any:
            leaves = [arrays.get(i, leaf) for i, leaf in enumerate(self.leaves)]
            variables, args, kwargs = jax.tree.unflatten(self.structure, leaves)
            return self.module.apply(variables, *args, rngs=_streams(key), **kwargs)

        return flops(forward, arrays, jax.eval_shape(jax.random.key, 0))
