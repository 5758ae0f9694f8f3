"""The types of optimizer that a trainer accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import optax

from distaff.errors import ConfigError
from distaff.optim import catalog
from distaff.optim.config import OptimizerConfig

OptimizerLike: TypeAlias = (
    OptimizerConfig
    | optax.GradientTransformation
    | optax.MultiSteps
    | Callable[[int], OptimizerConfig | optax.GradientTransformation | optax.MultiSteps]
)
"""An optimizer: a config, an Optax transformation, or a function of `total_steps`."""


def as_optimizer(given: OptimizerLike | None) -> OptimizerLike:
    """Returns a valid optimizer unchanged; the default one for None.

    Raises:
        ConfigError: it has none of the types that a trainer accepts.
    """
    if given is None:
        return OptimizerConfig()
    check_optimizer(given)
    return given


def check_optimizer(optimizer: Any) -> None:
    """Checks the type of an optimizer without building it.

    Raises:
        ConfigError: it has none of the types that a trainer accepts.
    """
    if isinstance(optimizer, OptimizerConfig | optax.GradientTransformation | optax.MultiSteps):
        return
    for name, function in catalog.optimizers().items():
        if optimizer is function:
            raise ConfigError(
                f"optimizer is Optax's function {name!r} itself, which would use the number of "
                f"steps as its learning rate. Call it, or pass OptimizerConfig({name!r})."
            )
    if isinstance(optimizer, type) or not callable(optimizer):
        hint = f" Did you mean OptimizerConfig({optimizer!r})?" * isinstance(optimizer, str)
        raise ConfigError(
            "optimizer must be an OptimizerConfig, an optax.GradientTransformation, or a function "
            'of total_steps that returns one, such as OptimizerConfig("adamw", learning_rate=1e-3) '
            f"or an Optax transformation like optax.adamw(1e-3), and is {optimizer!r}.{hint}"
        )
    try:
        inspect.signature(optimizer).bind(None)
    except TypeError as error:
        raise ConfigError(
            "An optimizer function must accept the total number of steps, f(total_steps); "
            f'{optimizer!r} does not: {error}. Write such a function, OptimizerConfig("adamw", '
            "learning_rate=1e-3), or an Optax transformation such as optax.adamw(1e-3)."
        ) from None
    except ValueError:  # a function in C without a signature
        return
