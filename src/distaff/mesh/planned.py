"""Planning: describes a training for devices that this machine may not have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Planned:
    """A training that is described, and not run.

    Attributes:
        devices: the devices of a mesh; by default those that JAX sees.
        meet: called with the trainer and the plan of each training instead of running it; it
            raises. None to run trainings.
    """

    devices: Sequence[Any] | None = None
    meet: Callable[[Any, Any], NoReturn] | None = None


_current: ContextVar[Planned] = ContextVar("planned", default=Planned())  # noqa: B039


@contextmanager
def planning(planned: Planned) -> Generator[None]:
    """Returns a context in which trainings are described for other devices."""
    token = _current.set(planned)
    try:
        yield
    finally:
        _current.reset(token)


def planned_devices() -> Sequence[Any] | None:
    """Returns the devices that a training is described for; None outside of `planning`."""
    return _current.get().devices


def is_met() -> bool:
    """Whether a training is described instead of run in this context."""
    return _current.get().meet is not None


def unless_met(function: F) -> F:
    """Decorates a function that creates arrays, so that it does nothing in a plan."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return None if is_met() else function(*args, **kwargs)

    return cast(F, run)


def meet(trainer: Any, plan: Any) -> None:
    """Ends a training that is only to be described, before it has created anything."""
    found = _current.get().meet
    if found is not None:
        found(trainer, plan)
