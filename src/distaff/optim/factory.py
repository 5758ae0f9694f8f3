"""Optimizers of other packages: `OptimizerConfig("package.module:factory")`.

A config is only a description, and may come from a file: the module is imported when the optimizer
is built, and not before.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import optax

from distaff.core.typing import Params, PyTree, Schedule
from distaff.errors import ConfigError, nearest
from distaff.optim import catalog
from distaff.optim.transforms.extra_args import with_known_args

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_RATE_FIELDS = ("learning_rate", "schedule", "warmup_steps", "end_fraction")


def is_factory(name: str) -> bool:
    """Returns whether the name of an optimizer is that of a factory, `package.module:factory`."""
    return ":" in name


def check_name(name: str) -> None:
    """Checks the form of a factory's name; imports nothing.

    Raises:
        ConfigError: it is not `package.module:factory`.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "The name of a factory must be 'package.module:factory', with dots between packages "
            f"and a colon before the function, such as 'optax.contrib:prodigy'; got {name!r}."
        )


def is_loaded(config: Any) -> bool:
    """Returns whether the modules of all factories in an `OptimizerConfig` are imported already.

    A module of Python's standard library does not count: a name in a file must not lead to
    `subprocess.run`.
    """
    inner = [getattr(group.optimizer, "name", "") for group in config.groups]
    modules = [name.partition(":")[0] for name in (config.name, *inner) if is_factory(name)]
    return all(
        module in sys.modules and module.partition(".")[0] not in sys.stdlib_module_names
        for module in modules
    )


def takes_learning_rate(name: str) -> bool:
    """Returns whether a factory, which is imported, has an argument `learning_rate`."""
    return "learning_rate" in _parameters(_imported(name))


def build(
    config: Any,
    schedule: Schedule | None,
    mask: Callable[[Params], PyTree],
    total_steps: int | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer that a factory builds.

    Args:
        config: the `OptimizerConfig`.
        schedule: passed as `learning_rate`; None if the factory has no such argument.
        mask: passed as `mask`, or `weight_decay_mask`, with the `weight_decay` of the config, if
            the factory has both arguments.
        total_steps: passed under this name if the factory has such an argument; None if unknown.

    Raises:
        ConfigError: the factory cannot be imported, does not accept a field or an option, or does
            not return an optimizer.
    """
    function = _imported(config.name)
    parameters = _parameters(function)
    arguments: dict[str, Any] = {}
    if schedule is None:
        _check_without_rate(config)
    else:
        is_fixed = config.schedule == "constant" and config.warmup_steps == 0
        arguments["learning_rate"] = config.learning_rate if is_fixed else schedule
    mask_name = next((each for each in ("mask", "weight_decay_mask") if each in parameters), None)
    if "weight_decay" in parameters and mask_name is not None:
        arguments.update({"weight_decay": config.weight_decay, mask_name: mask})
    elif config.weight_decay > 0:
        raise ConfigError(
            f"{config.name!r} has no weight decay that can exclude biases and norm scales, which "
            f"takes the arguments weight_decay and mask; weight_decay is {config.weight_decay!r}. "
            "Use weight_decay=0. If it has an argument of its own, set that in options."
        )
    if "total_steps" in parameters:
        arguments["total_steps"] = _known(total_steps, config.name)
    _check_options(config, parameters, arguments)
    try:
        made = function(**arguments, **config.options)
    except (TypeError, ValueError) as error:
        remedy = " If it takes a number as its learning rate only, use schedule='constant'."
        raise ConfigError(
            f"{config.name!r} cannot build an optimizer with the options {config.options!r}: "
            f"{str(error).rstrip('.')}.{remedy * callable(arguments.get('learning_rate'))}"
        ) from error
    if not isinstance(made, optax.GradientTransformation | optax.MultiSteps):
        raise ConfigError(
            f"{config.name!r} must return an optax.GradientTransformation, and returned {made!r}."
        )
    return with_known_args(made)


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"The optimizer {name!r} is in a module that Python does not find: {missing!r}. "
                "Install its package, or put its folder on PYTHONPATH, or correct the name."
            ) from error
        raise ConfigError(
            f"The module of the optimizer {name!r} fails to import: {error}."
        ) from error
    for part in path.split("."):
        known = [each for each in dir(found) if not each.startswith("_")]
        if not hasattr(found, part):
            raise ConfigError(
                f"The optimizer {name!r} does not exist: {module_name} has no {path!r}. "
                f"{nearest(part, known)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"The optimizer {name!r} must be a function that returns an "
            f"optax.GradientTransformation; it is {found!r}. Pass a transformation itself as "
            "optimizer=..., or write a function that returns it."
        )
    return found


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function in C without a signature
        return {}


def _check_without_rate(config: Any) -> None:
    fields = type(config).__dataclass_fields__
    defaults = {name: fields[name].default for name in _RATE_FIELDS}
    given = {n: getattr(config, n) for n in _RATE_FIELDS if getattr(config, n) != defaults[n]}
    if given:
        raise ConfigError(
            f"{config.name!r} has no argument learning_rate, and the config sets {given!r}. Leave "
            "these at their defaults, or give the function such an argument."
        )


def _known(total_steps: int | None, name: str) -> int:
    if total_steps is None:
        raise ConfigError(
            f"{name!r} takes total_steps, the number of steps of the run, which is not known: the "
            "loader has no length, or the run ends after a time. Pass steps_per_epoch to "
            "train_model, or a number of steps as num_epochs."
        )
    return total_steps


def _check_options(
    config: Any, parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]
) -> None:
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {name: each for name, each in parameters.items() if each.kind in kinds}
    for option in config.options:
        if option in arguments or option == "learning_rate":
            owner = catalog.owner_of(option)
            source = f"the field {owner} of OptimizerConfig" if owner else "the run"
            raise ConfigError(
                f"options may not hold {option!r}, which {config.name!r} gets from {source}."
            )
        if option not in known and not takes_any and parameters:
            raise ConfigError(f"{config.name!r} has no option {option!r}. {nearest(option, known)}")
    given = {*arguments, *config.options}
    missing = [n for n, each in known.items() if each.default is each.empty and n not in given]
    if missing:
        raise ConfigError(
            f"{config.name!r} needs these options, which have no default: {missing}. Set them in "
            "options={...}."
        )
