"""The one functional face that every kind of model shows to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from distaff.typing import Key, Params, PyTree


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
        """The module's own forward function, kept in `TrainState.apply_fn`."""
        ...

    @property
    def module(self) -> Any:
        """The module itself, whose hyperparameters are recorded."""
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
