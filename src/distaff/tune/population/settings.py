"""The settings by which the members of a population differ, and which of them are traced."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import PyTree
from distaff.errors import ConfigError, nearest
from distaff.optim import OptimizerConfig, build_optimizer, catalog
from distaff.optim.factory import is_factory
from distaff.optim.precision import for_precision
from distaff.step.averages import averaging_rest, with_epoch
from distaff.step.guard import guarded
from distaff.step.logged_rates import reporting
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import PreparedRun

_PREFIX = "optimizer."
_TRACED = ("learning_rate", "weight_decay")


class Setting(NamedTuple):
    """One member before its training.

    Attributes:
        seed: its seed.
        values: the values by which it differs from the trainer, by path.
        trainer: a trainer with these values.
    """

    seed: int
    values: Mapping[str, Any]
    trainer: TrainerModule


class Varied(NamedTuple):
    """A member whose optimizer has traced values.

    Attributes:
        values: the values by field of the `OptimizerConfig`, float32 `[]`.
        state: its state, whose `tx` has other values.
    """

    values: Mapping[str, jax.Array]
    state: TrainState


def make_settings(trainer: TrainerModule, vary: Any, seeds: Sequence[int]) -> list[Setting]:
    """Returns the settings of all members: each combination of values with each seed.

    Args:
        trainer: the trainer from which they differ.
        vary: lists of values by path, or a list of settings, each with values by path.
        seeds: the seeds.

    Raises:
        ConfigError: a path is unknown, or a value is out of range.
    """
    found = []
    for values in _combinations(vary):
        other = _with_values(trainer, values)
        found += [Setting(seed, values, other) for seed in seeds]
    return found


def _combinations(vary: Any) -> list[Mapping[str, Any]]:
    if isinstance(vary, list | tuple) and vary and all(isinstance(x, Mapping) and x for x in vary):
        return [dict(each) for each in vary]
    if not isinstance(vary, Mapping) or not vary:
        raise ConfigError(
            "vary must be a dict from paths to lists of values, such as "
            "{'optimizer.learning_rate': [1e-3, 1e-2]}, or a list of settings, such as "
            f"[{{'optimizer.learning_rate': 1e-3}}, ...]; got {vary!r}."
        )
    for path, values in vary.items():
        if isinstance(values, str) or not isinstance(values, Iterable) or not list(values):
            raise ConfigError(f"The values of {path!r} must be a list; got {values!r}.")
    rows = itertools.product(*vary.values())
    return [dict(zip(vary, row, strict=True)) for row in rows]


def _with_values(trainer: TrainerModule, values: Mapping[str, Any]) -> TrainerModule:
    """Returns a copy of a trainer with values by path.

    Raises:
        ConfigError: a path is unknown, or a value is out of range.
    """
    own = {path.removeprefix(_PREFIX): x for path, x in values.items() if path.startswith(_PREFIX)}
    rest = {path: x for path, x in values.items() if not path.startswith(_PREFIX)}
    for path in rest:
        if path == "seed" or "." in path:
            remedy = (
                "Pass seeds=." if path == "seed" else "Paths are an option, or optimizer.<field>."
            )
            raise ConfigError(f"vary has no path {path!r}. {remedy}")
    optimizer: Any = trainer.optimizer
    if own and not isinstance(optimizer, OptimizerConfig):
        raise ConfigError(
            f"vary has {_PREFIX}{next(iter(own))!s}, which needs an OptimizerConfig; the trainer "
            f"has {optimizer!r}. Pass OptimizerConfig('adamw', ...) to the trainer, or vary "
            "'optimizer' with a list of optimizers."
        )
    if own:
        known = [field.name for field in dataclasses.fields(OptimizerConfig)]
        for name in own:
            if name not in known:
                raise ConfigError(f"vary has no path {_PREFIX + name!r}. {nearest(name, known)}")
        rest["optimizer"] = dataclasses.replace(optimizer, **own)
    return trainer.variant(**rest)


def grouped(settings: Sequence[Setting]) -> list[list[int]]:
    """Returns the indices of settings that one program trains, group by group.

    They differ in their seeds, and in values that are traced.
    """
    groups: dict[str, list[int]] = {}
    for index, setting in enumerate(settings):
        static = {p: x for p, x in setting.values.items() if p not in traced_paths(setting.trainer)}
        groups.setdefault(repr(static), []).append(index)
    return list(groups.values())


def traced_paths(trainer: TrainerModule) -> list[str]:
    """Returns the paths whose values a program takes as arguments."""
    config = trainer.optimizer
    is_own = type(trainer).init_optimizer is not TrainerModule.init_optimizer
    if is_own or not isinstance(config, OptimizerConfig):
        return []
    if config.name in catalog.LEARNED or is_factory(config.name) or config.plateau is not None:
        return []
    names = [*_TRACED] if catalog.takes_weight_decay(config.name) else [_TRACED[0]]
    fixed = [_TRACED[0]] if config.name in catalog.FIXED_RATE else []
    return [_PREFIX + name for name in names if name not in fixed]


def state_in(member: Any) -> TrainState:
    """Returns the state of a member, which may be a `Varied`."""
    return member.state if isinstance(member, Varied) else member


def with_arrays(member: Any, arrays: Mapping[str, PyTree]) -> Any:
    """Returns a member, which may be a `Varied`, whose state has other arrays."""
    state = state_in(member).replace(**arrays)
    return member._replace(state=state) if isinstance(member, Varied) else state


def _number(setting: Setting, name: str) -> float:
    """Returns a field of the optimizer of a member, which its values need not name."""
    return getattr(setting.trainer.optimizer, name)


class TracedOptimizer:
    """Makes the step of members whose optimizers differ in traced values.

    Args:
        prepared: the prepared run of the first member.
        settings: the settings of the members.
        traced: the fields that are traced; by default, those in which the settings differ.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        settings: Sequence[Setting],
        traced: Sequence[str] | None = None,
    ) -> None:
        self._here, self._options = prepared.workspace, prepared.trainer.config
        self._config: OptimizerConfig = prepared.trainer.optimizer
        self._prepared = prepared
        paths = traced_paths(settings[0].trainer)
        names = [path.removeprefix(_PREFIX) for path in paths]
        differ = [n for n in names if len({_number(each, n) for each in settings}) > 1]
        self.names = differ if traced is None else [n for n in names if n in traced]

    def carried(self, state: TrainState, setting: Setting) -> Varied:
        """Returns a member before its first step."""
        numbers = {n: jnp.float32(_number(setting, n)) for n in self.names}

        def init(values: Mapping[str, jax.Array], params: PyTree) -> PyTree:
            return self._tx(values).init(params)

        return Varied(
            numbers, state.replace(opt_state=self._here.execution.once(init)(numbers, state.params))
        )

    def step(self) -> StepFn:
        """Returns the training step of a `Varied`."""
        inner: Any = guarded(reporting(self._here.plain_step), self._options)

        def varied_step(member: Any, batch: Any) -> Any:
            after, metrics = inner(self._state(member), batch)
            return self._carried(member, after), metrics

        return varied_step

    def rest(self, member: Varied) -> Varied:
        """Applies the gradients that are left at the end of an epoch."""
        return self._carried(member, averaging_rest(self._options)(self._state(member)))

    def averaged(self, member: Varied) -> Varied:
        """Adds the weights at the end of an epoch to their average."""
        return member._replace(state=with_epoch(member.state))

    def own(self, setting: Setting) -> optax.GradientTransformation:
        """Returns the optimizer of one member, with its values."""
        return self._tx({name: _number(setting, name) for name in self.names})

    def _state(self, member: Varied) -> TrainState:
        return member.state.replace(tx=self._tx(member.values))

    def _carried(self, member: Varied, after: TrainState) -> Varied:
        return member._replace(state=after.replace(tx=member.state.tx))

    def _tx(self, values: Mapping[str, Any]) -> optax.GradientTransformation:
        config = dataclasses.replace(self._config, **values)
        total = self._prepared.total_steps
        built = build_optimizer(config, total, steps_per_epoch=self._here.steps_per_epoch)
        return for_precision(built.tx, self._options.precision)
