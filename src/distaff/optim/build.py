"""Builds an Optax transformation and its learning rates from an optimizer that a user passes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from distaff.core.typing import Params, PyTree, Schedule
from distaff.errors import ConfigError
from distaff.optim import catalog, factory
from distaff.optim.checks import PATTERNS
from distaff.optim.config import WHOLE_MODEL_OPTIONS, OptimizerConfig
from distaff.optim.group_rates import adam_schedule_of, own_config, rates_by_group, schedule_of
from distaff.optim.options import may_decay
from distaff.optim.rates import with_rates
from distaff.optim.transforms.accumulate import accumulate
from distaff.optim.transforms.extra_args import with_description, with_known_args
from distaff.optim.transforms.masks import check_patterns, make_decay_mask
from distaff.optim.transforms.muon import muon_routes, routed_muon
from distaff.optim.transforms.param_groups import (
    frozen,
    group_labels,
    is_trained,
    keeps_statistics,
)
from distaff.optim.transforms.plateau import with_plateau

OptimizerLike: TypeAlias = (
    OptimizerConfig
    | optax.GradientTransformation
    | optax.MultiSteps
    | Callable[[int], OptimizerConfig | optax.GradientTransformation | optax.MultiSteps]
)
"""An optimizer: a config, an Optax transformation, or a function of `total_steps`."""


class Optimizer(NamedTuple):
    """An optimizer ready for a train state.

    Attributes:
        tx: the Optax transformation; its `update` accepts any keyword argument.
        schedule: the learning rate by update, outside of groups; None if unknown.
    """

    tx: optax.GradientTransformationExtraArgs
    schedule: Schedule | None


def as_optimizer(given: OptimizerLike | None) -> OptimizerLike:
    """Returns a valid optimizer unchanged; the default one for None.

    Raises:
        ConfigError: it has none of the types that a trainer accepts.
    """
    if given is None:
        return OptimizerConfig()
    check_optimizer(given)
    return given


def check_optimizer(optimizer: Any) -> None:
    """Checks the type of an optimizer without building it.

    Raises:
        ConfigError: it has none of the types that a trainer accepts.
    """
    if isinstance(optimizer, OptimizerConfig | optax.GradientTransformation | optax.MultiSteps):
        return
    for name, function in catalog.optimizers().items():
        if optimizer is function:
            raise ConfigError(
                f"optimizer is Optax's function {name!r} itself, which would use the number of "
                f"steps as its learning rate. Call it, or pass OptimizerConfig({name!r})."
            )
    if isinstance(optimizer, type) or not callable(optimizer):
        hint = f" Did you mean OptimizerConfig({optimizer!r})?" * isinstance(optimizer, str)
        raise ConfigError(
            "optimizer must be an OptimizerConfig, an optax.GradientTransformation, or a function "
            'of total_steps that returns one, such as OptimizerConfig("adamw", learning_rate=1e-3) '
            f"or an Optax transformation like optax.adamw(1e-3); got {optimizer!r}.{hint}"
        )
    try:
        inspect.signature(optimizer).bind(None)
    except TypeError as error:
        raise ConfigError(
            "An optimizer function must accept the total number of steps, f(total_steps); "
            f'{optimizer!r} does not: {error}. Write such a function, OptimizerConfig("adamw", '
            "learning_rate=1e-3), or an Optax transformation such as optax.adamw(1e-3)."
        ) from None
    except ValueError:  # a function in C without a signature
        return


def build_optimizer(
    optimizer: OptimizerLike, total_steps: int | None, *, steps_per_epoch: int | None = None
) -> Optimizer:
    """Builds the optimizer of a run.

    A config becomes the chain `clip_value` → `clip_norm` → optimizer, so that momentum and second
    moments see the clipped gradient, and weight decay is never clipped. With groups, the norm
    covers the gradients of all parameters that are not frozen. If the config accumulates,
    `accumulate` wraps the chain.

    Args:
        optimizer: an `OptimizerConfig`; an `optax.GradientTransformation` or `optax.MultiSteps`; or
            a function `f(total_steps)` that returns one of these.
        total_steps: training steps of the whole run; None if unknown.
        steps_per_epoch: training steps of an epoch; with accumulation each epoch ends with an
            update.

    Returns:
        The transformation and, for a config, its schedule.

    Raises:
        ConfigError: `optimizer` is of another type, needs the number of steps when it is unknown,
            or its warm-up is not shorter than the run. `tx.init` raises it if a group has no
            parameters.
    """
    if isinstance(optimizer, OptimizerConfig):
        return _from_config(optimizer, _num_updates(optimizer, total_steps, steps_per_epoch))
    if isinstance(optimizer, optax.GradientTransformation | optax.MultiSteps):
        return Optimizer(with_known_args(optimizer), schedule=None)
    check_optimizer(optimizer)
    if total_steps is None:
        raise ConfigError(
            "The optimizer is a function of the number of steps, which is not known: the loader "
            "has no length, or the run ends after a time. Pass steps_per_epoch to train_model, or "
            "a number of steps as num_epochs."
        )
    built = optimizer(total_steps)
    if not isinstance(built, OptimizerConfig | optax.GradientTransformation | optax.MultiSteps):
        raise ConfigError(
            "An optimizer function must return an OptimizerConfig or an "
            f"optax.GradientTransformation, and {optimizer!r} returned {built!r}."
        )
    return build_optimizer(built, total_steps, steps_per_epoch=steps_per_epoch)


def _num_updates(
    config: OptimizerConfig, total_steps: int | None, steps_per_epoch: int | None
) -> int | None:
    """Returns the number of updates in a run, over which the schedule extends."""
    if total_steps is None or config.accumulate == 1:
        return total_steps
    per_epoch = min(steps_per_epoch or total_steps, total_steps)
    epochs, rest = divmod(total_steps, per_epoch)
    return epochs * -(-per_epoch // config.accumulate) + -(-rest // config.accumulate)


def _from_config(config: OptimizerConfig, total_steps: int | None) -> Optimizer:
    schedule = schedule_of(config, total_steps)
    tx = optax.with_extra_args_support(optax.chain(*_transforms(config, total_steps)))
    tx = with_description(
        _checking_patterns(tx, config),
        rates=rates_by_group(config, total_steps),
        keeps=keeps_statistics(config.groups),
    )
    if config.plateau is not None:
        tx = with_plateau(with_rates(tx), config.plateau)
    return Optimizer(accumulate(tx, config.accumulate), schedule)


def _transforms(
    config: OptimizerConfig, total_steps: int | None
) -> list[optax.GradientTransformation]:
    transforms: list[optax.GradientTransformation] = []
    if config.clip_value is not None:
        transforms.append(optax.clip(config.clip_value))
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
        transforms.append(optax.masked(clip, is_trained(config.groups)) if config.groups else clip)
    schedule = schedule_of(config, total_steps)
    if config.groups:
        transforms.append(_grouped(config, total_steps))
    elif factory.is_factory(config.name):
        mask = make_decay_mask(config.no_decay, config.also_decay)
        transforms.append(factory.build(config, schedule, mask, total_steps))
    elif schedule is None:
        transforms.append(_learned(config, total_steps))
    elif config.name == "muon":
        transforms.extend(_muon(config, schedule, adam_schedule_of(config, total_steps)))
    else:
        transforms.extend(_with_decay(config, schedule))
    return transforms


def _checking_patterns(
    tx: optax.GradientTransformationExtraArgs, config: OptimizerConfig
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose `init` checks the decay patterns against all parameters."""
    own = [g.optimizer for g in config.groups if isinstance(g.optimizer, OptimizerConfig)]
    patterns = {
        name: [p for each in (config, *own) for p in getattr(each, name)] for name in PATTERNS
    }
    patterns["also_muon"] = [pattern.partition("=")[0] for pattern in patterns["also_muon"]]
    if not any(patterns.values()):
        return tx

    def init(params: Params) -> PyTree:
        check_patterns(patterns, params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _grouped(config: OptimizerConfig, total_steps: int | None) -> optax.GradientTransformation:
    rest = dataclasses.replace(config, **WHOLE_MODEL_OPTIONS)
    transforms = [
        frozen() if group.freeze else _group_transform(own_config(group, config), total_steps)
        for group in config.groups
    ]
    transforms.append(_group_transform(rest, total_steps))
    # With masked extra arguments, a line search gets the gradient of its own parameters only.
    return optax.partition(
        dict(enumerate(transforms)), group_labels(config.groups), mask_compatible_extra_args=True
    )


def _group_transform(
    optimizer: OptimizerConfig | optax.GradientTransformation, total_steps: int | None
) -> optax.GradientTransformation:
    # Without a check of decay patterns, which may match parameters of other groups.
    if isinstance(optimizer, OptimizerConfig):
        return optax.chain(*_transforms(optimizer, total_steps))
    return build_optimizer(optimizer, total_steps).tx


def _with_decay(config: OptimizerConfig, schedule: Schedule) -> list[optax.GradientTransformation]:
    function = catalog.optimizers()[config.name]
    rate = config.learning_rate if config.name in catalog.FIXED_RATE else schedule
    decay = config.weight_decay
    mask = make_decay_mask(config.no_decay, config.also_decay)
    mask_argument = catalog.mask_argument(config.name)
    arguments: dict[str, Any] = dict(config.options)
    if mask_argument is not None and (may_decay(decay) or config.name != "adafactor"):
        arguments.update({catalog.decay_argument(config.name): decay, mask_argument: mask})
    optimizer = _call(function, config, rate, **arguments)
    if not may_decay(decay) or mask_argument is not None:
        return [optimizer]
    return [optax.add_decayed_weights(decay, mask), optimizer]


def _call(
    function: Callable[..., optax.GradientTransformation],
    config: OptimizerConfig,
    *arguments: Any,
    **options: Any,
) -> optax.GradientTransformation:
    """Calls a function of Optax with the options of a config.

    Raises:
        ConfigError: it does not accept them.
    """
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"Optax cannot build the optimizer {config.name!r} with the options "
            f"{config.options!r}: {error}"
        ) from error


