"""A model whose first input is standardized in each forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distaff.core.typing import Key, PyTree
from distaff.data import Standardize, Transform
from distaff.models.adapter import Model, ModelWrapper, Variables, accepts_collections
from distaff.models.observed import Observed, observing
from distaff.models.remat.model import reached
from distaff.models.remat.options import RematConfig


def initial_inputs(inputs: tuple[Any, ...], scale: Standardize | Transform | None) -> Any:
    """Returns the inputs to create variables for: a `Transform` may change the features."""
    is_changed = isinstance(scale, Transform) and inputs
    return (scale(inputs[0]), *inputs[1:]) if is_changed else inputs


class StandardizedModel(ModelWrapper):
    """Runs the passes of a model on standardized inputs. The model itself is not changed.

    Args:
        inner: the model.
        scale: standardizes, or otherwise transforms, the first input of each pass.
    """

    def __init__(self, inner: Model, scale: Standardize | Transform) -> None:
        super().__init__(inner)
        self._scale = scale

    def observing(self, observed: Observed) -> StandardizedModel:
        """Returns this model with its passes recorded."""
        return StandardizedModel(observing(self.inner, observed), self._scale)

    def rematerialized(self, remat: RematConfig) -> StandardizedModel:
        """Returns this model with modules that are computed again."""
        return StandardizedModel(reached(self.inner, remat), self._scale)

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

    def _scaled(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._scale(inputs[0]), *inputs[1:]) if inputs else inputs
