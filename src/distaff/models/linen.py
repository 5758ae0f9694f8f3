"""Flax Linen modules behind the functional face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.errors import ModifyScopeVariableError

from distaff.core.typing import Key
from distaff.models.adapter import LayerRow, Variables
from distaff.models.as_in_linen import applies_collections, initialises_by_keyword
from distaff.models.layers import by_module, describe, flops, own_flops
from distaff.models.linen_collections import (
    as_before,
    carried,
    evaluated,
    is_asked,
    joined,
    wants,
)
from distaff.models.linen_modes import LayerObserver, arguments, in_mode, lifted
from distaff.models.observed import Observed
from distaff.models.randomness import drawing, streams


class LinenModel:
    """A `flax.linen.Module` as pure functions.

    Whether to train is told under the name the called method has for it, such as `train`,
    `is_training`, or, inverted, `deterministic`, `eval` or `inference`, and under the name of a
    field, such as `train: bool`; see `distaff.models.flags`. Every random stream, whatever its
    name, draws from the one key that a pass is given.

    Args:
        module: a Linen module. One that is bound brings its variables.
        observed: notes what the layers make of the mode; None where nobody looks.
    """

    def __init__(self, module: nn.Module, observed: Observed | None = None) -> None:
        self._variables: Mapping[str, Any] | None = None
        if module.scope is not None:
            module, self._variables = module.unbind()
        self.module, self._observed = module, observed

    def observing(self, observed: Observed) -> LinenModel:
        """Returns this model, whose passes are noted."""
        return LinenModel(self.module, observed)

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a bound module; None where `init` makes them."""
        if self._variables is None:
            return None
        held = {name: x for name, x in self._variables.items() if name != "intermediates"}
        return Variables.of(nn.unbox(held))

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """`module.apply`."""
        return self.module.apply

    @property
    def record(self) -> nn.Module:
        """The module: its class and hyperparameters are written down, and it is rebuilt of them."""
        return self.module

    @initialises_by_keyword
    def init(self, key: Key, *inputs: Any) -> Variables:
        """Makes the variables for inputs shaped like these, as in training.

        Left out is a collection that modules sow into, which a pass would add to for ever, and one
        that is there for gradients alone, as `perturb` makes it. Boxes (`nn.with_partitioning`) are
        opened.
        """
        collections = nn.unbox(dict(self._init(key, *inputs)))

        def run(collections: Mapping[str, Any], train: bool, mutable: Any) -> Any:
            call = self._prepared(inputs, {}, train, key)
            return self._drawn(call, collections, train, key, mutable)

        return Variables.of(carried(collections, run))

    @applies_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; in training, every collection but `params` may change.

        `mutable=` names collections to be returned besides, as in Linen: `outputs, changed`.
        `rngs=` is a key for all random streams, or keys for some of them by name. What a pass in
        evaluation changes is dropped.

        Raises:
            ConfigError: running statistics would move in evaluation.
            NoKeyError: the model draws random numbers, and there is no key.
        """
        collections = variables.by_collection()
        asked, rngs = kwargs.pop("mutable", None), kwargs.pop("rngs", None)
        if kwargs.get("capture_intermediates"):
            asked = asked or ["intermediates"]
        kept = [name for name in collections if name != "params"] if train else []
        given = rngs if isinstance(rngs, Mapping) else {}
        key = key if rngs is None or given else rngs
        call = self._prepared(inputs, kwargs, train, key)
        mutable = joined(kept, asked)
        with nn.intercept_methods(LayerObserver(self._observed)) if self._observed else _NOTHING:
            outputs = self._drawn(call, collections, train, key, mutable, given)
        if mutable is False:
            return outputs, variables
        outputs, changed = outputs
        for name in kept:
            collections[name] = as_before(collections[name], changed.get(name, {}))
        if is_asked(asked):
            outputs = outputs, {name: x for name, x in changed.items() if wants(asked, name)}
        return outputs, Variables.of(collections) if kept else variables

    def bind(self, variables: Variables) -> nn.Module:
        """Returns `module.bind(variables)`: call it as in Linen, `bound(x, train=False)`."""
        return in_mode(self.module, False).bind(variables.by_collection())

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
                return self.init(key, *inputs).by_collection()

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
        module = in_mode(self.module, True)
        name = type(module).__name__

        def call(rngs: Any) -> Any:
            def called(by_position: bool) -> Any:
                args, named = arguments(
                    module, None, inputs, {}, train=True, key=key, by_position=by_position
                )
                return module.init(rngs, *args, **named)

            return lifted(called, name)

        return drawing(call, key, first=("params", "dropout"), given={}, model=name)

    def _prepared(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any], train: bool, key: Key | None
    ) -> Callable[..., Any]:
        """Returns `module.apply` as a function of collections, streams and `mutable`."""
        module = in_mode(self.module, train)
        rest, options = dict(kwargs), {"method": kwargs.get("method")}
        rest.pop("method", None)

        def call(collections: Any, rngs: Any, mutable: Any) -> Any:
            def called(by_position: bool) -> Any:
                args, named = arguments(
                    module,
                    options["method"],
                    inputs,
                    rest,
                    train=train,
                    key=key,
                    by_position=by_position,
                )
                given: dict[str, Any] = {**options, "rngs": rngs or None, "mutable": mutable}
                return module.apply(collections, *args, **given, **named)

            return lifted(called, type(module).__name__)

        return call

    def _drawn(
        self,
        call: Callable[..., Any],
        collections: Mapping[str, Any],
        train: bool,
        key: Key | None,
        mutable: Any,
        given: Mapping[str, Key] | None = None,
    ) -> Any:
        """Calls the module with its streams; in evaluation, what it changes is dropped."""
        name = type(self.module).__name__
        first = ("dropout",) if train else ()

        def drawn(mutable: Any) -> Any:
            def with_streams(rngs: Any) -> Any:
                return call(collections, rngs, mutable)

            return drawing(with_streams, key, first=first, given=given or {}, model=name)

        try:
            return drawn(mutable)
        except ModifyScopeVariableError as error:
            if train:
                raise
            return evaluated(drawn, collections, mutable, error, name)


_NOTHING: AbstractContextManager[None] = nullcontext()


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
            return self.module.apply(variables, *args, rngs=streams(key), **kwargs)

        return flops(forward, arrays, jax.eval_shape(jax.random.key, 0))
