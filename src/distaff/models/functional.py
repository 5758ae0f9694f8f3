"""A bare forward function, `apply_fn(variables, *inputs)`, behind the functional face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distaff.errors import ConfigError
from distaff.models.adapter import LayerRow, Variables
from distaff.typing import Key


class FunctionModel:
    """Someone's own forward function, as found in `TrainState.apply_fn`.

    Args:
        apply_fn: called as `apply_fn({"params": params}, *inputs, **kwargs)`.
    """

    def __init__(self, apply_fn: Callable[..., Any]) -> None:
        self.module = apply_fn
        self.apply_fn = apply_fn

    def init(self, key: Key, *inputs: Any) -> Variables:
        """Refuses: a forward function does not say how its parameters are made."""
        raise ConfigError(
            "A forward function has no init. Make the parameters yourself and pass them to "
            "TrainState.create(params=...), or give a Flax module."
        )

    def apply(
        self, variables: Variables, *inputs: Any, train: bool, key: Key | None, **kwargs: Any
    ) -> tuple[Any, Variables]:
        """Calls the function; it draws nothing and changes nothing."""
        return self.apply_fn({"params": variables.params}, *inputs, **kwargs), variables

    def bind(self, variables: Variables) -> Callable[..., Any]:
        """Returns the function with its parameters inside."""
        return lambda *inputs, **kwargs: self.apply_fn(
            {"params": variables.params}, *inputs, **kwargs
        )

    def layers(self, key: Key, *inputs: Any) -> list[LayerRow]:
        """Lists nothing: a function has no modules."""
        return []
