"""Models of any kind as pure functions of their variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from distaff.errors import ConfigError
from distaff.models.adapter import LayerRow, Model, Variables
from distaff.models.functional import FunctionModel
from distaff.models.linen import LinenModel
from distaff.models.lora import Lora, LoraModel, rebuild

__all__ = [
    "LayerRow",
    "LinenModel",
    "Lora",
    "LoraModel",
    "Model",
    "Variables",
    "as_model",
    "model_of",
    "rebuild",
]


def as_model(module: Any) -> Model:
    """Returns the functional face of a user's module.

    Args:
        module: an unbound `flax.linen.Module`.

    Raises:
        ConfigError: it is something else; a class instead of an instance is named.
    """
    if isinstance(module, Lora):
        return LoraModel(as_model(module.module), module)
    if isinstance(module, nn.Module):
        return LinenModel(module)
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise ConfigError(
            f"A model is a module, not its class: pass {module.__name__}(...) instead of "
            f"{module.__name__}."
        )
    raise ConfigError(
        "A model is a flax.linen.Module; "
        f"got {type(module).__module__}.{type(module).__qualname__}."
    )


def model_of(apply_fn: Callable[..., Any] | None) -> Model:
    """Returns the model whose forward function a `TrainState` holds.

    Args:
        apply_fn: `module.apply` of a Linen module, or any `apply_fn(variables, *inputs)`.

    Raises:
        ConfigError: it is None.
    """
    if apply_fn is None:
        raise ConfigError(
            "ctx.apply needs TrainState.apply_fn, which is None. "
            "Create the state with TrainState.create(apply_fn=model.apply, ...)."
        )
    module = getattr(apply_fn, "__self__", None)
    if isinstance(module, LoraModel):
        return module
    if isinstance(module, nn.Module) and apply_fn == module.apply:
        return LinenModel(module)
    return FunctionModel(apply_fn)
