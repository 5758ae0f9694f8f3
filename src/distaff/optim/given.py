"""Checks of what is given as optimizer, before a trainer is made."""

from __future__ import annotations

import inspect
from typing import Any

import optax

from distaff.errors import ConfigError
from distaff.optim import catalog
from distaff.optim.build import OptimizerLike
from distaff.optim.config import OptimizerConfig

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
    _check(given)
    return given


def _check(optimizer: Any) -> None:
    """Checks the form of an optimizer; nothing is built.

    Raises:
        ConfigError: it is none of the forms that a trainer takes.
    """
    if isinstance(optimizer, OptimizerConfig | optax.GradientTransformation | optax.MultiSteps):
        return
    if isinstance(optimizer, str):
        raise ConfigError(
            f"optimizer must be an OptimizerConfig, and is the name {optimizer!r}. Did you mean "
            f"OptimizerConfig({optimizer!r})? {_FORMS}"
        )
    for name, function in catalog.optimizers().items():
        if optimizer is function:
            raise ConfigError(
                f"optimizer is Optax's function {name!r} itself, which would take the number of "
                f"steps for its learning rate. Call it, or pass OptimizerConfig({name!r})."
            )
    if isinstance(optimizer, type) or not callable(optimizer):
        raise ConfigError(
            f"optimizer must be a config or a transformation, and is {optimizer!r}. {_FORMS}"
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
