"""The common functional interface of all kinds of model."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeGuard, TypeVar

import jax
from flax import traverse_util

from distaff.core.typing import Key, Params, PyTree
from distaff.errors import StateError


class Variables(NamedTuple):
    """A model's arrays: trained by the optimizer, or changed by the forward pass.

    Attributes:
        params: the trainable arrays.
        batch_stats: running statistics of normalization layers, or None.
        collections: every other mutable collection by name, or None.
    """

    params: Params
    batch_stats: PyTree = None
    collections: Mapping[str, PyTree] | None = None

    @classmethod
    def of(cls, collections: Mapping[str, PyTree]) -> Variables:
        """Returns variables from collections by name, as in Flax Linen."""
        rest = dict(collections)
        params, batch_stats = rest.pop("params", {}), rest.pop("batch_stats", None)
        return cls(params, batch_stats, rest or None)

    def by_collection(self) -> dict[str, PyTree]:
        """Returns all collections by name, `params` first."""
        collections = {"params": self.params, **(self.collections or {})}
        if self.batch_stats is not None:
            collections["batch_stats"] = self.batch_stats
        return collections


class LayerRow(NamedTuple):
    """One row of the model table.

    Attributes:
        path: path of the module, such as `Conv_0`; empty for the whole model.
        kind: class name of the module.
        output: shapes and dtypes of its output, such as `float32[64,8,8,32]`.
        variables: arrays of the module, not of its children: collection, name, shape and dtype.
        flops: floating point operations of the module in one forward pass, without its submodules;
            None if unknown.
    """

    path: str
    kind: str
    output: str
    variables: tuple[tuple[str, str, tuple[int, ...], Any], ...]
    flops: float | None = None


class Model(Protocol):
    """A model as pure functions of its variables, implemented once per kind of module."""

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The forward function for `TrainState.apply_fn`; its `__self__` identifies the model.

        For Linen it is the module's own `apply`.
        """

    @property
    def module(self) -> Any:
        """The module itself, whose class names the model."""

    @property
    def record(self) -> Any:
        """A description of the model as strict JSON, equal for equal models."""

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a ready-made module; None if `init` creates them.

        Args:
            key: random key for additional variables, as in a `Lora`.
        """

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Creates the variables for inputs of these shapes."""

    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass.

        Args:
            variables: the model's arrays.
            *inputs: passed to the module.
            train: whether dropout and running statistics are active.
            key: source of every random stream; None for a model that uses no randomness.
            **kwargs: passed to the module; they override arguments set by the adapter.

        Returns:
            The outputs, and the variables, including changed ones.
        """

    def bind(self, variables: Variables) -> Any:
        """Returns the module with its variables bound, to be called directly."""

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in order of call, without computing anything on a device."""


_MEMBERS = ("apply_fn", "module", "record", "ready", "init", "apply", "bind", "layers")
_ABSENT = object()


def is_model(source: Any) -> TypeGuard[Model]:
    """Returns whether an object has all members of `Model`, without evaluating properties."""
    members = (inspect.getattr_static(source, name, _ABSENT) for name in _MEMBERS)
    return not isinstance(source, type) and all(member is not _ABSENT for member in members)


F = TypeVar("F", bound=Callable[..., Any])


def accepts_collections(apply: F) -> F:
    """Lets a model's `apply` also take collections by name: `{"params": ..., "batch_stats": ...}`.

    It then calls `apply_fn` and returns its result, as `module.apply` of Flax Linen.
    """

    @functools.wraps(apply)
    def either(self: Any, variables: Any, *inputs: Any, **kwargs: Any) -> Any:
        if isinstance(variables, Mapping):
            return self.apply_fn(variables, *inputs, **kwargs)
        return apply(self, variables, *inputs, **kwargs)

    return either  # ty: ignore[invalid-explicit-return]


class Adapter(ABC):
    """Base class of adapters that split a module into variables and rebuild it themselves."""

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a ready-made module, or None."""
        return None

    def modules(self) -> dict[tuple[str, ...], Any]:
        """Returns the module and its submodules by path; empty if there are none."""
        return {}

    def named_state(self) -> Any:
        """Returns the state with the name of each array in place of the array, or None."""
        return None

    @abstractmethod
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; see `Model`."""

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The method `forward` of `light`: JAX's caches may hold it for long, so without arrays."""
        return self.light.forward

    @property
    def light(self) -> Self:
        """The model without the arrays of a ready-made module; by default the model itself."""
        return self

    def forward(
        self,
        variables: Mapping[str, PyTree],
        *inputs: Any,
        train: bool = False,
        key: Key | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the outputs for collections by name, `{"params": ..., "batch_stats": ...}`."""
        return self.apply(Variables.of(variables), *inputs, train=train, key=key, **kwargs)[0]


class ModelWrapper(ABC):
    """Base class of models that change the passes of another one, which is not changed itself.

    Args:
        inner: the other model.
    """

    def __init__(self, inner: Model) -> None:
        self.inner = inner

    @abstractmethod
    def forward(self, variables: Mapping[str, PyTree], *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model's own forward function, given collections by name."""

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The method `forward`."""
        return self.forward

    @property
    def module(self) -> Any:
        """The module itself."""
        return self.inner.module

    @property
    def record(self) -> Any:
        """The record of the model."""
        return self.inner.record

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables of a ready-made module, or None."""
        return self.inner.ready(key)

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Creates the variables, as the model alone does."""
        return self.inner.init(key, *inputs)

    def bind(self, variables: Variables) -> Any:
        """Returns the module with its variables bound; each pass is the module's own."""
        return self.inner.bind(variables)

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules of the model."""
        return self.inner.layers(key, *inputs)


def has_numbers(tree: PyTree) -> bool:
    """Returns whether a pytree holds a JAX array, rather than only shapes and dtypes."""
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def without_numbers(tree: PyTree) -> PyTree:
    """Replaces each JAX array of a pytree by a `jax.ShapeDtypeStruct`."""

    def shape_of(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf

    return jax.tree.map(shape_of, tree)


def nested(leaves: Iterable[tuple[str, tuple[str, ...], Any]]) -> Variables:
    """Returns variables as nested dictionaries, from collection, path and array of each leaf."""
    collections: dict[str, dict[tuple[str, ...], Any]] = {"params": {}}
    for collection, path, leaf in leaves:
        collections.setdefault(collection, {})[path] = leaf
    return Variables.of({n: traverse_util.unflatten_dict(x) for n, x in collections.items()})


def leaf_of(collections: Mapping[str, PyTree], collection: str, path: tuple[str, ...]) -> Any:
    """Returns one array of a model's variables.

    Raises:
        StateError: it is missing.
    """
    node: Any = collections
    for name in (collection, *path):
        if not isinstance(node, Mapping) or name not in node:
            raise StateError(
                f"The model's forward pass needs {'/'.join((collection, *path))!r}, which is not "
                f"among the given variables: {sorted(collections)}. Pass all collections, as in "
                "trainer.state or from trainer.run_model_init."
            )
        node = node[name]
    return node
