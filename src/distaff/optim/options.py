"""Checks of an optimizer's options against the defaults of its Optax function."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.checks import is_traced
from distaff.errors import ConfigError, nearest
from distaff.optim import catalog
from distaff.optim.factory import is_factory
from distaff.optim.learned import WHERE_TO_GET

_DECAYS = {"b1", "b2", "b3", "beta", "adam_b1", "adam_b2", "rho", "decay"}
"""Decay rates of running averages, which must be less than 1."""

_OBJECTS = {"base_optimizer", "weight_dimension_numbers", "muon_weight_dimension_numbers"}
_SEEDS = {"key", "seed"}


def plain(value: Any) -> Any:
    """Converts a scalar of NumPy or JAX to a Python scalar; returns any other value unchanged."""
    if is_traced(value):
        return value
    if isinstance(value, np.generic) or (
        isinstance(value, np.ndarray | jax.Array) and value.ndim == 0
    ):
        return value.item()
    return value


def may_decay(weight_decay: Any) -> bool:
    """Returns whether weights decay, or may decay: the strength is traced."""
    return is_traced(weight_decay) or weight_decay > 0


def is_finite(value: object) -> bool:
    """Returns whether a value is a finite Python int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks the options of a known optimizer by the name of Optax's argument.

    Raises:
        ConfigError: one is unknown, missing, of another type than Optax's default, or out of range.
    """
    numbers = {option: x for option, x in options.items() if not is_traced(x)}
    for option, value in numbers.items():
        if not isinstance(value, bool | int | float | str | None) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise ConfigError(
                "An option must be a bool, an int, a finite float, a str or None, and "
                f"options[{option!r}] is {value!r}. For anything else, pass the "
                "optax.GradientTransformation itself."
            )
    if is_factory(name):  # its own arguments are known once it is imported
        return
    known = catalog.options_of(name)
    for option, value in numbers.items():
        _check_owner(name, option)
        if option not in known:
            raise ConfigError(
                f"The optimizer {name!r} has no option {option!r}. {nearest(option, known)}"
            )
        rule = "" if name in catalog.LEARNED else _broken_rule(option, value, known[option])
        if rule:
            raise ConfigError(
                f"options[{option!r}] of the optimizer {name!r} must be {rule}; got {value!r}."
            )
    missing = [n for n, each in known.items() if each.default is each.empty and n not in options]
    if missing:
        remedy = f" {WHERE_TO_GET}" if name in catalog.LEARNED else ""
        raise ConfigError(
            f"The optimizer {name!r} needs these options, which have no default: {missing}.{remedy}"
        )


def _check_owner(name: str, option: str) -> None:
    owner = catalog.owner_of(option)
    if owner is None:
        return
    if owner == "weight_decay" and not catalog.takes_weight_decay(name):
        raise ConfigError(f"options may not hold {option!r}. {no_decay_remedy(name)}")
    patterns = " Set no_decay and also_decay to choose parameters." * ("mask" in option)
    raise ConfigError(
        f"options may not hold {option!r}, which is set by the field {owner} of OptimizerConfig. "
        f"Set {owner} instead.{patterns}"
    )


def no_decay_remedy(name: str) -> str:
    """Returns the remedy, as sentences, for an optimizer whose decay cannot be masked."""
    parameters = inspect.signature(catalog.optimizers()[name]).parameters
    able = [each for each in sorted(catalog.optimizers()) if catalog.takes_weight_decay(each)]
    others = f"The others are: {', '.join(able)}."
    if "weight_decay" not in parameters:
        return f"Use weight_decay=0, or one of these: {', '.join(able)}."
    return (
        f"Optax's {name!r} decays all parameters or none, biases and norm scales too. To decay "
        "them all, pass the transformation itself, with its weight_decay; to exclude some, use "
        f"another optimizer. {others}"
    )


def _broken_rule(option: str, value: Any, parameter: inspect.Parameter) -> str:
    """Returns what an option must be, in words; empty for a valid value."""
    default, kinds = parameter.default, typing.get_args(parameter.annotation)
    if value is None and (default is None or type(None) in kinds):
        return ""
    if isinstance(value, str) and str in kinds and "dtype" not in option:
        return ""
    if option in _OBJECTS:
        return "left out, or the optax.GradientTransformation passed itself"
    if "dtype" in option:
        return "" if _is_dtype(value) else "the name of a dtype, such as 'bfloat16'"
    if option in _SEEDS:
        return "" if isinstance(value, Integral) and not isinstance(value, bool) else "an int"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a str"
    if isinstance(default, int):
        least, is_int = min(default, 1), isinstance(value, Integral) and not isinstance(value, bool)
        return "" if is_int and value >= least else f"an int, at least {least}"
    if isinstance(default, float | None) or default is inspect.Parameter.empty:
        return _broken_rule_of_number(option, value, default)
    return f"a {type(default).__name__}: pass the optax.GradientTransformation itself"


def _broken_rule_of_number(option: str, value: Any, default: Any) -> str:
    if not isinstance(value, Real) or isinstance(value, bool):
        return "a number"
    if option in _DECAYS and isinstance(default, float) and default < 1:
        return "" if 0 <= value < 1 else "a number from 0 to less than 1"
    if option.startswith("eps"):
        return "" if value >= 0 else "a number, at least 0"
    return ""


def _is_dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        return False
