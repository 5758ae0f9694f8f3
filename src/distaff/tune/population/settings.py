"""The settings by which the members of a population differ, and their groups."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from distaff.errors import ConfigError, nearest
from distaff.models import as_model
from distaff.models.linen import LinenModel
from distaff.optim import OptimizerConfig
from distaff.trainer.module import TrainerModule
from distaff.tune.population.paths import MODEL, OPTIMIZER, OPTIONS, form_of, value_of


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


class MemberGroup(NamedTuple):
    """Members that one program trains.

    Attributes:
        indices: their indices among all members.
        values: the static values by which they differ from other groups, by path.
    """

    indices: list[int]
    values: Mapping[str, Any]


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
    own, fields, rest = {}, {}, {}
    for path, value in values.items():
        if path.startswith(OPTIMIZER):
            own[path.removeprefix(OPTIMIZER)] = value
        elif path.startswith(MODEL):
            fields[path.removeprefix(MODEL)] = value
        elif path == "seed":
            raise ConfigError("vary has no path 'seed'. Pass seeds=.")
        elif "." in path:
            raise ConfigError(
                f"vary has no path {path!r}. A path is an option, optimizer.<field>, "
                "optimizer.options.<name>, or model.<field>."
            )
        else:
            rest[path] = value
    if own:
        rest["optimizer"] = _optimizer(trainer.optimizer, own)
    other = trainer.variant(**rest)
    if fields:
        vars(other)["model"] = as_model(_module(trainer.model, fields))
    return other


def _optimizer(config: Any, values: Mapping[str, Any]) -> OptimizerConfig:
    """Returns the config of an optimizer with values by field, or by `options.<name>`."""
    if not isinstance(config, OptimizerConfig):
        raise ConfigError(
            f"vary has {OPTIMIZER}{next(iter(values))!s}, which needs an OptimizerConfig; the "
            f"trainer has {config!r}. Pass OptimizerConfig('adamw', ...) to the trainer, or vary "
            "'optimizer' with a list of optimizers."
        )
    known = [field.name for field in dataclasses.fields(OptimizerConfig)]
    options = {n.removeprefix(OPTIONS): x for n, x in values.items() if n.startswith(OPTIONS)}
    fields = {name: x for name, x in values.items() if not name.startswith(OPTIONS)}
    for name in fields:
        if name not in known:
            raise ConfigError(f"vary has no path {OPTIMIZER + name!r}. {nearest(name, known)}")
    if options:
        fields["options"] = {**fields.get("options", config.options), **options}
    return dataclasses.replace(config, **fields)


def _module(model: Any, fields: Mapping[str, Any]) -> nn.Module:
    """Returns the module of a model with other values of its fields."""
    name = MODEL + next(iter(fields))
    if not isinstance(model, LinenModel) or model.ready(jax.random.key(0)) is not None:
        raise ConfigError(
            f"vary has the path {name!r}, which needs a Flax Linen module without variables; the "
            f"model is {type(model.module).__name__}. Train one population per model."
        )
    hidden = ("parent", "name")
    known = [each.name for each in dataclasses.fields(type(model.module)) if each.init]
    for field in fields:
        if field not in known or field in hidden:
            others = [each for each in known if each not in hidden]
            raise ConfigError(f"vary has no path {MODEL + field!r}. {nearest(field, others)}")
    return model.module.clone(**fields)


def grouped(settings: Sequence[Setting], static: Collection[str] = ()) -> list[MemberGroup]:
    """Returns the groups of settings that one program trains.

    The members of a group differ in their seeds, and in values that are traced.

    Args:
        settings: all members.
        static: paths whose values cannot be traced.
    """
    paths, groups = varied_paths(settings), {}
    for index, setting in enumerate(settings):
        trainer, fixed, forms = setting.trainer, {}, {}
        for path in paths:
            value = _value(setting, path)
            forms[path] = repr(value) if path in static else form_of(trainer, path, value)
            if forms[path] == repr(value):
                fixed[path] = value
        groups.setdefault(repr(forms), MemberGroup([], fixed)).indices.append(index)
    return list(groups.values())


def varied_paths(settings: Sequence[Setting]) -> list[str]:
    """Returns the paths that any of the settings names."""
    return list(dict.fromkeys(path for each in settings for path in each.values))


def traced_paths(settings: Sequence[Setting], static: Collection[str] = ()) -> list[str]:
    """Returns the paths of the traced values by which the members of a group differ."""
    found = []
    for path in varied_paths(settings):
        values = [_value(each, path) for each in settings]
        is_static = path in static or form_of(settings[0].trainer, path, values[0]) == repr(
            values[0]
        )
        if not is_static and len(set(map(repr, values))) > 1:
            found.append(path)
    return found


def _value(setting: Setting, path: str) -> Any:
    """Returns the value of a member at a path, which its own values need not name."""
    is_field = "." in path or hasattr(setting.trainer.config, path)
    return value_of(setting.trainer, path) if is_field else setting.values.get(path)
