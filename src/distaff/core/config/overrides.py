"""Overrides: whether a method of a subclass can be called as the trainer calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from distaff.errors import ConfigError


def check_override(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Checks that an override can be called as what it overrides is.

    Args:
        owner: the object that has it.
        name: of the method.
        method: the one that is overridden, whose required arguments are passed by position, and
            keyword-only ones by keyword.

    Raises:
        ConfigError: it is no function, or does not take these arguments.
    """
    override = getattr(owner, name)
    whose, expected = f"{type(owner).__name__}.{name}", inspect.signature(method)
    parameters = list(expected.parameters.values())[1:]
    form = f"def {name}({', '.join(('self', *_shown(parameters)))})"
    if not callable(override):
        raise ConfigError(f"{whose} is called by the trainer, and is {override!r}. Write {form}.")
    yields = inspect.isgeneratorfunction(override) or inspect.iscoroutinefunction(override)
    if yields and not inspect.isgeneratorfunction(method) and name != "tracker":
        raise ConfigError(f"{whose} is called and not iterated or awaited. Write {form}, no yield.")
    try:
        signature = inspect.signature(override)
    except (TypeError, ValueError):
        return  # a function in C, which does not say
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    try:
        signature.bind(*([None] * len(positional)), **keywords)
    except TypeError as error:
        raise ConfigError(
            f"{whose} cannot be called as the trainer calls it: {error}. It is defined with "
            f"{signature}; write {form}."
        ) from None


def check_overrides(owner: Any, base: type, names: Iterable[str]) -> None:
    """Checks all overrides of an object.

    Args:
        owner: the object.
        base: the class whose methods may be overridden.
        names: of these methods.

    Raises:
        ConfigError: one is no function, or does not take the arguments that it gets.
    """
    for name in names:
        method = getattr(base, name)
        if inspect.getattr_static(owner, name) is not inspect.getattr_static(base, name):
            check_override(owner, name, method)


def _shown(parameters: list[inspect.Parameter]) -> list[str]:
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [*names, *(("*", *keywords) if keywords else ())]
