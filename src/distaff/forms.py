"""Which form the steps of a run take: one by one, or many as one program. Measured, not guessed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jax.extend.core import jaxprs_in_params

from distaff.data import SINGLE, Form
from distaff.typing import PyTree

_MAX_STEPS = 256
_MAX_BYTES = 2**24  # of metrics

_AT_ONCE_SECONDS = 0.02
"""How long one program shall run: the host's part is then small, and it still answers at once."""

_FAST_SECONDS = 5e-4
"""A fused step this fast needs no comparison: the host alone would cost a good part of it."""

_SLOW_SECONDS = 5e-3
"""A single step this slow needs none either: the host's part in it is lost in the noise."""


class Forms(Protocol):
    """Tells the form of the next chunk."""

    @property
    def form(self) -> Form:
        """The form of the next chunk."""
        ...

    @property
    def measuring(self) -> bool:
        """Whether to wait for each chunk, and to tell how long it took."""
        ...

    @property
    def capacity(self) -> int:
        """How many steps suit one program; 1 until that is known."""
        ...

    def took(self, seconds: float) -> None:
        """Hears how long each step of the last chunk took."""
        ...

    def describe(self) -> str:
        """Returns the choice and its reason in a few words; empty where there is nothing to say."""
        ...


def make_forms(
    steps_per_call: int | Literal["auto"],
    metrics: PyTree,
    *,
    steps_per_epoch: int | None,
    watched: bool,
    convolves: Callable[[], bool],
) -> Forms:
    """Makes what chooses the form of a run's steps.

    Args:
        steps_per_call: a number of steps, or "auto".
        metrics: of one step, or their shapes: a fused program holds those of all its steps.
        steps_per_epoch: no program runs past the end of an epoch; None if it is not known.
        watched: whether somebody looks at each step, which then must be one program.
        convolves: tells whether the step convolves.
    """
    if steps_per_call != "auto":
        return Fixed(steps_per_call)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(metrics))
    capacity = min(_MAX_STEPS, steps_per_epoch or _MAX_STEPS, _MAX_BYTES // max(num_bytes, 1))
    if watched or capacity < 2:
        return Fixed(1)
    return Measured(capacity, single_first=convolves())


def convolves(function: Callable[..., Any], *args: Any) -> bool:
    """Tells whether a function convolves."""
    return _has_convolution(jax.make_jaxpr(function)(*args).jaxpr)


def _has_convolution(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name == "conv_general_dilated"
        or any(_has_convolution(inner) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


class Fixed:
    """The same form for every chunk.

    Args:
        steps_per_call: steps of one program.
    """

    measuring = False

    def __init__(self, steps_per_call: int) -> None:
        self.form = Form(steps_per_call, steps_per_call)
        self.capacity = steps_per_call

    def took(self, seconds: float) -> None:
        """Does nothing."""

    def describe(self) -> str:
        """Returns nothing: the user knows."""
        return ""


class Timing(NamedTuple):
    """What was measured of the two forms, in seconds per step; None for a form not tried."""

    single: float | None
    fused: float | None


class Measured:
    """Tries the forms on the first steps of the run, which train as any others do.

    Args:
        capacity: the most steps of one program.
        single_first: whether to begin with single steps, and to try fused ones only if these are
            fast. Convolutions in a loop are slow on the CPU: 25 times, where they are large.
    """

    def __init__(self, capacity: int, *, single_first: bool) -> None:
        self._trying = (_single_first if single_first else _fused_first)(capacity)
        self._timing = Timing(None, None)
        self.form = next(self._trying)
        self.measuring = True

    @property
    def capacity(self) -> int:
        """How many steps suit one program; 1 until that is known."""
        return 1 if self.measuring else self.form.capacity

    def took(self, seconds: float) -> None:
        """Goes on to the next form, until the choice is made."""
        try:
            self.form = self._trying.send(seconds)
        except StopIteration as end:
            self.form, self._timing = end.value
            self.measuring = False

    def describe(self) -> str:
        """Returns the choice, and what was measured."""
        if self.measuring:
            return ""
        named = {"one by one": self._timing.single, "fused": self._timing.fused}
        times = ", ".join(
            f"{1e3 * seconds:.3g} ms {name}" for name, seconds in named.items() if seconds
        )
        return f"{self.form.num_steps} per call ({times})"


Trying = Generator[Form, float, tuple[Form, Timing]]
"""Yields forms to run, is sent their seconds per step, and returns the form to keep."""


def _fused_first(capacity: int) -> Trying:
    fused = yield from _time_fused(capacity)
    if fused < _FAST_SECONDS:
        return _kept(capacity, fused), Timing(None, fused)
    single = yield from _time_single()
    return _better(capacity, single, fused)


def _single_first(capacity: int) -> Trying:
    single = yield from _time_single()
    if single > _SLOW_SECONDS:
        return SINGLE, Timing(single, None)
    fused = yield from _time_fused(capacity, give_up=2 * single)
    return _better(capacity, single, fused)


def _time_single() -> Generator[Form, float, float]:
    yield SINGLE  # compiles
    return statistics.median([(yield SINGLE), (yield SINGLE), (yield SINGLE)])


def _time_fused(capacity: int, give_up: float = float("inf")) -> Generator[Form, float, float]:
    yield Form(1, capacity)  # compiles
    seconds = yield Form(min(2, capacity), capacity)
    if seconds > give_up:
        return seconds
    # By now the time of one call is known well enough to make the next ones neither long nor short.
    form = _kept(capacity, seconds)
    return statistics.median([(yield form), (yield form), (yield form)])


def _kept(capacity: int, seconds: float) -> Form:
    return Form(max(1, min(capacity, round(_AT_ONCE_SECONDS / max(seconds, 1e-9)))), capacity)


def _better(capacity: int, single: float, fused: float) -> tuple[Form, Timing]:
    timing = Timing(single, fused)
    return (_kept(capacity, fused) if fused < single else SINGLE), timing
