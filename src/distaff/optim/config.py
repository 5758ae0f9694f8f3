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
from distaff.optim.options import check_options, is_finite, no_decay_remedy, plain

ScheduleName: TypeAlias = Literal[
    "constant", "cosine", "linear", "exponential", "inverse_sqrt", "one_cycle"
]

Option: TypeAlias = bool | int | float | str | None
"""The type of an option: a JSON scalar."""

WHOLE_MODEL_OPTIONS: Mapping[str, Any] = {
    "groups": (),
    "clip_norm": None,
    "clip_value": None,
    "accumulate": 1,
}
"""Options that apply to all parameters together, with their defaults; a group cannot set them."""

_NUMBERS = (
    *("learning_rate", "warmup_steps", "end_fraction", "weight_decay", "clip_norm", "clip_value"),
    "accumulate",
)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters trained differently from the others. Set exactly one of the three options.

    Args:
        pattern: shell pattern (`fnmatch.fnmatchcase`) for the path of a parameter, such as
            `Dense_0/kernel`. `*` matches any text, slashes included: `encoder/*`, `*/bias`.
        optimizer: optimizer and schedule of the group. It cannot clip or accumulate: set these in
            the config that holds the groups, where the norm covers all gradients.
        learning_rate: peak learning rate of the group; everything else as for the other parameters.
        freeze: whether the parameters keep their values, bit for bit. They then have no optimizer
            state.
        freeze_statistics: whether `freeze` also applies to running statistics (`state.batch_stats`)
            at matching paths. In training, a layer still normalises by the statistics of the batch.

    Raises:
        ConfigError: not exactly one of the options is set, or one has an invalid value.
    """

    pattern: str
    _: KW_ONLY
    optimizer: OptimizerConfig | optax.GradientTransformation | None = None
    learning_rate: float | None = None
    freeze: bool = False
    freeze_statistics: bool = True

    def __post_init__(self) -> None:
        _to_python_scalars(self, ("learning_rate",))
        _check_group(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer described by plain values; build it with `build_optimizer`.

    The end of a schedule is a fraction of `learning_rate`, so that it stays right when
    `learning_rate` alone changes, on the command line or in a search.

    Args:
        name: sgd, momentum, rmsprop, adam, adamw, lamb, lion, muon, or any other function of
            `optax` or `optax.contrib` that builds an optimizer from a `learning_rate`; or velo, a
            trained network whose weights are in a folder, `options={"weights": "/folder"}`. Velo
            has no learning rate: leave the next four fields at their defaults.
        learning_rate: peak learning rate. By default that of the Optax function, such as 1.0 for
            prodigy, dowg or schedule_free_sgd, and 1e-3 if it has none.
        schedule: decay of the learning rate after the warm-up; one_cycle rises first. By default
            cosine; constant for schedule_free_sgd, schedule_free_adamw and lbfgs.
        warmup_steps: optimizer updates over which the learning rate rises linearly from 0.
        end_fraction: learning rate after the last step, as a fraction of `learning_rate` from 0 to
            1. Constant and inverse_sqrt ignore it.
        weight_decay: strength of weight decay, which excludes biases and norm scales; see
            `decay_mask`. For sgd and momentum it is L2 added to the gradient, for all others the
            `weight_decay` of their Optax function (adamw, lamb, lion, muon: decoupled, and
            multiplied by the learning rate; adafactor: `weight_decay_rate`, without the learning
            rate). Optax's own defaults, such as 1e-4 for adamw, are never used. For velo see
            `distaff.optim.learned.velo`.
        no_decay: shell patterns for the paths of further parameters to exclude from weight decay,
            such as `*/embedding`.
        also_decay: shell patterns for parameters to decay although they look like a bias or a
            scale. `no_decay` wins if both match.
        clip_norm: maximum global norm of the gradient; None to disable.
        clip_value: maximum absolute value of each gradient entry; None to disable.
        accumulate: batches per update. The gradients of that many batches are averaged, weighted
            like their losses, so that one update equals that of one batch of all their examples.
            `warmup_steps`, the schedule and the optimizer count updates; clipping applies to the
            averaged gradient; an epoch ends with an update from the remaining batches. The step
            count of the trainer still counts batches.
        options: further arguments of the Optax function, such as `{"b1": 0.95}`.
        groups: parameters trained differently. The first group whose pattern matches applies;
            the other fields apply to parameters that match none.

    Raises:
        ConfigError: a value is out of range, a name is unknown, or `weight_decay` is set for an
            optimizer that does not support it.

    Example:
        >>> OptimizerConfig("adamw", learning_rate=3e-3, warmup_steps=50).schedule
        'cosine'
    """

    name: str = "adamw"
    _: KW_ONLY
    learning_rate: float = catalog.RATE
    schedule: ScheduleName = catalog.SCHEDULE  # ty: ignore[invalid-assignment]
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
                'OptimizerConfig("adamw", ...), or pass an Optax transformation to the trainer '
                "directly: optimizer=optax.adamw(1e-3)."
            )
        _to_python_scalars(self, _NUMBERS)
        _check_names(self)
        _fill_in_defaults(self)
        _check_numbers(self)
        _check_options(self)
        _check_combinations(self)
        _check_groups(self)
        _check_learned(self)
        _check_decay_patterns(self)
        object.__setattr__(self, "groups", tuple(self.groups))


