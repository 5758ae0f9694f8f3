"""Declares options: the default, description, check and resume behaviour of each in one place."""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import textwrap
from collections.abc import Callable, Collection
from numbers import Integral
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from distaff.core.config.checks import as_float, whole
from distaff.core.config.durations import seconds_of
from distaff.core.paths import as_path
from distaff.core.views.brief import brief_fields, fields_table
from distaff.errors import ConfigError, nearest

_MARK = "_has_descriptions"
"""Attribute of a class whose docstring lists its options."""

T = TypeVar("T", bound="Options")

Check: TypeAlias = Callable[[str, Any], Any]
"""`(name, value) -> value`; raises ConfigError."""

Resume: TypeAlias = Literal["same run", "another run", "ignored"]
"""Whether a run with a changed value is the same run, another run, or the same without a note."""

Tracing: TypeAlias = Literal["never", "always", "unless zero"]
"""Whether a value may be an argument of a program, which then serves all values.

"unless zero" is for a value that turns something off at 0, with another program.
"""


def option(
    default: Any,
    doc: str,
    *,
    check: Check | None = None,
    resume: Resume = "another run",
    traced: Tracing = "never",
) -> Any:
    """Declares an option, a field of a dataclass of `Options`.

    Args:
        default: default value.
        doc: one paragraph for `help`, editors and the command line.
        check: function that returns the value to store, or raises ConfigError.
        resume: whether a run with a changed value is the same run.
        traced: whether the members of a population share a program for all values.
    """
    doc = " ".join(doc.split())
    metadata = {"doc": doc, "check": check, "resume": resume, "traced": traced}
    return dataclasses.field(default=default, metadata=metadata)


def traced(default: Any) -> Any:
    """Marks a number, a field of a config or a Flax Linen module, as an argument of the step.

    `tune.train_population(vary={"alpha": [0.1, 0.5]})` then compiles one program for all values:
    in a loss, `self.config.alpha` is a traced float32. In a run of its own it is a plain number.
    A value that decides in Python, as in `if self.config.alpha > 0`, cannot be traced; the members
    are then grouped by it, as by any field without this mark.

    >>> class Config(TrainerConfig):
    ...     alpha: float = tune.traced(0.5)

    Args:
        default: the default: a number, a tuple of numbers, or None.
    """
    return dataclasses.field(default=default, metadata={"traced": "always"})


def tracing_of(cls: Any) -> dict[str, Tracing]:
    """Returns the fields of a dataclass that may be traced, by name."""
    found = {field.name: field.metadata.get("traced", "never") for field in dataclasses.fields(cls)}
    return {name: rule for name, rule in found.items() if rule != "never"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of options; its constructor raises ConfigError for a value out of range."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Keeps `__repr__`, which each dataclass would replace."""
        super().__init_subclass__(**arguments)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Options.__repr__

    def __repr__(self) -> str:
        return brief_fields(self)

    def _repr_html_(self) -> str:
        return fields_table(self)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = field.metadata.get("check")
            if check is not None:
                value = check(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    @classmethod
    def names(cls, resume: Resume) -> frozenset[str]:
        """Returns the names of the options with this resume behaviour."""
        fields = dataclasses.fields(cls)
        return frozenset(f.name for f in fields if f.metadata.get("resume") == resume)


def described(cls: type[T]) -> type[T]:
    """Adds an `Args` section, generated from the descriptions, to the docstring of a class.

    Options of a base class that has such a section are left out.
    """
    sections = inspect.cleandoc(cls.__doc__ or "").partition("\n\nRaises:")
    bases: list[Any] = [base for base in cls.__mro__[1:] if _MARK in vars(base)]
    listed = descriptions(cls, {field.name for base in bases for field in dataclasses.fields(base)})
    cls.__doc__ = f"{sections[0]}\n\nArgs:\n{listed}" + "".join(sections[1:])
    setattr(cls, _MARK, True)
    return cls


def descriptions(cls: type[Options], omitted: Collection[str] = ()) -> str:
    """Returns the descriptions of options as the entries of an `Args` section."""
    fields = [
        field
        for field in dataclasses.fields(cls)
        if "doc" in field.metadata and field.name not in omitted
    ]
    return "\n".join(_entry(field.name, field.metadata["doc"]) for field in fields)


def with_options(function: Callable[..., Any], cls: type[Options]) -> inspect.Signature:
    """Returns the signature of a constructor, with the options of a class for its `**options`."""
    known = list(inspect.signature(function).parameters.values())[1:]
    if not any(each.kind is each.VAR_KEYWORD for each in known):
        return inspect.Signature(known)
    named = [each for each in known if each.kind is not each.VAR_KEYWORD]
    taken = {each.name for each in named}
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in dataclasses.fields(cls)
        if field.name not in taken
    ]
    return inspect.Signature([*named, *added])


def _entry(name: str, doc: str) -> str:
    return textwrap.fill(
        f"{name}: {doc}",
        width=96,
        initial_indent="    ",
        subsequent_indent="        ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def at_least(least: int) -> Check:
    """Returns a check that a value is an integer, at least `least`."""
    return lambda name, value: whole(name, value, least)


def one_of(choices: Any) -> Check:
    """Returns a check that a value is one of the choices of a `Literal` type."""
    return lambda name, value: check_choice(name, value, choices)


def or_none(check: Check) -> Check:
    """Returns a check that also accepts None."""
    return lambda name, value: None if value is None else check(name, value)


def integer(name: str, value: Any) -> int:
    """Checks that a value is an integer, which may be negative."""
    if not isinstance(value, Integral):
        raise ConfigError(f"{name} must be an integer; got {value!r}.")
    return operator.index(value)


def positive(name: str, value: Any) -> Any:
    """Checks that a value is a positive, finite number."""
    if not 0 < as_float(value) < math.inf:
        raise ConfigError(f"{name} must be a positive number; got {value!r}.")
    return value


def time(name: str, value: Any) -> Any:
    """Checks that a value is a positive duration; see `seconds_of`."""
    seconds_of(value, name)
    return value


def path(name: str, value: Any) -> Any:
    """Checks that a value is a local path; see `as_path`."""
    as_path(value, name)
    return value


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """Returns a value that is one of the choices of a `Literal` type.

    Raises:
        ConfigError: the value is not one of them; the message suggests the nearest one.
    """
    if value not in get_args(choices):
        raise ConfigError(
            f"{name} has no value {value!r}. {nearest(str(value), get_args(choices))}"
        )
    return value
