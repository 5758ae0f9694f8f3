"""OptimizerConfig: optimizer, schedule, clipping and weight decay as plain values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, TypeAlias, get_args

from distaff.errors import ConfigError, nearest
from distaff.optim import catalog

ScheduleName: TypeAlias = Literal[
    "constant", "cosine", "linear", "exponential", "inverse_sqrt", "one_cycle"
]

Option: TypeAlias = bool | int | float | str | None
"""What an option may be: the scalars of JSON."""


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer described by plain values; `build_optimizer` makes it.

    The end of a schedule is a fraction, not a learning rate: it then stays right when
    `learning_rate` alone is changed, on the command line or by a search.

    Args:
        name: sgd, momentum, rmsprop, adam, adamw, lamb, lion, muon, or any other function of
            `optax` or `optax.contrib` that makes an optimizer from a `learning_rate`.
        learning_rate: the highest learning rate of the run.
        schedule: how the learning rate falls after the warm-up; one_cycle rises first.
        warmup_steps: optimizer steps over which the learning rate rises linearly from 0.
        end_fraction: the last learning rate divided by `learning_rate`, from 0 to 1. Not used by
            constant and inverse_sqrt.
        weight_decay: strength of weight decay, which leaves biases and norm scales alone. For
            sgd and momentum it is L2 added to the gradient, for all others what their Optax
            function calls `weight_decay` (adamw, lamb, lion, muon: decoupled, and multiplied by
            the learning rate). The defaults of Optax, such as 1e-4 for adamw, are never used.
        clip_norm: the largest global norm of the gradient; None for no limit.
        clip_value: the largest absolute value of each gradient entry; None for no limit.
        options: further arguments of the Optax function, such as `{"b1": 0.95}`.

    Raises:
        ConfigError: a value is out of range, a name is unknown, or `weight_decay` is asked of an
            optimizer that has none.

    Example:
        >>> OptimizerConfig("adamw", learning_rate=3e-3, warmup_steps=50).schedule
        'cosine'
    """

    name: str = "adamw"
    _: KW_ONLY
    learning_rate: float = 1e-3
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 0
    end_fraction: float = 0.01
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuses what cannot be built."""
        _check_numbers(self)
        _check_names(self)
        _check_options(self)
        _check_combinations(self)
        object.__setattr__(self, "options", dict(self.options))


def _check_numbers(config: OptimizerConfig) -> None:
    for name in ("learning_rate", "weight_decay", "end_fraction"):
        value = getattr(config, name)
        if not _is_finite(value) or value < 0:
            raise ConfigError(f"{name} must be a finite int or float >= 0, and is {value!r}.")
    if config.end_fraction > 1:
        raise ConfigError(
            f"end_fraction must be at most 1, and is {config.end_fraction!r}: it is a fraction of "
            "learning_rate, the highest learning rate of the run."
        )
    for name in ("clip_norm", "clip_value"):
        value = getattr(config, name)
        if value is not None and (not _is_finite(value) or value <= 0):
            raise ConfigError(
                f"{name} must be a finite int or float > 0, and is {value!r}. "
                "For no clipping, use None."
            )
    steps = config.warmup_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ConfigError(f"warmup_steps must be an int >= 0, and is {steps!r}.")


def _check_names(config: OptimizerConfig) -> None:
    known = catalog.optimizers()
    if config.name not in known:
        raise ConfigError(
            f"No optimizer is called {config.name!r}. {nearest(str(config.name).lower(), known)} "
            "Any other is passed as the optax.GradientTransformation itself."
        )
    schedules = get_args(ScheduleName)
    if config.schedule not in schedules:
        raise ConfigError(
            f"No schedule is called {config.schedule!r}. {nearest(str(config.schedule), schedules)}"
        )


def _check_options(config: OptimizerConfig) -> None:
    if not isinstance(config.options, Mapping):
        raise ConfigError(f"options must be a mapping by name, and is {config.options!r}.")
    known = catalog.options_of(config.name)
    for option, value in config.options.items():
        owner = catalog.owner_of(option)
        if owner is not None:
            raise ConfigError(
                f"options may not hold {option!r}, which the field {owner} of OptimizerConfig "
                f"decides. Set {owner} instead."
            )
        if option not in known:
            raise ConfigError(
                f"The optimizer {config.name!r} has no option {option!r}. {nearest(option, known)}"
            )
        if not isinstance(value, Option) or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(
                "An option must be a bool, an int, a finite float, a str or None, and "
                f"options[{option!r}] is {value!r}. For anything else, pass the "
                "optax.GradientTransformation itself."
            )
    missing = [
        option
        for option, parameter in known.items()
        if parameter.default is inspect.Parameter.empty and option not in config.options
    ]
    if missing:
        raise ConfigError(
            f"The optimizer {config.name!r} needs these options, which have no default: {missing}."
        )


def _check_combinations(config: OptimizerConfig) -> None:
    if config.schedule == "exponential" and config.end_fraction == 0:
        raise ConfigError(
            "The schedule 'exponential' never reaches 0, and end_fraction is 0. "
            "Use a small fraction such as 0.01, or another schedule."
        )
    has_fixed_rate = config.schedule == "constant" and config.warmup_steps == 0
    if config.name in catalog.FIXED_RATE and not has_fixed_rate:
        raise ConfigError(
            f"The optimizer {config.name!r} needs a fixed learning rate, and schedule is "
            f"{config.schedule!r} with warmup_steps={config.warmup_steps}. "
            "Use schedule='constant' and warmup_steps=0."
        )
    if config.weight_decay > 0 and not catalog.takes_weight_decay(config.name):
        raise ConfigError(
            f"The optimizer {config.name!r} has no weight decay that can leave biases and norm "
            f"scales alone, and weight_decay is {config.weight_decay!r}. {_decay_remedy(config)}"
        )


def _decay_remedy(config: OptimizerConfig) -> str:
    decoupled = f"{config.name}w"
    if decoupled in catalog.optimizers():
        return (
            "L2 in the gradient of an adaptive optimizer is not weight decay (Loshchilov & Hutter "
            f'2019, arXiv:1711.05101). Use OptimizerConfig("{decoupled}", '
            f"weight_decay={config.weight_decay!r})."
        )
    able = [name for name in sorted(catalog.optimizers()) if catalog.takes_weight_decay(name)]
    return f"Use weight_decay=0, or one of: {', '.join(able)}."


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
