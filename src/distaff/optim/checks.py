"""Checks of the fields of an `OptimizerConfig`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from distaff.core.config.checks import is_traced, whole
from distaff.errors import ConfigError, nearest
from distaff.optim import catalog
from distaff.optim.factory import check_name, is_factory
from distaff.optim.options import (
    check_options,
    is_finite,
    may_decay,
    no_decay_remedy,
    plain,
)
from distaff.optim.transforms.plateau import Plateau

ScheduleName: TypeAlias = Literal[
    "constant", "cosine", "linear", "exponential", "inverse_sqrt", "one_cycle", "wsd"
]

DecayShape: TypeAlias = Literal["1-sqrt", "linear"]

_NUMBERS = (
    *("learning_rate", "warmup_steps", "end_fraction", "decay_steps", "weight_decay"),
    *("clip_norm", "clip_value", "accumulate"),
)


_LAYOUT = re.compile(r"(?=.*i)(?=.*o)[bio]{2,}")

PATTERNS = ("no_decay", "also_decay", "no_muon", "also_muon")
"""Fields that hold shell patterns for the paths of parameters."""


def complete(config: Any) -> None:
    """Sets the defaults of an `OptimizerConfig` that depend on its name, and checks its fields.

    Groups are checked by the config itself.

    Raises:
        ConfigError: a value is out of range, or a name is unknown.
    """
    if not isinstance(config.name, str):
        raise ConfigError(
            f"OptimizerConfig takes the name of an optimizer; got {config.name!r}. Write "
            'OptimizerConfig("adamw", ...), or pass an Optax transformation to the trainer '
            "directly: optimizer=optax.adamw(1e-3)."
        )
    to_python_scalars(config, _NUMBERS)
    _check_names(config)
    _fill_in_defaults(config)
    _check_numbers(config)
    _check_decay_steps(config)
    _check_options(config)
    _check_combinations(config)
    _check_patterns(config)


def to_python_scalars(config: Any, names: Sequence[str]) -> None:
    """Converts scalars of NumPy or JAX among the fields of a config to Python scalars."""
    for name in names:
        object.__setattr__(config, name, plain(getattr(config, name)))


def _fill_in_defaults(config: Any) -> None:
    """Sets a learning rate or schedule that was not given to the default of the optimizer."""
    if isinstance(config.learning_rate, catalog.DefaultRate):
        is_known = not is_factory(config.name)
        rate = catalog.default_rate(config.name) if is_known else catalog.RATE
        object.__setattr__(config, "learning_rate", rate)
    if isinstance(config.schedule, catalog.DefaultSchedule):
        object.__setattr__(config, "schedule", catalog.default_schedule(config.name))


def _check_names(config: Any) -> None:
    known = catalog.optimizers().keys() | catalog.LEARNED.keys()
    if is_factory(config.name):
        check_name(config.name)
    elif config.name in catalog.REFUSED:
        raise ConfigError(f"The optimizer {catalog.REFUSED[config.name]}")
    elif config.name not in known:
        raise ConfigError(
            f"No optimizer is called {config.name!r}. {nearest(str(config.name).lower(), known)} "
            "Any other can be named as 'package.module:factory', or passed as the "
            "optax.GradientTransformation itself."
        )
    schedules, shapes = get_args(ScheduleName), get_args(DecayShape)
    if config.schedule not in schedules:
        raise ConfigError(
            f"No schedule is called {config.schedule!r}. {nearest(str(config.schedule), schedules)}"
        )
    if config.decay_shape not in shapes:
        raise ConfigError(
            f"No decay_shape is called {config.decay_shape!r}. "
            f"{nearest(str(config.decay_shape), shapes)}"
        )


def _check_numbers(config: Any) -> None:
    for name in ("learning_rate", "weight_decay", "end_fraction"):
        value = getattr(config, name)
        if name != "end_fraction" and is_traced(value):  # as in a search for it
            continue
        if not is_finite(value) or value < 0:
            raise ConfigError(f"{name} must be a finite int or float >= 0; got {value!r}.")
    if config.end_fraction > 1:
        raise ConfigError(
            f"end_fraction must be at most 1; got {config.end_fraction!r}: it is a fraction of "
            "learning_rate, the highest learning rate of the run."
        )
    for name in ("clip_norm", "clip_value"):
        value = getattr(config, name)
        if value is None or is_traced(value):
            continue
        if not is_finite(value) or value <= 0:
            raise ConfigError(
                f"{name} must be a finite int or float > 0; got {value!r}. "
                "Use None to disable clipping."
            )
    whole("accumulate", config.accumulate)
    steps = config.warmup_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < 2**31:
        raise ConfigError(f"warmup_steps must be an int >= 0 and < 2**31; got {steps!r}.")


def _check_decay_steps(config: Any) -> None:
    steps = config.decay_steps
    is_number = is_finite(steps) and (steps >= 1 if isinstance(steps, int) else 0 < steps < 1)
    if not is_number or steps >= 2**31:
        raise ConfigError(
            "decay_steps must be a number of updates, an int >= 1, or a fraction of the run, a "
            f"float between 0 and 1; got {steps!r}."
        )


def _check_options(config: Any) -> None:
    if not isinstance(config.options, Mapping):
        raise ConfigError(f"options must be a mapping by name; got {config.options!r}.")
    object.__setattr__(config, "options", {n: plain(v) for n, v in config.options.items()})
    check_options(config.name, config.options)


def _check_combinations(config: Any) -> None:
    if config.schedule == "exponential" and config.end_fraction == 0:
        raise ConfigError(
            "The schedule 'exponential' never reaches 0, and end_fraction is 0. "
            "Use a small fraction such as 0.01, or another schedule."
        )
    if config.accumulate > 1 and config.name in ("lbfgs", "sophia"):
        raise ConfigError(
            f"The optimizer {config.name!r} evaluates the loss of its batch at other parameters, "
            f"but accumulate is {config.accumulate}, and only the last batch is still available "
            "then. Use accumulate=1 with larger batches."
        )
    has_fixed_rate = config.schedule == "constant" and config.warmup_steps == 0
    if config.name in catalog.FIXED_RATE and not has_fixed_rate:
        raise ConfigError(
            f"The optimizer {config.name!r} needs a fixed learning rate, and schedule is "
            f"{config.schedule!r} with warmup_steps={config.warmup_steps}. "
            "Use schedule='constant' and warmup_steps=0."
        )
    is_known = not is_factory(config.name)
    if is_known and may_decay(config.weight_decay) and not catalog.takes_weight_decay(config.name):
        raise ConfigError(
            f"The optimizer {config.name!r} has no weight decay that can exclude biases and norm "
            f"scales, and weight_decay is {config.weight_decay!r}. {_decay_remedy(config)}"
        )


def check_learned(config: Any) -> None:
    """Checks that a config of a learned optimizer, whose groups are valid, sets no learning rate.

    Raises:
        ConfigError: it or a group does.
    """
    if config.name not in catalog.LEARNED:
        return
    fields = type(config).__dataclass_fields__
    for name in ("learning_rate", "schedule", "warmup_steps", "end_fraction"):
        value, default = getattr(config, name), fields[name].default
        if value != default:
            raise ConfigError(
                f"The optimizer {config.name!r} sizes its steps itself, without a learning rate or "
                f"schedule, and {name} is {value!r}. Leave it at its default, {default!r}."
            )
    for group in config.groups:
        if group.learning_rate is not None:
            raise ConfigError(
                f"The optimizer {config.name!r} has no learning rate, but "
                f"ParamGroup({group.pattern!r}) sets learning_rate={group.learning_rate!r}. "
                "Set the optimizer of the group instead."
            )


def check_plateau(config: Any) -> None:
    """Checks the plateau rule of a config, whose groups are valid.

    Raises:
        ConfigError: it is not a `Plateau`, or an optimizer has no learning rate that may fall.
    """
    if config.plateau is None:
        return
    if not isinstance(config.plateau, Plateau):
        raise ConfigError(
            f"plateau must be an optim.Plateau or None; got {config.plateau!r}. Write "
            "plateau=optim.Plateau(factor=0.1, patience=5)."
        )
    names = [config.name, *(getattr(group.optimizer, "name", "") for group in config.groups)]
    for name in names:
        if name in catalog.LEARNED or catalog.needs_no_schedule(name):
            raise ConfigError(
                f"The optimizer {name!r} sizes its steps itself, so its learning rate may not fall "
                "during the run, and plateau is set. Use plateau=None, or another optimizer."
            )


def _check_patterns(config: Any) -> None:
    for name in PATTERNS:
        patterns = getattr(config, name)
        is_sequence = isinstance(patterns, tuple | list)
        if not is_sequence or not all(isinstance(each, str) and each for each in patterns):
            raise ConfigError(
                f"{name} must be a tuple of patterns for the paths of parameters, such as "
                f"('*/embedding',); got {patterns!r}."
            )
        object.__setattr__(config, name, tuple(patterns))
    given = {name: getattr(config, name) for name in ("no_muon", "also_muon")}
    if any(given.values()) and config.name != "muon":
        raise ConfigError(
            f"no_muon and also_muon belong to the optimizer 'muon', and name is {config.name!r} "
            f"with {given!r}. To train some parameters differently, use groups."
        )
    for pattern in config.also_muon:
        _, is_given, layout = pattern.partition("=")
        if is_given and not _LAYOUT.fullmatch(layout):
            raise ConfigError(
                "A pattern of also_muon may end with '=' and a letter for each axis: i for an "
                "input, o for an output, b for the index of a matrix, with one i and one o at "
                f"least, such as 'Conv_*/kernel=iiio'; got {pattern!r}."
            )


def _decay_remedy(config: Any) -> str:
    decoupled = f"{config.name}w"
    if decoupled in catalog.optimizers():
        return (
            "L2 in the gradient of an adaptive optimizer is not weight decay (Loshchilov & Hutter "
            f'2019, arXiv:1711.05101). Use OptimizerConfig("{decoupled}", '
            f"weight_decay={config.weight_decay!r})."
        )
    return no_decay_remedy(config.name)