def _check_group(group: ParamGroup) -> None:
    label = f"ParamGroup({group.pattern!r})"
    if not isinstance(group.pattern, str) or not group.pattern:
        raise ConfigError(f"pattern must be a str such as '*/bias'; got {group.pattern!r}.")
    options = {name: getattr(group, name) for name in ("optimizer", "learning_rate", "freeze")}
    named = [name for name, value in options.items() if value is not None and value is not False]
    if len(named) != 1:
        raise ConfigError(
            f"{label} must have exactly one of {', '.join(options)}, and has {named or 'none'}."
        )
    rate, optimizer = group.learning_rate, group.optimizer
    if rate is not None and (not is_finite(rate) or rate < 0):
        raise ConfigError(
            f"The learning_rate of {label} must be a finite int or float >= 0; got {rate!r}."
        )
    if not isinstance(optimizer, OptimizerConfig | optax.GradientTransformation | None):
        raise ConfigError(
            f"The optimizer of {label} must be an OptimizerConfig or an "
            f"optax.GradientTransformation; got {optimizer!r}."
        )
    if not isinstance(optimizer, OptimizerConfig):
        return
    misplaced = {
        name: getattr(optimizer, name)
        for name, default in WHOLE_MODEL_OPTIONS.items()
        if getattr(optimizer, name) != default
    }
    if misplaced:
        raise ConfigError(
            "Clipping, groups and accumulation belong to the OptimizerConfig that holds all "
            f"groups; the optimizer of {label} has {misplaced!r}. Move them there."
        )


def _to_python_scalars(config: Any, names: Sequence[str]) -> None:
    for name in names:
        object.__setattr__(config, name, plain(getattr(config, name)))


def _fill_in_defaults(config: OptimizerConfig) -> None:
    """Sets a learning rate or schedule that was not given to the default of the optimizer."""
    if isinstance(config.learning_rate, catalog.DefaultRate):
        object.__setattr__(config, "learning_rate", catalog.default_rate(config.name))
    if isinstance(config.schedule, catalog.DefaultSchedule):
        object.__setattr__(config, "schedule", catalog.default_schedule(config.name))


def _check_decay_patterns(config: OptimizerConfig) -> None:
    for name in ("no_decay", "also_decay"):
        patterns = getattr(config, name)
        is_sequence = isinstance(patterns, tuple | list)
        if not is_sequence or not all(isinstance(each, str) and each for each in patterns):
            raise ConfigError(
                f"{name} must be a tuple of patterns for the paths of parameters, such as "
                f"('*/embedding',); got {patterns!r}."
            )
        object.__setattr__(config, name, tuple(patterns))


def _check_groups(config: OptimizerConfig) -> None:
    if not isinstance(config.groups, tuple | list):
        raise ConfigError(f"groups must be a tuple of ParamGroup; got {config.groups!r}.")
    for group in config.groups:
        if not isinstance(group, ParamGroup):
            raise ConfigError(
                f"groups must hold ParamGroup objects only; got {group!r}. "
                "For parsed JSON, call distaff.config.from_json(OptimizerConfig, data)."
            )


def _check_numbers(config: OptimizerConfig) -> None:
    for name in ("learning_rate", "weight_decay", "end_fraction"):
        value = getattr(config, name)
        if not is_finite(value) or value < 0:
            raise ConfigError(f"{name} must be a finite int or float >= 0; got {value!r}.")
    if config.end_fraction > 1:
        raise ConfigError(
            f"end_fraction must be at most 1; got {config.end_fraction!r}: it is a fraction of "
            "learning_rate, the highest learning rate of the run."
        )
    for name in ("clip_norm", "clip_value"):
        value = getattr(config, name)
        if value is not None and (not is_finite(value) or value <= 0):
            raise ConfigError(
                f"{name} must be a finite int or float > 0; got {value!r}. "
                "Use None to disable clipping."
            )
    whole("accumulate", config.accumulate)
    steps = config.warmup_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < 2**31:
        raise ConfigError(f"warmup_steps must be an int >= 0 and < 2**31; got {steps!r}.")


def _check_names(config: OptimizerConfig) -> None:
    known = catalog.optimizers().keys() | catalog.LEARNED.keys()
    if config.name in catalog.REFUSED:
        raise ConfigError(f"The optimizer {catalog.REFUSED[config.name]}")
    if config.name not in known:
        raise ConfigError(
            f"No optimizer is called {config.name!r}. {nearest(str(config.name).lower(), known)} "
            "Any other can be passed as the optax.GradientTransformation itself."
        )
    schedules = get_args(ScheduleName)
    if config.schedule not in schedules:
        raise ConfigError(
            f"No schedule is called {config.schedule!r}. {nearest(str(config.schedule), schedules)}"
        )


def _check_options(config: OptimizerConfig) -> None:
    if not isinstance(config.options, Mapping):
        raise ConfigError(f"options must be a mapping by name; got {config.options!r}.")
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
    if config.weight_decay > 0 and not catalog.takes_weight_decay(config.name):
        raise ConfigError(
            f"The optimizer {config.name!r} has no weight decay that can exclude biases and norm "
            f"scales, and weight_decay is {config.weight_decay!r}. {_decay_remedy(config)}"
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
                f"The optimizer {config.name!r} has no learning rate, but "
                f"ParamGroup({group.pattern!r}) sets learning_rate={group.learning_rate!r}. "
                "Set the optimizer of the group instead."
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
