"""OptimizerConfig: optimizer, schedule, clipping and weight decay as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import optax

from distaff.core.config.checks import whole
from distaff.core.config.other_frameworks import OPTIMIZER, spell
from distaff.errors import ConfigError, nearest
from distaff.optim import catalog
from distaff.optim.defaults import (
    RATE,
    SCHEDULE,
    DefaultRate,
    DefaultSchedule,
    default_rate,
    default_schedule,
)
from distaff.optim.options import check_options, is_finite, no_decay_remedy, plain

ScheduleName: TypeAlias = Literal[
    "constant", "cosine", "linear", "exponential", "inverse_sqrt", "one_cycle"
]

Option: TypeAlias = bool | int | float | str | None
"""What an option may be: the scalars of JSON."""


_NUMBERS = (
    *("learning_rate", "warmup_steps", "end_fraction", "weight_decay", "clip_norm", "clip_value"),
    "accumulate",
)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are trained in a way of their own: exactly one of the three options.

    Args:
        pattern: shell pattern (`fnmatch.fnmatchcase`) for the path of a parameter, such as
            `Dense_0/kernel`. `*` stands for any text, slashes included: `encoder/*`, `*/bias`.
        optimizer: their own optimizer and schedule. It has no clipping: the norm is of all
            gradients, and is limited in the config that holds the groups.
        learning_rate: their highest learning rate; all else is as for the other parameters.
        freeze: whether they keep their values, bit for bit. They then cost no optimizer state.
        freeze_statistics: whether `freeze` also holds for the running statistics
            (`state.batch_stats`) at paths that the pattern matches. In training a layer still
            normalises by the statistics of the batch.

    Raises:
        ConfigError: none or several of the options are given, or one of them is of no use here.
    """

    pattern: str
    _: KW_ONLY
    optimizer: OptimizerConfig | optax.GradientTransformation | None = None
    learning_rate: float | None = None
    freeze: bool = False
    freeze_statistics: bool = True

    def __post_init__(self) -> None:
        """Refuses what cannot be built."""
        _take_plain(self, ("learning_rate",))
        _check_group(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer described by plain values; `build_optimizer` makes it.

    The end of a schedule is a fraction, not a learning rate: it then stays right when
    `learning_rate` alone is changed, on the command line or by a search.

    Args:
        name: sgd, momentum, rmsprop, adam, adamw, lamb, lion, muon, or any other function of
            `optax` or `optax.contrib` that makes an optimizer from a `learning_rate`; or velo, a
            trained network whose weights are in a folder, `options={"weights": "/folder"}`. It has
            no learning rate: the next four fields keep their defaults.
        learning_rate: the highest learning rate of the run. By default that of the Optax function,
            such as 1.0 for prodigy, dowg or schedule_free_sgd, and 1e-3 where it has none.
        schedule: how the learning rate falls after the warm-up; one_cycle rises first. By default
            cosine; constant for schedule_free_sgd, schedule_free_adamw and lbfgs.
        warmup_steps: optimizer updates over which the learning rate rises linearly from 0.
        end_fraction: what the learning rate is divided by `learning_rate` once the run is over,
            from 0 to 1; the last step still has a little more. Not used by constant and
            inverse_sqrt.
        weight_decay: strength of weight decay, which leaves biases and norm scales alone; see
            `decay_mask`. For sgd and momentum it is L2 added to the gradient, for all others what
            their Optax function calls `weight_decay` (adamw, lamb, lion, muon: decoupled, and
            multiplied by the learning rate; adafactor: `weight_decay_rate`, without the learning
            rate). The defaults of Optax, such as 1e-4 for adamw, are never used. For velo see
            `distaff.optim.learned.velo`.
        no_decay: shell patterns for the paths of parameters that are not decayed either, such as
            `*/embedding`.
        also_decay: patterns for those that are decayed, though they look like a bias or a scale.
            What both match is not decayed.
        clip_norm: the largest global norm of the gradient; None for no limit.
        clip_value: the largest absolute value of each gradient entry; None for no limit.
        accumulate: batches per update. The gradients of that many batches are averaged, each with
            the weight of its loss, and update the parameters once: as one batch of all their
            examples does. `warmup_steps`, the schedule and the optimizer count updates; clipping
            acts on the averaged gradient; an epoch ends with an update of the batches that are
            left. The step count of the trainer stays that of batches.
        options: further arguments of the Optax function, such as `{"b1": 0.95}`.
        groups: parameters that are trained in another way. The first group whose pattern matches
            has a parameter; what none matches is trained as the other fields say.

    Raises:
        ConfigError: a value is out of range, a name is unknown, or `weight_decay` is asked of an
            optimizer that has none.

    Example:
        >>> OptimizerConfig("adamw", learning_rate=3e-3, warmup_steps=50).schedule
        'cosine'
    """

    name: str = "adamw"
    _: KW_ONLY
    learning_rate: float = RATE
    schedule: ScheduleName = SCHEDULE  # ty: ignore[invalid-assignment]
    warmup_steps: int = 0
    end_fraction: float = 0.01
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    no_decay: tuple[str, ...] = ()
    also_decay: tuple[str, ...] = ()
    accumulate: int = 1
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    groups: tuple[ParamGroup, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ConfigError(
                f"OptimizerConfig takes the name of an optimizer; got {self.name!r}. Write "
                'OptimizerConfig("adamw", ...); or, for a transformation of Optax, pass it to the '
                "trainer as it is: optimizer=optax.adamw(1e-3)."
            )
        """Fills in what was not given, and refuses what cannot be built."""
        _take_plain(self, _NUMBERS)
        _check_names(self)
        _fill_in(self)
        _check_numbers(self)
        _check_options(self)
        _check_combinations(self)
        _check_groups(self)
        _check_learned(self)
        _check_decay_patterns(self)
        object.__setattr__(self, "groups", tuple(self.groups))


def _check_group(group: ParamGroup) -> None:
    given = f"ParamGroup({group.pattern!r})"
    if not isinstance(group.pattern, str) or not group.pattern:
        raise ConfigError(f"pattern must be a str such as '*/bias', and is {group.pattern!r}.")
    options = {name: getattr(group, name) for name in ("optimizer", "learning_rate", "freeze")}
    named = [name for name, value in options.items() if value is not None and value is not False]
    if len(named) != 1:
        raise ConfigError(
            f"{given} must have exactly one of {', '.join(options)}, and has {named or 'none'}."
        )
    rate, optimizer = group.learning_rate, group.optimizer
    if rate is not None and (not is_finite(rate) or rate < 0):
        raise ConfigError(
            f"The learning_rate of {given} must be a finite int or float >= 0, and is {rate!r}."
        )
    if not isinstance(optimizer, OptimizerConfig | optax.GradientTransformation | None):
        raise ConfigError(
            f"The optimizer of {given} must be an OptimizerConfig or an "
            f"optax.GradientTransformation, and is {optimizer!r}."
        )
    whole_only = {"clip_norm": None, "clip_value": None, "groups": (), "accumulate": 1}
    outer = whole_only if isinstance(optimizer, OptimizerConfig) else {}
    misplaced = {
        n: getattr(optimizer, n) for n, none in outer.items() if getattr(optimizer, n) != none
    }
    if misplaced:
        raise ConfigError(
            "Clipping and groups belong to the OptimizerConfig that holds all groups, as does "
            f"accumulation; the optimizer of {given} has {misplaced!r}. Move them there."
        )


def _take_plain(config: Any, names: Sequence[str]) -> None:
    """Replaces scalars of NumPy and JAX by Python's own."""
    for name in names:
        object.__setattr__(config, name, plain(getattr(config, name)))


def _fill_in(config: OptimizerConfig) -> None:
    """Gives a config that leaves rate or schedule open those that its optimizer has by default."""
    if isinstance(config.learning_rate, DefaultRate):
        object.__setattr__(config, "learning_rate", default_rate(config.name))
    if isinstance(config.schedule, DefaultSchedule):
        object.__setattr__(config, "schedule", default_schedule(config.name))


def _check_decay_patterns(config: OptimizerConfig) -> None:
    for name in ("no_decay", "also_decay"):
        patterns = getattr(config, name)
        is_sequence = isinstance(patterns, tuple | list)
        if not is_sequence or not all(isinstance(each, str) and each for each in patterns):
            raise ConfigError(
                f"{name} must be a tuple of patterns for the paths of parameters, such as "
                f"('*/embedding',), and is {patterns!r}."
            )
        object.__setattr__(config, name, tuple(patterns))


def _check_groups(config: OptimizerConfig) -> None:
    if not isinstance(config.groups, tuple | list):
        raise ConfigError(f"groups must be a tuple of ParamGroup, and is {config.groups!r}.")
    for group in config.groups:
        if not isinstance(group, ParamGroup):
            raise ConfigError(
                f"groups must hold ParamGroup objects only, and holds {group!r}. "
                "Parsed JSON is read by distaff.config.from_json(OptimizerConfig, data)."
            )


def _check_numbers(config: OptimizerConfig) -> None:
    for name in ("learning_rate", "weight_decay", "end_fraction"):
        value = getattr(config, name)
        if not is_finite(value) or value < 0:
            raise ConfigError(f"{name} must be a finite int or float >= 0, and is {value!r}.")
    if config.end_fraction > 1:
        raise ConfigError(
            f"end_fraction must be at most 1, and is {config.end_fraction!r}: it is a fraction of "
            "learning_rate, the highest learning rate of the run."
        )
    for name in ("clip_norm", "clip_value"):
        value = getattr(config, name)
        if value is not None and (not is_finite(value) or value <= 0):
            raise ConfigError(
                f"{name} must be a finite int or float > 0, and is {value!r}. "
                "For no clipping, use None."
            )
    whole("accumulate", config.accumulate)
    steps = config.warmup_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < 2**31:
        raise ConfigError(f"warmup_steps must be an int >= 0 and < 2**31, and is {steps!r}.")


def _check_names(config: OptimizerConfig) -> None:
    known = catalog.optimizers().keys() | catalog.LEARNED.keys()
    if config.name in catalog.REFUSED:
        raise ConfigError(f"The optimizer {catalog.REFUSED[config.name]}")
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
    object.__setattr__(config, "options", {n: plain(v) for n, v in config.options.items()})
    check_options(config.name, config.options)


def _check_combinations(config: OptimizerConfig) -> None:
    if config.schedule == "exponential" and config.end_fraction == 0:
        raise ConfigError(
            "The schedule 'exponential' never reaches 0, and end_fraction is 0. "
            "Use a small fraction such as 0.01, or another schedule."
        )
    if config.accumulate > 1 and config.name in ("lbfgs", "sophia"):
        raise ConfigError(
            f"The optimizer {config.name!r} evaluates the loss of its batch at other parameters, "
            f"and accumulate is {config.accumulate}: the batches before the last one are gone by "
            "then. Use accumulate=1 with larger batches."
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


def _check_learned(config: OptimizerConfig) -> None:
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
                f"The optimizer {config.name!r} has no learning rate that could be another for "
                f"ParamGroup({group.pattern!r}), and learning_rate is {group.learning_rate!r}. "
                "Give the group an optimizer of its own."
            )


def _decay_remedy(config: OptimizerConfig) -> str:
    decoupled = f"{config.name}w"
    if decoupled in catalog.optimizers():
        return (
            "L2 in the gradient of an adaptive optimizer is not weight decay (Loshchilov & Hutter "
            f'2019, arXiv:1711.05101). Use OptimizerConfig("{decoupled}", '
            f"weight_decay={config.weight_decay!r})."
        )
    return no_decay_remedy(config.name)


for _cls in (OptimizerConfig, ParamGroup):
    spell(_cls, OPTIMIZER)
