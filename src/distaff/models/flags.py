"""How a forward function is told whether it trains: under the name that it has for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_TRAIN_FLAGS = ("train", "training", "is_training")
_EVAL_FLAGS = ("deterministic", "use_running_average")


def parameters(function: Callable[..., Any]) -> list[str]:
    """Returns the names of a function's parameters; none for one that Python cannot look into."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def mode_flag(function: Callable[..., Any], train: bool) -> dict[str, bool]:
    """Returns the keyword argument that tells a function whether it trains; none if it has none.

    Args:
        function: its parameter `train`, `training` or `is_training` is given `train`, or else its
            parameter `deterministic` or `use_running_average` the opposite.
        train: whether it trains.
    """
    accepted = parameters(function)
    for name in _TRAIN_FLAGS:
        if name in accepted:
            return {name: train}
    for name in _EVAL_FLAGS:
        if name in accepted:
            return {name: not train}
    return {}


def method_of(module: Any, method: Callable[..., Any] | str | None) -> Callable[..., Any]:
    """Returns what to call of a module: the module itself, or one of its methods.

    Args:
        module: it has `__call__`, unless a method is named.
        method: as in `ctx.apply(params, x, method="encode")`: a name, or a function whose first
            argument is the module.
    """
    if method is None:
        return module
    if isinstance(method, str):
        return getattr(module, method)
    return functools.partial(method, module)
