"""The one functional face that every kind of model shows to the rest of the house."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeGuard

import jax
from flax import traverse_util

from distaff.core.typing import Key, Params, PyTree
from distaff.errors import StateError


class Variables(NamedTuple):
    """A model's arrays: what the optimizer changes, and what the forward pass changes.

    Attributes:
        params: the trainable arrays.
        batch_stats: running statistics of normalisation layers, or None.
        collections: every other mutable collection by name, or None.
    """

    params: Params
    batch_stats: PyTree = None
    collections: Mapping[str, PyTree] | None = None

    @classmethod
    def of(cls, collections: Mapping[str, PyTree]) -> Variables:
        """Returns the variables that lie in collections by name, as Flax Linen has them."""
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
    """One line of the model table.

    Attributes:
        path: the module's path, such as `Conv_0`; empty for the whole model.
        kind: the module's class name.
        output: shapes and dtypes of what it returns, such as `float32[64,8,8,32]`.
        variables: its own arrays, not its children's: collection, name, shape and dtype.
        flops: its own floating point operations in one forward pass, without those of the modules
            it calls; None where they are not known.
    """

    path: str
    kind: str
    output: str
    variables: tuple[tuple[str, str, tuple[int, ...], Any], ...]
    flops: float | None = None


class Model(Protocol):
    """A model as pure functions of its variables. One implementation per kind of module."""

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The forward function kept in `TrainState.apply_fn`: a method of this object.

        The state finds the model again by it. Linen's is the module's own `apply`.
        """
        ...

    @property
    def module(self) -> Any:
        """The module itself, whose class names the model."""
        ...

    @property
    def record(self) -> Any:
        """What a run records of it, as strict JSON can hold it: the same for equal models."""
        ...

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables it came with; None for a model whose variables `init` makes.

        Args:
            key: source of what is drawn beside them, as by a `Lora`.
        """
        ...

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Makes the variables for inputs shaped like these."""
        ...

    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass.

        Args:
            variables: the model's arrays.
            *inputs: handed to the module.
            train: whether dropout drops and running statistics move.
            key: source of every random stream; None for a model that draws nothing.
            **kwargs: handed to the module; they win over what the adapter would pass.

        Returns:
            The outputs, and the variables with those that the pass changed.
        """
        ...

    def bind(self, variables: Variables) -> Any:
        """Returns the module with its variables inside, to be called directly."""
        ...

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules in order of call; nothing is computed on a device."""
        ...


_FACE = ("apply_fn", "module", "record", "ready", "init", "apply", "bind", "layers")
_ABSENT = object()


def is_model(source: Any) -> TypeGuard[Model]:
    """Tells whether an object has all that `Model` has; no property of it is evaluated."""
    found = (inspect.getattr_static(source, name, _ABSENT) for name in _FACE)
    return not isinstance(source, type) and all(member is not _ABSENT for member in found)


class Adapter(ABC):
    """What the adapters have in common that take a module apart and put it together themselves."""

    def ready(self, key: Key) -> Variables | None:
        """Returns the variables it came with, if any."""
        return None

    @abstractmethod
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass; see `Model`."""

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The method `forward` of `light`: JAX's caches keep the structure of a state for long."""
        return self.light.forward

    @property
    def light(self) -> Self:
        """The model without the numbers that it came with; by default it came with none."""
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


def has_numbers(tree: PyTree) -> bool:
    """Tells whether a pytree holds a JAX array, and not only the forms of some."""
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def without_numbers(tree: PyTree) -> PyTree:
    """Returns a pytree with the form of each JAX array in its place."""

    def form(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf

    return jax.tree.map(form, tree)


def nested(leaves: Iterable[tuple[str, tuple[str, ...], Any]]) -> Variables:
    """Returns variables as plain nested dictionaries.

    Args:
        leaves: collection, path and array of each.
    """
    collections: dict[str, dict[tuple[str, ...], Any]] = {"params": {}}
    for collection, path, leaf in leaves:
        collections.setdefault(collection, {})[path] = leaf
    return Variables.of({n: traverse_util.unflatten_dict(x) for n, x in collections.items()})


def leaf_of(collections: Mapping[str, PyTree], collection: str, path: tuple[str, ...]) -> Any:
    """Returns one array of a model's variables.

    Raises:
        StateError: it is not there.
    """
    node: Any = collections
    for name in (collection, *path):
        if not isinstance(node, Mapping) or name not in node:
            raise StateError(
                f"The model's forward pass needs {'/'.join((collection, *path))!r}, which is not "
                f"among the variables it was given: {sorted(collections)}. Pass all collections, "
                "as trainer.state or trainer.run_model_init has them."
            )
        node = node[name]
    return node
