"""A model whose first input is standardized in each forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distaff.core.typing import Key, PyTree
from distaff.data import Standardize
from distaff.models.adapter import LayerRow, Model, Variables, accepts_collections
from distaff.models.observed import Observed, observing


class StandardizedModel:
    """Runs the passes of a model on standardized inputs. The model itself is not changed.

    Args:
        inner: the model.
        scale: standardizes the first input of each pass.
    """

    def __init__(self, inner: Model, scale: Standardize) -> None:
        self.inner, self._scale = inner, scale

    def observing(self, observed: Observed) -> StandardizedModel:
        """Returns this model with its passes recorded."""
        return StandardizedModel(observing(self.inner, observed), self._scale)

    @property
    def apply_fn(self) -> Callable[..., Any]:
        """The model's own forward function, on standardized inputs."""
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
        """Creates the variables for inputs of these shapes."""
        return self.inner.init(key, *self._scaled(inputs))

    @accepts_collections
    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Runs the forward pass on standardized inputs; see `Model.apply`."""
        return self.inner.apply(variables, *self._scaled(inputs), train=train, key=key, **kwargs)

    def forward(self, variables: Mapping[str, PyTree], *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model's own forward function, given collections by name."""
        return self.inner.apply_fn(variables, *self._scaled(inputs), **kwargs)

    def bind(self, variables: Variables) -> Any:
        """Returns the module with its variables bound; it takes standardized inputs."""
        return self.inner.bind(variables)

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists the modules of the model."""
        return self.inner.layers(key, *inputs)

    def _scaled(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._scale(inputs[0]), *inputs[1:]) if inputs else inputs
