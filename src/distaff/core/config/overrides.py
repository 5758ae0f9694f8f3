"""Checks that the trainer can call an overridden method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

from distaff.errors import ConfigError


def check_override(
    owner: Any, name: str, method: Callable[..., Any], *, without: Collection[str] = ()
) -> None:
    """Checks that an override can be called like the method it overrides.

    The required arguments of `method` are passed by position, keyword-only ones by keyword.

    Args:
        owner: the object with the override.
        name: name of the method.
        method: the method that it overrides.
        without: keyword-only arguments that need not be accepted.

    Raises:
        ConfigError: the override is not a function, or does not accept these arguments.
    """
    override = getattr(owner, name)
    whose, expected = f"{type(owner).__name__}.{name}", inspect.signature(method)
    parameters = [p for p in list(expected.parameters.values())[1:] if p.name not in without]
    form = f"def {name}({', '.join(('self', *_shown(parameters)))})"
    if not callable(override):
        raise ConfigError(f"The trainer calls {whose}; it is {override!r}. Write {form}.")
    yields = inspect.isgeneratorfunction(override) or inspect.iscoroutinefunction(override)
    if yields and not inspect.isgeneratorfunction(method) and name != "tracker":
        raise ConfigError(
            f"The trainer calls {whose}, and does not iterate over or await it. Write {form}, "
            "without yield."
        )
    try:
        signature = inspect.signature(override)
    except (TypeError, ValueError):
        return  # a function in C without a signature
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    try:
        signature.bind(*([None] * len(positional)), **keywords)
    except TypeError as error:
        raise ConfigError(
            f"{whose} does not accept the arguments that the trainer passes: {error}. Its "
            f"signature is {signature}; write {form}."
        ) from None


def check_overrides(
    owner: Any, base: type, names: Iterable[str], *, without: Collection[str] = ()
) -> None:
    """Checks the overrides of the methods `names` of `base`; see `check_override`."""
    for name in names:
        method = getattr(base, name)
        if inspect.getattr_static(owner, name) is not inspect.getattr_static(base, name):
            check_override(owner, name, method, without=without)


def _shown(parameters: list[inspect.Parameter]) -> list[str]:
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [*names, *(("*", *keywords) if keywords else ())]
