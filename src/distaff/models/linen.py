"""Flax Linen modules as models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.errors import ModifyScopeVariableError

from distaff.core.typing import Key
from distaff.models.adapter import LayerRow, Variables, accepts_collections
from distaff.models.layers import Path, describe, flops, layer_rows, own_flops
from distaff.models.linen_collections import (
    evaluate_dropping_changes,
    is_requested,
    join_filters,
    matches,
    opened,
    state_collections,
    without_added,
)
from distaff.models.linen_modes import (
    LayerObserver,
    arguments,
    call_by_keyword_or_position,
    in_mode,
)
from distaff.models.observed import Observed
from distaff.models.randomness import call_with_streams, streams


class LinenModel:
    """A `flax.linen.Module` as pure functions.

    The mode is passed under the name that the called method uses, such as `train`, `is_training`,
    or, inverted, `deterministic`, `eval` or `inference`, and set in fields of such a name, as
    `train: bool`; see `distaff.models.flags`. Every random stream, whatever its name, derives from
    the one key of a pass.

    Args:
        module: a Linen module. If it is bound, its variables are the initial ones.
        observed: records what the layers do in this mode; None to disable.
    """

    def __init__(self, module: nn.Module, observed: Observed | None = None) -> None:
        self._variables: Mapping[str, Any] | None = None
        if module.scope is not None:
            module, self._variables = module.unbind()
        self.module, self._observed = module, observed

    def observing(self, observed: Observed) -> LinenModel:
        """Returns this model with its passes recorded."""
        return LinenModel(self.module, observed)

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a bound module; None if `init` creates them."""
        if self._variables is None:
            return None
        held = {name: x for name, x in self._variables.items() if name != "intermediates"}
        return Variables.of(opened(held))

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """`module.apply`."""
        return self.module.apply

    @property
    def record(self) -> nn.Module:
        """The module; its class and hyperparameters are recorded, and sufficient to rebuild it."""
        return self.module

    def init(self, key: Key, *inputs: Any, **kwargs: Any) -> Any:
        """Creates the variables for inputs of these shapes, in training mode.

        Excludes collections that modules sow into, which would grow with every pass, and those only
        for gradients, as from `perturb`. Boxes (`nn.with_partitioning`) are opened.

        With keyword arguments, or a key for each random stream by name, it returns
        `module.init(...)` instead.
        """
        if kwargs or isinstance(key, Mapping):
            return self.module.init(key, *inputs, **kwargs)
        collections = opened(dict(self._init(key, *inputs)))

        def run(collections: Mapping[str, Any], train: bool, mutable: Any) -> Any:
            return self._call(collections, inputs, {}, train, key, mutable)

        return Variables.of(state_collections(collections, run))

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; in training, every collection but `params` may change.

        `mutable=` names collections to return in addition, as in Linen: `outputs, changed`. `rngs=`
        is a key for all random streams, or keys for some of them by name. Changes of a pass in
        evaluation are dropped.

        Raises:
            ConfigError: running statistics would change in evaluation.
            NoKeyError: the model needs random numbers, and there is no key.
        """
        collections = variables.by_collection()
        requested, rngs = kwargs.pop("mutable", None), kwargs.pop("rngs", None)
        if kwargs.get("capture_intermediates"):
            requested = requested or ["intermediates"]
        kept = [name for name in collections if name != "params"] if train else []
        given = rngs if isinstance(rngs, Mapping) else {}
        key = key if rngs is None or given else rngs
        mutable = join_filters(kept, requested)
        observer = nullcontext()
        if self._observed is not None:
            observer = nn.intercept_methods(LayerObserver(self._observed))
        with observer:
            outputs = self._call(collections, inputs, kwargs, train, key, mutable, given)
        if mutable is False:
            return outputs, variables
        outputs, changed = outputs
        for name in kept:
            collections[name] = without_added(collections[name], changed.get(name, {}))
        if is_requested(requested):
            outputs = outputs, {name: x for name, x in changed.items() if matches(requested, name)}
        return outputs, Variables.of(collections) if kept else variables

    def bind(self, variables: Variables) -> nn.Module:
        """Returns `module.bind(variables)`; call it as in Linen, `bound(x, train=False)`."""
        return in_mode(self.module, False).bind(variables.by_collection())

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in order of call, by abstract evaluation.

        Shapes are for training, FLOPs for evaluation, estimated by XLA before optimization: a
        loop's body counts once. Only a module's first call counts as its own; further calls, and a
        module that cannot run apart from its parent, count as part of the caller.
        """
        kinds: dict[Path, str] = {}
        outputs_of: dict[Path, str] = {}

        def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path, is_call = context.module.path, context.method_name == "__call__"
            if is_call:
                kinds[path] = type(context.module).__name__
                outputs_of.setdefault(path, "")
            outputs = next_call(*args, **kwargs)
            if is_call:
                outputs_of[path] = describe(outputs)
            return outputs

        def init(key: Key, *inputs: Any) -> Variables:
            with nn.intercept_methods(record):
                return self.init(key, *inputs)

        variables = jax.eval_shape(init, key, *inputs)

        def evaluate(variables: Variables, key: Key, inputs: tuple[Any, ...]) -> Any:
            return self.apply(variables, *inputs, train=False, key=key)[0]

        own = _own_flops(set(kinds), evaluate, variables, key, inputs)
        return layer_rows(variables, kinds, outputs_of, own)

    def _init(self, key: Key, *inputs: Any) -> Any:
        module = in_mode(self.module, True)
        name = type(module).__name__

        def call(rngs: Any) -> Any:
            def init(by_position: bool) -> Any:
                args, named = arguments(
                    module, None, inputs, {}, train=True, key=key, by_position=by_position
                )
                return module.init(rngs, *args, **named)

            return call_by_keyword_or_position(init, name)

        return call_with_streams(call, key, first=("params", "dropout"), given={}, model=name)

    def _call(
        self,
        collections: Mapping[str, Any],
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        train: bool,
        key: Key | None,
        mutable: Any,
        given: Mapping[str, Key] | None = None,
    ) -> Any:
        """Calls the module with its mode and random streams; drops changes in evaluation."""
        module, rest = in_mode(self.module, train), dict(kwargs)
        method, name = rest.pop("method", None), type(module).__name__

        def run(mutable: Any) -> Any:
            def with_streams(rngs: Any) -> Any:
                options: dict[str, Any] = {"method": method, "rngs": rngs or None}

                def apply(by_position: bool) -> Any:
                    args, named = arguments(
                        module, method, inputs, rest, train=train, key=key, by_position=by_position
                    )
                    return module.apply(collections, *args, mutable=mutable, **options, **named)

                return call_by_keyword_or_position(apply, name)

            first = ("dropout",) if train else ()
            return call_with_streams(with_streams, key, first=first, given=given or {}, model=name)

        try:
            return run(mutable)
        except ModifyScopeVariableError as error:
            if train:
                raise
            return evaluate_dropping_changes(run, collections, mutable, error, name)


def _own_flops(
    modules: set[Path], forward: Callable[..., Any], *arguments: Any
) -> dict[Path, float]:
    """Lowers the model and each module alone, and subtracts FLOPs of modules from their callers."""
    callers: dict[Path, Path] = {}
    calls: dict[Path, _Call] = {}
    active: list[Path] = [()]

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = context.module.path
        is_listed = path in modules and path != () and context.method_name == "__call__"
        if not is_listed or path in calls:
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
    """One call of a module, with shapes instead of arrays. Equal calls cost the same."""

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
        except TypeError:  # The module has an unhashable attribute.
            return self.flops()

    def flops(self) -> float | None:
        arrays = {i: leaf for i, leaf in enumerate(self.leaves) if hasattr(leaf, "shape")}

        def forward(arrays: dict[int, jax.Array], key: Key) -> Any:
            leaves = [arrays.get(i, leaf) for i, leaf in enumerate(self.leaves)]
            variables, args, kwargs = jax.tree.unflatten(self.structure, leaves)
            return self.module.apply(variables, *args, rngs=streams(key), **kwargs)

        return flops(forward, arrays, jax.eval_shape(jax.random.key, 0))
