"""Equinox: modules as functional models."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from distaff.core.config.encoding import to_json
from distaff.core.typing import Key
from distaff.errors import ConfigError
from distaff.models.adapter import (
    Adapter,
    LayerRow,
    Variables,
    accepts_collections,
    has_numbers,
    leaf_of,
    nested,
    without_numbers,
)
from distaff.models.flags import method_of, mode_flag, parameters, switched
from distaff.models.layers import Library, OpenModule, Path, trace_layers
from distaff.models.randomness import KEY_NAMES, asking_for_key
from distaff.models.remat.options import RematConfig
from distaff.models.remat.trees import rematerialized_tree

AXIS = "batch"
"""The axis name of the examples: `eqx.nn.BatchNorm(..., axis_name="batch")`."""


class EquinoxModel(Adapter):
    """An `equinox.Module` as pure functions.

    Floating-point arrays are the parameters, named by their fields (`layers/0/weight`). Other
    arrays are the collection `arrays`, and the arrays of an `equinox.nn.State`, in order, are the
    collection `state`, the only one that a training pass can change.

    Like Equinox's own layers, modules take a single example. A pass maps them over the leading axis
    of all positional inputs, with the axis name `batch`, or the name used by `eqx.nn.BatchNorm`
    layers inside. If the module takes a `key` or `rng`, each example gets its own key. Keyword
    arguments are not mapped.

    The training mode is set in all modules with a field for it, `inference` (as in
    `equinox.nn.inference_mode`) or `training`; and passed to the called method if it has a
    parameter for it, as in Linen.

    Args:
        source: a module, or `(module, state)` from `equinox.nn.make_with_state`, whose arrays are
            the initial values whatever the seed. Or a function `f(key)` that returns either, which
            is called with the trainer's seed.
        vmap: whether to map over examples; False for a module that takes whole batches.
        remat: modules that are computed again in the backward pass; None to disable.
    """

    def __init__(self, source: Any, *, vmap: bool = True, remat: RematConfig | None = None) -> None:
        self._source, self._vmap, self._remat = source, vmap, remat

    def rematerialized(self, remat: RematConfig) -> EquinoxModel:
        """Returns this model with modules that are computed again."""
        return EquinoxModel(self._source, vmap=self._vmap, remat=remat)

    @functools.cached_property
    def light(self) -> EquinoxModel:
        """The model without the array values of a module instance."""
        if not has_numbers(self._module_and_state):
            return self
        module = without_numbers(self._module_and_state)
        light = EquinoxModel(module, vmap=self._vmap, remat=self._remat)
        light.__dict__["light"] = light
        return light

    @property
    def module(self) -> Any:
        """The module; without array values if a function creates it."""
        return self._module_and_state[0]

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a module instance; None if a function creates it."""
        return None if self._is_function else self._read(*self._module_and_state)

    @property
    def record(self) -> dict[str, Any]:
        """The module's class and fields, and whether it is mapped over examples."""
        cls = type(self.module)
        return {
            "$module": f"{cls.__module__}:{cls.__qualname__}",
            "kind": "equinox",
            "vmap": self._vmap,
            "fields": to_json(jax.tree.map(_form, self.module)),
        }

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Returns the initial variables; the inputs are ignored, since modules have shapes."""
        return self._read(
            *(self._call_source(key) if self._is_function else self._module_and_state)
        )

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass on a batch; `method="encode"` calls another method."""
        module, state = self._merge(variables, train)
        if self._remat is not None:
            module = rematerialized_tree(module, self._remat, eqx.Module)
        outputs, state = self._call(module, state, inputs, kwargs, train=train, key=key)
        if not train or state is None:
            return outputs, variables
        leaves = {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(state))}
        return outputs, variables._replace(
            collections={**(variables.collections or {}), "state": leaves}
        )

    def bind(self, variables: Variables) -> Any:
        """Returns the module with the variables, in inference mode, for single examples.

        Returns:
            `module`, or `(module, state)` if it has a state.
        """
        module, state = self._merge(variables, False)
        return module if state is None else (module, state)

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in the order of their calls, by abstract evaluation.

        Outputs are for one example, except the model's own. FLOPs are for the evaluation of the
        batch, as XLA estimates them before optimization; as in Linen, a module counts its first
        call, and later calls count for the caller. Computations on the state alone count once per
        example.
        """

        def open_module(variables: Variables, key: Key, train: bool) -> OpenModule:
            module, state = self._merge(variables, train)

            def call(*inputs: Any) -> Any:
                return self._call(module, state, inputs, {}, train=train, key=key)[0]

            return OpenModule(_modules(module), call)

        calls = _num_examples(inputs) if self._vmap else 1
        library = Library(lambda module: (module, lambda tree: tree), _without_state, calls)
        return trace_layers(self, open_module, key, inputs, library)

    def modules(self) -> dict[Path, Any]:
        """Returns the module and the callable modules inside it, by path."""
        return _modules(self.module)

    def named_state(self) -> Any:
        """Returns the state with the name of each array in place of the array, or None."""
        structure = self._parts.state
        if structure is None:
            return None
        return jax.tree.unflatten(structure, [f"state/{n}" for n in range(structure.num_leaves)])

    @property
    def _is_function(self) -> bool:
        return not isinstance(self._source, eqx.Module | tuple)

    @functools.cached_property
    def _module_and_state(self) -> tuple[Any, Any]:
        if self._is_function:
            try:
                return eqx.filter_eval_shape(self._call_source, jax.random.key(0))
            except jax.errors.JAXTypeError:  # the function computes on the host
                return self._call_source(jax.random.key(0))
        return _pair(self._source)

    def _call_source(self, key: Key) -> tuple[Any, Any]:
        return _pair(self._source(key=key))

    @functools.cached_property
    def _parts(self) -> _EquinoxParts:
        module, state = self._module_and_state
        leaves, structure = jax.tree.flatten_with_path(module)
        slots = tuple(
            _EquinoxSlot(_collection(leaf), tuple(_name(key) for key in path), leaf)
            for path, leaf in leaves
        )
        return _EquinoxParts(slots, structure, None if state is None else jax.tree.structure(state))

    def _read(self, module: Any, state: Any) -> Variables:
        values = [
            (slot.collection, slot.path, leaf)
            for slot, leaf in zip(self._parts.slots, jax.tree.leaves(module), strict=True)
            if slot.collection is not None
        ]
        held = jax.tree.leaves(state)
        return nested([*values, *(("state", (str(n),), leaf) for n, leaf in enumerate(held))])

    def _merge(self, variables: Variables, train: bool) -> tuple[Any, Any]:
        collections, parts = variables.by_collection(), self._parts
        leaves = [
            slot.leaf
            if slot.collection is None
            else leaf_of(collections, slot.collection, slot.path)
            for slot in parts.slots
        ]
        module = in_mode(jax.tree.unflatten(parts.structure, leaves), train)
        if parts.state is None:
            return module, None
        held = [leaf_of(collections, "state", (str(n),)) for n in range(parts.state.num_leaves)]
        return module, jax.tree.unflatten(parts.state, held)

    def _call(
        self,
        module: Any,
        state: Any,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        train: bool,
        key: Key | None,
    ) -> tuple[Any, Any]:
        """Returns the outputs for a batch, and the new state."""
        kwargs = dict(kwargs)
        function = method_of(module, kwargs.pop("method", None))
        accepted = parameters(function)[len(inputs) :]
        flags: dict[str, Any] = mode_flag(function, train, len(inputs))
        key_name = next((n for n in KEY_NAMES if n in accepted and n not in kwargs), None)
        takes_state = state is not None and "state" in accepted

        def one(inputs: tuple[Any, ...], key: Key | None) -> tuple[Any, Any]:
            given = {**flags, **({key_name: key} if key_name else {}), **kwargs}
            if takes_state:
                return function(*inputs, state=state, **given)
            return function(*inputs, **given), state

        name = type(module).__name__
        with asking_for_key(name, key_name is not None and key is None), explained(name):
            if not self._vmap:
                return one(inputs, key)
            draws = key_name is not None and key is not None
            keys = jax.random.split(key, _num_examples(inputs)) if draws else None
            axis = axis_of(module, AXIS)
            mapped = jax.vmap(one, in_axes=(0, 0), out_axes=(0, None), axis_name=axis)
            return mapped(inputs, keys)


class _EquinoxSlot(NamedTuple):
    """A leaf of the module, with the collection of an array; None for other leaves."""

    collection: str | None
    path: Path
    leaf: Any


class _EquinoxParts(NamedTuple):
    slots: tuple[_EquinoxSlot, ...]
    structure: Any
    state: Any


def _pair(made: Any) -> tuple[Any, Any]:
    module, state = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if isinstance(module, eqx.Module) and (state is None or isinstance(state, eqx.nn.State)):
        return module, state
    raise ConfigError(
        "An Equinox model is a module, or (module, state) from equinox.nn.make_with_state; "
        f"got {type(made).__name__}. Write lambda key: MyModule(..., key=key), or "
        "lambda key: equinox.nn.make_with_state(MyModule)(..., key=key)."
    )


def _collection(leaf: Any) -> str | None:
    if not (eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
        return None
    return "params" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "arrays"


def _form(leaf: Any) -> Any:
    """Returns a leaf for the record; dtype and shape of an array."""
    return leaf if _collection(leaf) is None else f"{leaf.dtype}{list(leaf.shape)}"


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def in_mode(node: Any, train: bool) -> Any:
    """Returns a tree with all modules in training or inference mode, including static fields."""
    if isinstance(node, eqx.Module):
        changed = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name, None)
            new = switched(field.name, value, train)
            new = in_mode(value, train) if new is value else new
            if new is not value:
                changed[field.name] = new
        if not changed:
            return node
        copied = copy.copy(node)
        for name, value in changed.items():
            object.__setattr__(copied, name, value)
        return copied

    def is_inner(each: Any) -> bool:
        return isinstance(each, eqx.Module)

    leaves, structure = jax.tree.flatten(node, is_leaf=is_inner)
    inner = [in_mode(leaf, train) if is_inner(leaf) else leaf for leaf in leaves]
    is_same = all(a is b for a, b in zip(leaves, inner, strict=True))
    return node if is_same else jax.tree.unflatten(structure, inner)


def axis_of(module: Any, default: str) -> Any:
    """Returns the axis name of the examples in the BatchNorm layers, or the default without any.

    Raises:
        ConfigError: layers have different axis names.
    """
    layers = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, eqx.nn.BatchNorm))
    names = {x.axis_name for x in layers if isinstance(x, eqx.nn.BatchNorm)}
    if len(names) > 1 or any(not isinstance(name, str) for name in names):
        raise ConfigError(
            "All BatchNorm layers need the same axis_name; got "
            f"{sorted(map(repr, names))}. Give all of them axis_name={default!r}."
        )
    return next(iter(names), default)


@contextmanager
def explained(name: str) -> Generator[None]:
    """Explains two JAX errors in terms of an Equinox module.

    Raises:
        ConfigError: the state differs between examples, or an axis name is unknown.
    """
    try:
        yield
    except NameError as error:
        if "axis" not in str(error):
            raise
        raise ConfigError(
            f"{name} is mapped over the axis {AXIS!r}, and uses another axis name: {error} "
            f"Write axis_name={AXIS!r}."
        ) from error
    except ValueError as error:
        if "out_axes" not in str(error):
            raise
        raise ConfigError(
            f"An Equinox state must be the same for all examples; the state of {name} differs "
            f"between examples. Average values before setting them: jax.lax.pmean(value, {AXIS!r})."
            " Or write the module for whole batches: distaff.models.whole_batches(module)."
        ) from error


def _num_examples(inputs: tuple[Any, ...]) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    if not shapes or not all(shapes):
        raise ConfigError(
            "An Equinox module is mapped over the leading axis of its inputs; their shapes are "
            f"{shapes}. Pass inputs without that axis by keyword, or use "
            "distaff.models.whole_batches(module)."
        )
    return shapes[0][0]


def _without_state(result: Any) -> Any:
    has_state = isinstance(result, tuple) and any(isinstance(x, eqx.nn.State) for x in result)
    return result[0] if has_state else result


def _modules(module: Any, path: Path = ()) -> dict[Path, Any]:
    """Returns a module and the callable modules inside it by path, parents first."""
    found = {path: module} if callable(module) or not path else {}

    def is_inner(node: Any) -> bool:
        return isinstance(node, eqx.Module) and node is not module

    for keys, node in jax.tree.leaves_with_path(module, is_leaf=is_inner):
        if is_inner(node):
            found.update(_modules(node, (*path, *(_name(key) for key in keys))))
    return found
