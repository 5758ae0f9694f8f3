"""The optimizers that a config can name: Optax's, found by signature, and VeLO."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping

import optax
import optax.contrib

from distaff.optim.learned import velo
from distaff.optim.transforms.soap import soap

FIXED_RATE = frozenset({"optimistic_adam", "rprop", "sm3"})
"""Optimizers that accept no schedule as their learning rate."""

DECAY_IN_GRADIENT = frozenset({"momentum", "sgd"})
"""Optimizers without weight decay, for which L2 in the gradient is the classical form."""

DECAY_IN_UPDATE = frozenset({"muon"})
"""Optimizers whose decoupled decay no Optax mask covers fully.

`optax.contrib.muon` masks the decay of its matrices, but decays all parameters that it passes to
AdamW, including biases and norm scales.
"""

LEARNED: Mapping[str, Callable[..., optax.GradientTransformationExtraArgs]] = {"velo": velo}
"""Trained networks, which need weights and the length of the run but no learning rate."""

REFUSED: Mapping[str, str] = {
    "dpsgd": (
        "'dpsgd' needs the gradient of each example, [batch, ...], but a training step computes "
        "the mean gradient of a batch, where its noise does not protect privacy. Pass "
        "optax.contrib.dpsgd(...) as the optimizer, and override create_functions with a "
        "train_step that computes jax.vmap(jax.grad(loss), (None, 0))(state.params, batch) and "
        "returns state.apply_gradients(grads=...)."
    )
}
"""Optax functions that a name alone cannot configure, with the remedy."""

_DECAY_ARGUMENTS = frozenset(
    {"adam_weight_decay", "mask", "weight_decay_mask", "weight_decay_rate"}
)


_RATE_OF_ONE = {"adadelta", "lbfgs"}
"""Optimizers whose default learning rate None means 1.

Adafactor's None stands for a schedule of its paper that Optax leaves out.
"""


class DefaultRate(float):
    """A learning rate that was not set; it changes with the optimizer's name."""


class DefaultSchedule(str):
    """A schedule that was not set; it changes with the optimizer's name."""


RATE = DefaultRate(1e-3)
SCHEDULE = DefaultSchedule("cosine")


def default_rate(name: str) -> DefaultRate:
    """Returns the default learning rate of a known optimizer: Optax's if it has one, else 1e-3."""
    if name in LEARNED:
        return RATE
    own = inspect.signature(optimizers()[name]).parameters["learning_rate"].default
    if isinstance(own, int | float):
        return DefaultRate(own)
    return DefaultRate(1.0) if name in _RATE_OF_ONE else RATE


def default_schedule(name: str) -> DefaultSchedule:
    """Returns the default schedule: constant for an optimizer that needs none, else cosine."""
    return DefaultSchedule("constant") if needs_no_schedule(name) else SCHEDULE


def needs_no_schedule(name: str) -> bool:
    """Returns whether an optimizer averages or searches instead of lowering its learning rate."""
    return name == "lbfgs" or name.startswith("schedule_free")


@functools.cache
def optimizers() -> Mapping[str, Callable[..., optax.GradientTransformation]]:
    """Returns the functions that build an optimizer, by name.

    These are the functions of `optax` and `optax.contrib` whose first parameter is `learning_rate`,
    except building blocks (`scale_by_...`). `momentum` is SGD with momentum 0.9 (Sutskever et al.,
    2013), and `soap` is that of this package.
    """
    by_name = {
        name: function
        for module in (optax.contrib, optax)
        for name, function in vars(module).items()
        if _is_optimizer(name, function) and name not in REFUSED
    }
    momentum = functools.partial(optax.sgd, momentum=0.9)
    return {**by_name, "momentum": momentum, "soap": soap}


def options_of(name: str) -> Mapping[str, inspect.Parameter]:
    """Returns the arguments of a known optimizer that a config may set in `options`."""
    function = LEARNED[name] if name in LEARNED else optimizers()[name]
    return {
        argument: parameter
        for argument, parameter in inspect.signature(function).parameters.items()
        if owner_of(argument) is None and argument != "total_steps"
    }


def owner_of(argument: str) -> str | None:
    """Returns the field of `OptimizerConfig` that sets an Optax argument, or None."""
    if argument in _DECAY_ARGUMENTS:
        return "weight_decay"
    return argument if argument in {"learning_rate", "warmup_steps", "weight_decay"} else None


def decay_argument(name: str) -> str:
    """Returns the name of the weight-decay argument of an optimizer, whether or not it has one."""
    return "weight_decay_rate" if name == "adafactor" else "weight_decay"


def mask_argument(name: str) -> str | None:
    """Returns the name of the mask argument of an optimizer with masked weight decay, or None."""
    parameters = inspect.signature(optimizers()[name]).parameters
    if decay_argument(name) not in parameters or name in DECAY_IN_UPDATE:
        return None
    return next((mask for mask in ("mask", "weight_decay_mask") if mask in parameters), None)


def takes_weight_decay(name: str) -> bool:
    """Returns whether an optimizer supports weight decay that excludes biases and norm scales."""
    own = LEARNED.keys() | DECAY_IN_GRADIENT | DECAY_IN_UPDATE
    return name in own or mask_argument(name) is not None


def _is_optimizer(name: str, function: object) -> bool:
    if not isinstance(function, types.FunctionType | functools.partial):
        return False
    first_argument = next(iter(inspect.signature(function).parameters), None)
    return first_argument == "learning_rate" and not name.startswith(("_", "scale_by_"))
