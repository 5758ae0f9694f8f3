"""Flax NNX modules as models: split once, merged in each trace."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

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
from distaff.models.flags import method_of, mode_flag, parameters
from distaff.models.layers import Library, OpenModule, Path, trace_layers
from distaff.models.linen_collections import AxisNames, is_requested, record_axis_names
from distaff.models.nnx_modules import Snapshot, set_mode, sown_values, without_sown
from distaff.models.observed import Observed
from distaff.models.remat.nnx import rematerialize
from distaff.models.remat.options import RematConfig


class NnxModel(Adapter):
    """A `flax.nnx.Module` as pure functions.

    Its variables are nested dictionaries: `nnx.Param` is trained, `nnx.BatchStat` holds the running
    statistics, any other type of variable is a collection named like its class, and arrays that are
    not variables are the collection `arrays`. Sown values are not state; `mutable="Intermediate"`
    returns them, by the class of their variables, alongside the outputs.

    Random streams are not variables: each pass restarts every stream from its own key, derived from
    the key of the pass. So they need no checkpoint, and neither the key that a module was created
    with nor its counts matter.

    The mode is set in all submodules with an attribute such as `deterministic`,
    `use_running_average` or `is_training`, as by `module.train()` and `module.eval()`, and passed
    to the called method if it has a parameter for it, as with Linen.

    Args:
        source: a module, whose variables are the initial ones whatever the seed; or a function
            `f(rngs)` that returns one, which is called with the trainer's seed.
        observed: records what the layers do in this mode; None to disable.
        remat: modules that are computed again in the backward pass; None to disable.
    """

    def __init__(
        self,
        source: nnx.Module | Callable[..., Any],
        observed: Observed | None = None,
        remat: RematConfig | None = None,
    ) -> None:
        self._source: Any = without_sown(source) if isinstance(source, nnx.Module) else source
        self._observed, self._remat = observed, remat

    def observing(self, observed: Observed) -> NnxModel:
        """Returns this model with its passes recorded."""
        return self._with(_observed=observed)

    def rematerialized(self, remat: RematConfig) -> NnxModel:
        """Returns this model with modules that are computed again."""
        return self._with(_remat=remat)

    @functools.cached_property
    def light(self) -> NnxModel:
        """The model without the arrays of a ready-made module."""
        graph, state = nnx.split(self.module)
        if not has_numbers(state):
            return self
        copy = NnxModel(nnx.merge(graph, without_numbers(state)), self._observed, self._remat)
        copy.__dict__["light"] = copy
        return copy

    @functools.cached_property
    def module(self) -> nnx.Module:
        """The module; without arrays if a function creates it."""
        if isinstance(self._source, nnx.Module):
            return self._source
        try:
            return nnx.eval_shape(lambda: self._create(jax.random.key(0)))
        except jax.errors.JAXTypeError:  # It computes on the host.
            return self._create(jax.random.key(0))

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a ready-made module, or None."""
        if not isinstance(self._source, nnx.Module):
            return None
        return self._initial(self._source)

    @property
    def record(self) -> dict[str, Any]:
        """Class and plain attributes of every submodule, and shape and dtype of every array."""
        variables = self._read(self._parts.state).by_collection()
        return {
            "$module": _class_name(self.module),
            "kind": "flax.nnx",
            "modules": {
                "/".join(path): {"$type": _class_name(module), **_attributes(module)}
                for path, module in _modules(self.module).items()
            },
            "arrays": jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", variables),
        }

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Creates the variables; ignores the inputs, since NNX modules have fixed shapes."""
        return self.ready(key) or self._initial(self._create(key))

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; in training, every variable but the parameters may change.

        `method="encode"` calls another method. A parameter `rngs` gets streams, and one named `rng`
        or `key` a key, unless the caller passes them.

        Raises:
            NoKeyError: it needs random numbers in training, and there is no key.
        """
        requested = kwargs.pop("mutable", None)
        module = self._merge(variables, train, key)
        if self._remat is not None:
            rematerialize(_modules(module), self._remat)
        before = Snapshot.of(module)
        outputs = _call(module, inputs, kwargs, train, key)
        before.check(module, must_not_draw=train and key is None, observed=self._observed)
        state = nnx.split(module)[1]
        if is_requested(requested):
            known = {slot.path for slot in self._parts.slots}
            outputs = outputs, sown_values(state, known, requested)
        if not train:
            return outputs, variables
        return outputs, self._read(state)._replace(params=variables.params)

    def bind(self, variables: Variables) -> nnx.Module:
        """Returns a live module with the variables, in evaluation: `bound(x)`.

        After `bound.train()` it trains; its random streams then start from a fixed key.
        """
        return self._merge(variables, False, None)

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in order of call, by abstract evaluation.

        A module that runs inside an NNX transformation (`nnx.scan`) has no output here. FLOPs are
        for evaluation, estimated by XLA before optimization; as with Linen, only a module's first
        call counts as its own, further calls as part of the caller.
        """

        def open_module(variables: Variables, key: Key, train: bool) -> OpenModule:
            module = self._merge(variables, train, key)
            return OpenModule(
                _modules(module), lambda *inputs: _call(module, inputs, {}, train, key)
            )

        return trace_layers(self, open_module, key, inputs, Library(_split))

    def modules(self) -> dict[Path, Any]:
        """Returns the module and its submodules by path."""
        return _modules(self.module)

    def _with(self, **changes: Any) -> NnxModel:
        copy = NnxModel.__new__(NnxModel)
        copy.__dict__.update(self.__dict__, **changes)
        copy.__dict__.pop("light", None)
        return copy

    def _create(self, key: Key) -> nnx.Module:
        source: Any = self._source
        with nnx.use_eager_sharding(False):  # else names of axes require a mesh of Flax
            module = source(rngs=nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise ConfigError(
                "A model given as a function f(rngs) must return a flax.nnx.Module; "
                f"{getattr(source, '__qualname__', source)} returned {type(module).__name__}. "
                "Write lambda rngs: MyModule(..., rngs=rngs)."
            )
        return _with_traced_arrays(module)

    @functools.cached_property
    def _parts(self) -> _NnxParts:
        graph, state = nnx.split(self.module)
        slots = [
            _NnxSlot(path, tuple(map(str, path)), _collection(leaf), leaf)
            for path, leaf in nnx.to_flat_state(state)
        ]
        return _NnxParts(graph, state, tuple(slots))

    def _initial(self, module: nnx.Module) -> Variables:
        slots = [slot for slot in self._parts.slots if slot.collection == "params"]
        record_axis_names({"/".join(slot.names): _axis_names(slot.leaf) for slot in slots})
        return self._read(nnx.split(module)[1])

    def _read(self, state: Any) -> Variables:
        leaves = dict(nnx.to_flat_state(state))
        return nested(
            (slot.collection, slot.names, _value(leaves[slot.path]))
            for slot in self._parts.slots
            if slot.collection is not None
        )

    def _merge(self, variables: Variables, train: bool, key: Key | None) -> nnx.Module:
        collections = variables.by_collection()
        key = jax.random.key(0) if key is None else key
        leaves = []
        for number, slot in enumerate(self._parts.slots):
            if slot.collection is None:
                value = _stream(slot.leaf, jax.random.fold_in(key, number))
            else:
                value = leaf_of(collections, slot.collection, slot.names)
            is_variable = isinstance(slot.leaf, nnx.Variable)
            leaves.append((slot.path, slot.leaf.replace(value) if is_variable else value))
        module = nnx.merge(self._parts.graph, nnx.from_flat_state(leaves))
        return set_mode(module, train)


class _NnxSlot(NamedTuple):
    """The place of an array in module and variables; a random stream has no collection."""

    path: tuple[Any, ...]
    names: Path
    collection: str | None
    leaf: Any


class _NnxParts(NamedTuple):
    graph: Any
    state: Any
    slots: tuple[_NnxSlot, ...]


def _call(
    module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], train: bool, key: Key | None
) -> Any:
    kwargs = dict(kwargs)
    function = method_of(module, kwargs.pop("method", None))
    flags: dict[str, Any] = mode_flag(function, train, len(inputs))
    names = parameters(function)[len(inputs) :]
    if key is not None and "rngs" in names:
        flags["rngs"] = nnx.Rngs(key)
    if key is not None:
        flags.update((name, key) for name in ("rng", "key") if name in names)
    with warnings.catch_warnings():
        # Flax's advice to its caller concerns Distaff, not the user.
        warnings.filterwarnings("ignore", r"Using 'Module\.sow", DeprecationWarning)
        return function(*inputs, **{**flags, **kwargs})


def _collection(leaf: Any) -> str | None:
    if isinstance(leaf, nnx.RngState):
        return None
    if not isinstance(leaf, nnx.Variable):
        return "arrays"
    if isinstance(leaf, nnx.BatchStat):
        return "batch_stats"
    is_trained = isinstance(leaf, nnx.Param) and jnp.issubdtype(_value(leaf).dtype, jnp.inexact)
    return "params" if is_trained else type(leaf).__name__


def _split(module: Any) -> tuple[Any, Callable[[Any], Any]]:
    graph, state = nnx.split(module)
    return state, lambda state: nnx.merge(graph, state)


def _axis_names(leaf: nnx.Variable) -> AxisNames | None:
    """Returns the names that `nnx.with_partitioning` gave to the axes of a parameter."""
    found = leaf.get_metadata("out_sharding", None)
    return tuple(found) if found else None


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _stream(leaf: Any, key: Key) -> jax.Array:
    """Returns the start of a random stream, or of several for stacked layers."""
    like = _value(leaf)
    if isinstance(leaf, nnx.RngCount):
        return jnp.zeros(like.shape, like.dtype)
    return jax.random.split(key, like.shape) if like.shape else key


def _modules(module: nnx.Module) -> dict[Path, Any]:
    """Returns the module and its submodules by path, parents first, without containers."""
    by_path = {
        tuple(map(str, path)): node
        for path, node in nnx.iter_modules(module)
        if not path or callable(node)
    }
    return dict(sorted(by_path.items(), key=lambda item: len(item[0])))


def _with_traced_arrays(module: nnx.Module) -> nnx.Module:
    """Marks traced arrays that are not variables as data, as NNX does outside of a trace."""
    for _, node in nnx.iter_modules(module):
        for name, value in list(vars(node).items()):
            if isinstance(value, Tracer):
                setattr(node, name, nnx.data(value))
    return module


def _attributes(module: Any) -> dict[str, Any]:
    """Returns the hyperparameters of a module, as JSON."""
    held = (nnx.Module, nnx.Variable, nnx.Rngs, jax.Array)
    values = {
        name: to_json(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, held)
    }
    return {name: value for name, value in values.items() if "$repr" not in str(value)}


def _class_name(module: Any) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"
