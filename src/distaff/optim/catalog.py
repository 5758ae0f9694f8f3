"""The optimizers that a config can name: what Optax offers, found by signature, and VeLO."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping

import optax
import optax.contrib

from distaff.optim.learned import velo

FIXED_RATE = frozenset({"optimistic_adam", "rprop", "sm3"})
"""Optimizers whose learning rate must be a number: Optax lets no schedule in."""

DECAY_IN_GRADIENT = frozenset({"momentum", "sgd"})
"""Optimizers without a decay of their own, where L2 in the gradient is the classical form."""

DECAY_IN_UPDATE = frozenset({"muon"})
"""Optimizers with decoupled decay that no single mask of Optax reaches.

`optax.contrib.muon` masks the decay of its matrices, but decays everything it hands to AdamW,
biases and norm scales among it.
"""

LEARNED: Mapping[str, Callable[..., optax.GradientTransformationExtraArgs]] = {"velo": velo}
"""Optimizers that are trained networks: no learning rate, but weights and the run's length."""

REFUSED: Mapping[str, str] = {
    "dpsgd": (
        "'dpsgd' needs the gradient of each example, [batch, ...], and a training step computes "
        "the mean gradient of a batch, whose noise would protect nobody. Pass "
        "optax.contrib.dpsgd(...) as the optimizer, and override create_functions with a "
        "train_step that computes jax.vmap(jax.grad(loss), (None, 0))(state.params, batch) and "
        "returns state.apply_gradients(grads=...)."
    )
}
"""Functions of Optax that a name alone does not make right, and how they are used."""

_OF_THE_RUN = frozenset({"total_steps"})

_DECAY_ARGUMENTS = frozenset(
    {"adam_weight_decay", "mask", "weight_decay_mask", "weight_decay_rate"}
)


@functools.cache
def optimizers() -> Mapping[str, Callable[..., optax.GradientTransformation]]:
    """Returns the functions of `optax` and `optax.contrib` that make an optimizer, by name.

    An optimizer is what takes `learning_rate` first and is not a building block (`scale_by_...`).
    `momentum` is SGD with momentum 0.9 (Sutskever et al., 2013).
    """
    found = {
        name: function
        for module in (optax.contrib, optax)
        for name, function in vars(module).items()
        if _is_optimizer(name, function) and name not in REFUSED
    }
    return {**found, "momentum": functools.partial(optax.sgd, momentum=0.9)}


def options_of(name: str) -> Mapping[str, inspect.Parameter]:
    """Returns the arguments of a known optimizer that a config may set under `options`."""
    function = LEARNED[name] if name in LEARNED else optimizers()[name]
    return {
        argument: parameter
        for argument, parameter in inspect.signature(function).parameters.items()
        if owner_of(argument) is None and argument not in _OF_THE_RUN
    }


def owner_of(argument: str) -> str | None:
    """Returns the field of `OptimizerConfig` that decides an Optax argument, or None."""
    if argument in _DECAY_ARGUMENTS:
        return "weight_decay"
    return argument if argument in {"learning_rate", "warmup_steps", "weight_decay"} else None


def decay_argument(name: str) -> str:
    """Returns what an optimizer calls its weight decay, if it has one."""
    return "weight_decay_rate" if name == "adafactor" else "weight_decay"


def mask_argument(name: str) -> str | None:
    """Returns what an optimizer with a masked weight decay calls the mask, or None."""
    parameters = inspect.signature(optimizers()[name]).parameters
    if decay_argument(name) not in parameters or name in DECAY_IN_UPDATE:
        return None
    return next((mask for mask in ("mask", "weight_decay_mask") if mask in parameters), None)


def takes_weight_decay(name: str) -> bool:
    """Tells whether an optimizer can have weight decay that spares biases and norm scales."""
    own = LEARNED.keys() | DECAY_IN_GRADIENT | DECAY_IN_UPDATE
    return name in own or mask_argument(name) is not None


def _is_optimizer(name: str, function: object) -> bool:
    if not isinstance(function, types.FunctionType | functools.partial):
        return False
    first_argument = next(iter(inspect.signature(function).parameters), None)
    return first_argument == "learning_rate" and not name.startswith(("_", "scale_by_"))
