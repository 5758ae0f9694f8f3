"""OptimizerConfig: optimizer, schedule, clipping and weight decay as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

import optax

from distaff.core.config.argument import Argument
from distaff.core.config.other_frameworks import OPTIMIZER, spell
from distaff.core.views.brief import brief_fields, fields_table
from distaff.errors import ConfigError
from distaff.optim import catalog, checks
from distaff.optim.checks import DecayShape, ScheduleName
from distaff.optim.options import is_finite, is_traced
from distaff.optim.transforms.plateau import Plateau

Option: TypeAlias = bool | int | float | str | None
"""The type of an option: a JSON scalar."""

WHOLE_MODEL_OPTIONS: Mapping[str, Any] = {
    "groups": (),
    "clip_norm": None,
    "clip_value": None,
    "accumulate": 1,
    "plateau": None,
}
"""Options that apply to all parameters together, with their defaults; a group cannot set them."""


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
        checks.to_python_scalars(self, ("learning_rate",))
        _check_group(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer described by plain values; build it with `build_optimizer`.

    The end of a schedule is a fraction of `learning_rate`, so that it stays right when
    `learning_rate` alone changes, on the command line or in a search.

    Args:
        name: sgd, momentum, rmsprop, adam, adamw, lamb, lion, soap, or any other function of
            `optax` or `optax.contrib` that builds an optimizer from a `learning_rate`. With muon,
            hidden matrices are trained by Muon and the rest by AdamW, whose peak rate may differ:
            `options={"adam_learning_rate": 3e-4}`. Or velo, a trained network whose weights are in
            a folder, `options={"weights": "/folder"}`; it has no learning rate: leave the next
            four fields at their defaults. Or `package.module:factory`, a function that returns an
            `optax.GradientTransformation`; see `distaff.optim.factory`.
        learning_rate: peak learning rate. By default that of the Optax function, such as 1.0 for
            prodigy, dowg or schedule_free_sgd, and 1e-3 if it has none.
        schedule: decay of the learning rate after the warm-up; one_cycle rises first. By default
            cosine; constant for schedule_free_sgd, schedule_free_adamw and lbfgs. See
            `make_schedule` for the formulas.
        warmup_steps: optimizer updates over which the learning rate rises linearly from 0.
        end_fraction: learning rate after the last step, as a fraction of `learning_rate` from 0 to
            1. Constant and inverse_sqrt ignore it.
        decay_steps: last updates of the run, over which the schedule wsd lowers the rate: their
            number, an int, or their fraction of the run, a float. Other schedules ignore it.
        decay_shape: how wsd lowers the rate: 1-sqrt, or along a line. Other schedules ignore it.
        weight_decay: strength of weight decay, which excludes biases and norm scales; see
            `decay_mask`. For sgd and momentum it is L2 added to the gradient, for all others the
            `weight_decay` of their Optax function (adamw, lamb, lion, muon, soap: decoupled, and
            multiplied by the learning rate; adafactor: `weight_decay_rate`, without the learning
            rate). Optax's own defaults, such as 1e-4 for adamw, are never used. For velo see
            `distaff.optim.learned.velo`.
        no_decay: shell patterns for the paths of further parameters to exclude from weight decay,
            such as `*/embedding`.
        also_decay: shell patterns for parameters to decay although they look like a bias or a
            scale. `no_decay` wins if both match.
        no_muon: shell patterns for the paths of matrices that muon leaves to AdamW, in addition to
            embeddings and heads, such as `Dense_1/*` for a head with another name.
        also_muon: shell patterns for parameters that muon trains although they look like an
            embedding or a head, or have more than two axes: see `distaff.optim.muon_routes`.
            `no_muon` wins if both match.
        clip_norm: maximum global norm of the gradient; None to disable.
        clip_value: maximum absolute value of each gradient entry; None to disable.
        accumulate: batches per update. The gradients of that many batches are averaged, weighted
            like their losses, so that one update equals that of one batch of all their examples.
            `warmup_steps`, the schedule and the optimizer count updates; clipping applies to the
            averaged gradient; an epoch ends with an update from the remaining batches. The step
            count of the trainer still counts batches.
        plateau: lowers the learning rate when the trainer's `monitor` stops improving, in addition
            to the schedule; see `distaff.optim.Plateau`. None to disable.
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
    decay_steps: int | float = 0.2
    decay_shape: DecayShape = "1-sqrt"
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    no_decay: tuple[str, ...] = ()
    also_decay: tuple[str, ...] = ()
    no_muon: tuple[str, ...] = ()
    also_muon: tuple[str, ...] = ()
    accumulate: int = 1
    plateau: Argument[Plateau | None] = None
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    groups: tuple[ParamGroup, ...] = ()

    def __repr__(self) -> str:
        return brief_fields(self, first="name")

    def _repr_html_(self) -> str:
        return fields_table(self)

    def __post_init__(self) -> None:
        checks.complete(self)
        _check_groups(self)
        checks.check_learned(self)
        checks.check_plateau(self)
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
    is_known = rate is not None and not is_traced(rate)
    if is_known and (not is_finite(rate) or rate < 0):
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
            "Clipping, groups, accumulation and a plateau belong to the OptimizerConfig that holds "
            f"all groups; the optimizer of {label} has {misplaced!r}. Move them there."
        )


def _check_groups(config: OptimizerConfig) -> None:
    if not isinstance(config.groups, tuple | list):
        raise ConfigError(
            f"groups must be a tuple of ParamGroup; got {config.groups!r}. For one group, write "
            "groups=(ParamGroup(...),)."
        )
    for group in config.groups:
        if not isinstance(group, ParamGroup):
            raise ConfigError(
                f"groups must hold ParamGroup objects only; got {group!r}. "
                "For parsed JSON, call distaff.config.from_json(OptimizerConfig, data)."
            )


for _cls in (OptimizerConfig, ParamGroup):
    spell(_cls, OPTIMIZER)
