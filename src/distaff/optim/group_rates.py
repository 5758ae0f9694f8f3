"""The learning rate of each group of parameters, by its name in the log."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax

from distaff.core.typing import Params, Schedule
from distaff.optim import catalog
from distaff.optim.config import WHOLE_MODEL_OPTIONS, OptimizerConfig, ParamGroup
from distaff.optim.factory import is_factory, takes_learning_rate
from distaff.optim.rates import RATE
from distaff.optim.schedules import make_schedule
from distaff.optim.transforms.muon import muon_routes
from distaff.optim.transforms.param_groups import group_labels, group_names


class _Part(NamedTuple):
    """The learning rate of a part of the parameters that an optimizer treats alike.

    Attributes:
        rate: the learning rate by update.
        suffix: added to the name of the group in the log.
        holds: returns for each parameter, in order, whether it belongs to the part.
    """

    rate: Schedule
    suffix: str
    holds: Callable[[Params], list[bool]]


def rates_by_group(
    config: OptimizerConfig, total_steps: int | None
) -> Callable[[Params], Mapping[str, Schedule]]:
    """Returns a function from parameters to the rate of each group that has any, by its name.

    The AdamW of Muon has a rate of its own, `.../adam`.
    """
    owns = [None if g.freeze else own_config(g, config) for g in config.groups]
    names = [f"{RATE}/{name}" for name in group_names(config.groups)]
    parts = [_parts(own, total_steps) for own in (*owns, config)]
    labels = group_labels(config.groups)

    def by_name(params: Params) -> dict[str, Schedule]:
        of_params = jax.tree.leaves(labels(params))
        rates = {}
        for index, name in enumerate((*names, RATE)):
            for part in parts[index]:
                held = zip(of_params, part.holds(params), strict=True)
                if any(label == index and holds for label, holds in held):
                    rates[name + part.suffix] = part.rate
        return rates

    return by_name


def _parts(
    own: OptimizerConfig | optax.GradientTransformation | None, total_steps: int | None
) -> list[_Part]:
    """Returns the parts of a group; none for an optimizer whose rate is unknown."""
    rate = schedule_of(own, total_steps) if isinstance(own, OptimizerConfig) else None
    if not isinstance(own, OptimizerConfig) or rate is None:
        return []
    if own.name != "muon":
        return [_Part(rate, "", lambda params: [True] * len(jax.tree.leaves(params)))]
    routes = muon_routes(own.no_muon, own.also_muon)
    adam_rate = adam_schedule_of(own, total_steps) or rate
    return [
        _Part(rate, "", lambda params: [bool(x) for x in jax.tree.leaves(routes(params))]),
        _Part(adam_rate, "/adam", lambda params: [not x for x in jax.tree.leaves(routes(params))]),
    ]


def schedule_of(config: OptimizerConfig, total_steps: int | None) -> Schedule | None:
    """Returns the learning rate of a config by update; None for an optimizer without one."""
    has_none = config.name in catalog.LEARNED or (
        is_factory(config.name) and not takes_learning_rate(config.name)
    )
    return None if has_none else make_schedule(config, total_steps)


def adam_schedule_of(config: OptimizerConfig, total_steps: int | None) -> Schedule | None:
    """Returns the learning rate of Muon's AdamW; None if it is that of Muon."""
    peak = config.options.get("adam_learning_rate")
    if peak is None:
        return None
    return make_schedule(dataclasses.replace(config, learning_rate=peak, options={}), total_steps)


def own_config(
    group: ParamGroup, config: OptimizerConfig
) -> OptimizerConfig | optax.GradientTransformation:
    """Returns the optimizer of a group that is not frozen."""
    if group.optimizer is not None:
        return group.optimizer
    rest = dataclasses.replace(config, **WHOLE_MODEL_OPTIONS)
    if group.learning_rate is None:
        return rest
    return dataclasses.replace(rest, learning_rate=group.learning_rate)