def _muon(
    config: OptimizerConfig, rate: Schedule, adam_rate: Schedule | None
) -> list[optax.GradientTransformation]:
    """Returns Muon, followed by the weight decay of each of its two parts.

    The mask of `optax.contrib.muon` does not reach what it passes to AdamW.
    """
    decay, decays = config.weight_decay, make_decay_mask(config.no_decay, config.also_decay)
    routes = muon_routes(config.no_muon, config.also_muon)
    options = {**config.options, "adam_learning_rate": adam_rate}
    tx = _call(routed_muon, config, rate, routes, options)

    def mask(is_muon: bool) -> Callable[[Params], PyTree]:
        return lambda params: jax.tree.map(
            lambda own, layout: own and bool(layout) == is_muon, decays(params), routes(params)
        )

    def decayed(rate: Schedule, mask: Callable[[Params], PyTree]) -> optax.GradientTransformation:
        return optax.add_decayed_weights(lambda step: -rate(step) * decay, mask)

    if not may_decay(decay):
        return [tx]
    if adam_rate is None:
        return [tx, decayed(rate, decays)]
    return [tx, decayed(rate, mask(is_muon=True)), decayed(adam_rate, mask(is_muon=False))]


def _learned(config: OptimizerConfig, total_steps: int | None) -> optax.GradientTransformation:
    if total_steps is None:
        raise ConfigError(
            f"The optimizer {config.name!r} needs the number of steps of the run, which is not "
            "known: the loader has no length, or the run ends after a time. Pass steps_per_epoch "
            "to train_model, or a number of steps as num_epochs."
        )
    build = catalog.LEARNED[config.name]
    mask = make_decay_mask(config.no_decay, config.also_decay)
    return build(
        total_steps=total_steps, weight_decay=config.weight_decay, mask=mask, **config.options
    )
