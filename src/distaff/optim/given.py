"""Checks of what is given as optimizer, before a trainer is made."""

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
"""The forms of an optimizer: a config, the transformation itself, a function of `total_steps`."""

_FORMS = (
    'Write OptimizerConfig("adamw", learning_rate=1e-3), an Optax transformation such as '
    "optax.adamw(1e-3), or a function of the total number of steps that returns one of the two."
)


def as_optimizer(given: OptimizerLike | None) -> OptimizerLike:
    """Returns an optimizer as it is, once its form is checked; the default one for None.

    Raises:
        ConfigError: it is none of the forms that a trainer takes.
    """
    if given is None:
        return OptimizerConfig()
    check_optimizer(given)
    return given


def check_optimizer(optimizer: Any) -> None:
    """Checks the form of an optimizer; nothing is built.

    Args:
        optimizer: anything.

    Raises:
        ConfigError: it is none of the forms that a trainer takes.
    """
    if isinstance(optimizer, OptimizerConfig | optax.GradientTransformation | optax.MultiSteps):
        return
    for name, function in catalog.optimizers().items():
        if optimizer is function:
            raise ConfigError(
                f"optimizer is Optax's function {name!r} itself, which would take the number of "
                f"steps for its learning rate. Call it, or pass OptimizerConfig({name!r})."
            )
    if isinstance(optimizer, type) or not callable(optimizer):
        hint = f" Did you mean OptimizerConfig({optimizer!r})?" * isinstance(optimizer, str)
        raise ConfigError(
            "optimizer must be an OptimizerConfig, an optax.GradientTransformation, or a function "
            'of total_steps that returns one, such as OptimizerConfig("adamw", learning_rate=1e-3) '
            f"or an Optax transformation like optax.adamw(1e-3), and is {optimizer!r}.{hint}"
        )
    try:
        signature = inspect.signature(optimizer)
        signature.bind(None)
    except TypeError as error:
        raise ConfigError(
            "A function given as optimizer takes the total number of steps, f(total_steps); "
            f"{optimizer!r} cannot be called so: {error}. {_FORMS}"
        ) from None
    except ValueError:  # a function in C, which does not say
        return
