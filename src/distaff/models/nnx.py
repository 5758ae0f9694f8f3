"""Flax NNX modules behind the functional face: taken apart once, put together in each trace."""

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
    has_numbers,
    leaf_of,
    nested,
    without_numbers,
)
from distaff.models.as_in_linen import applies_collections
from distaff.models.flags import method_of, mode_flag, parameters
from distaff.models.layers import Library, Opened, Path, listed_calls
from distaff.models.linen_collections import is_asked
from distaff.models.nnx_modules import Snapshot, set_mode, sown, without_sown
from distaff.models.observed import Observed


class NnxModel(Adapter):
    """A `flax.nnx.Module` as pure functions.

    Its variables are plain nested dictionaries: `nnx.Param` is what is trained, `nnx.BatchStat` the
    running statistics, any other type of variable a collection of its class's name, and arrays that
    are no variable the collection `arrays`. What modules sow is no state; `mutable="Intermediate"`
    returns it, by the class of its variables, beside the outputs of its pass.

    Random streams are no variables: each pass begins every stream anew, from a key of its own that
    is drawn from the key of the pass. So they need no checkpoint, and the key that a module was
    made with, and how often it has drawn, make no difference.

    Whether to train is told to all modules inside that have an attribute for it, such as
    `deterministic`, `use_running_average` or `is_training`, as `module.train()` and `module.eval()`
    do, and to the called method if it has a parameter for it, as with Linen.

    Args:
        source: a module, whose variables are the initial ones whatever the seed; or a function
            `f(rngs)` that makes one, which is called with the trainer's seed.
    """

    def __init__(
        self, source: nnx.Module | Callable[..., Any], observed: Observed | None = None
    ) -> None:
        self._source: Any = without_sown(source) if isinstance(source, nnx.Module) else source
        self._observed = observed

    def observing(self, observed: Observed) -> NnxModel:
        """Returns this model, whose passes are noted."""
        copy = NnxModel.__new__(NnxModel)
        copy.__dict__.update(self.__dict__, _observed=observed)
        copy.__dict__.pop("light", None)
        return copy

    @functools.cached_property
    def light(self) -> NnxModel:
        """The model without the numbers of its module, such as of one passed ready-made."""
        graph, state = nnx.split(self.module)
        if not has_numbers(state):
            return self
        copy = NnxModel(nnx.merge(graph, without_numbers(state)), self._observed)
        copy.__dict__["light"] = copy
        return copy

    @functools.cached_property
    def module(self) -> nnx.Module:
        """The module; one without numbers where a function makes it."""
        if isinstance(self._source, nnx.Module):
            return self._source
        try:
            return nnx.eval_shape(lambda: self._made(jax.random.key(0)))
        except jax.errors.JAXTypeError:  # It computes on the host.
            return self._made(jax.random.key(0))

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a module that was passed ready-made."""
        is_made = isinstance(self._source, nnx.Module)
        return self._read(nnx.split(self._source)[1]) if is_made else None

    @property
    def record(self) -> dict[str, Any]:
        """Class and plain attributes of every module inside, and the form of every array."""
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
        """Makes the variables; the inputs are not needed, since NNX modules know their shapes."""
        if isinstance(self._source, nnx.Module):
            return self._read(nnx.split(self._source)[1])
        return self._read(nnx.split(self._made(key))[1])

    @applies_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; in training, every variable but the parameters may change.

        `method="encode"` calls another method. A parameter `rngs` is given streams, and one called
        `rng` or `key` a key, if the caller does not.

        Raises:
            NoKeyError: it draws random numbers in training, and there is no key.
        """
        asked = kwargs.pop("mutable", None)
        module = self._merged(variables, train, key)
        before = Snapshot.of(module)
        outputs = _called(module, inputs, kwargs, train, key)
        before.check(module, must_not_draw=train and key is None, observed=self._observed)
        state = nnx.split(module)[1]
        if is_asked(asked):
            known = {slot.path for slot in self._parts.slots}
            outputs = outputs, sown(state, known, asked)
        if not train:
            return outputs, variables
        return outputs, self._read(state)._replace(params=variables.params)

    def bind(self, variables: Variables) -> nnx.Module:
        """Returns a live module with the variables inside, in evaluation: `bound(x)`.

        `bound.train()` makes it train; its random streams then begin with a fixed key.
        """
        return self._merged(variables, False, None)

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in order of call, by abstract evaluation.

        A module that runs inside an NNX transformation (`nnx.scan`) has no output here. FLOPs are
        those of evaluation, as XLA estimates them before it optimizes; as with Linen, a module's
        first call counts as its own, any other as its caller's.
        """

        def opened(variables: Variables, key: Key, train: bool) -> Opened:
            module = self._merged(variables, train, key)
            return Opened(_modules(module), lambda *inputs: _called(module, inputs, {}, train, key))

        return listed_calls(self, opened, key, inputs, Library(_apart))

    def _made(self, key: Key) -> nnx.Module:
        source: Any = self._source
        module = source(rngs=nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise ConfigError(
                "A model as a function f(rngs) returns a flax.nnx.Module; "
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

    def _read(self, state: Any) -> Variables:
        found = dict(nnx.to_flat_state(state))
        return nested(
            (slot.collection, slot.names, _value(found[slot.path]))
            for slot in self._parts.slots
            if slot.collection is not None
        )

    def _merged(self, variables: Variables, train: bool, key: Key | None) -> nnx.Module:
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
    """Where an array is in the module, and in the variables; no collection for random streams."""

    path: tuple[Any, ...]
    names: Path
    collection: str | None
    leaf: Any


class _NnxParts(NamedTuple):
    graph: Any
    state: Any
    slots: tuple[_NnxSlot, ...]


def _called(
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
        # Flax advises its caller to call the module otherwise: that is Distaff.
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


def _apart(module: Any) -> tuple[Any, Callable[[Any], Any]]:
    graph, state = nnx.split(module)
    return state, lambda state: nnx.merge(graph, state)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _stream(leaf: Any, key: Key) -> jax.Array:
    """Returns the beginning of a random stream, or of several for layers that are stacked."""
    like = _value(leaf)
    if isinstance(leaf, nnx.RngCount):
        return jnp.zeros(like.shape, like.dtype)
    return jax.random.split(key, like.shape) if like.shape else key


def _modules(module: nnx.Module) -> dict[Path, Any]:
    """Returns the module and those inside by path, each before its own; containers are none."""
    found = {
        tuple(map(str, path)): node
        for path, node in nnx.iter_modules(module)
        if not path or callable(node)
    }
    return dict(sorted(found.items(), key=lambda item: len(item[0])))


def _with_traced_arrays(module: nnx.Module) -> nnx.Module:
    """Marks arrays that are no variables as data, as NNX does itself where it is not traced."""
    for _, node in nnx.iter_modules(module):
        for name, value in list(vars(node).items()):
            if isinstance(value, Tracer):
                setattr(node, name, nnx.data(value))
    return module


def _attributes(module: Any) -> dict[str, Any]:
    """Returns the attributes that say what kind of module it is, as JSON."""
    held = (nnx.Module, nnx.Variable, nnx.Rngs, jax.Array)
    values = {
        name: to_json(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, held)
    }
    return {name: value for name, value in values.items() if "$repr" not in str(value)}


def _class_name(module: Any) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"
