"""Which form the steps of a run take: one by one, or many as one program. Measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jax.extend.core import jaxprs_in_params

from distaff.choices import Entry, program_key
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

_SHORT_SECONDS, _LONG_RUN = 1e-3, 20_000
"""Fused steps this fast, and so many, are worth another program on an accelerator."""

_MAX_SINGLE = 8
"""How many single steps are timed together."""

_CLEARLY, _HOPELESSLY = 2, 8
"""How many times slower a form is that is not worth more steps, or not even a second look."""

_MAX_UNTOLD = 16
"""After this many calls in a row that say nothing, steps run one by one."""


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

    def took(self, seconds: float | None) -> None:
        """Hears how long each step of the last chunk took; None where that says nothing."""
        ...

    def describe(self) -> str:
        """Returns the choice and its reason in a few words; empty where there is nothing to say."""
        ...

    def facts(self) -> dict[str, Any]:
        """Returns the choice, why, and the seconds per step that were measured, as JSON."""
        ...


class Expected(NamedTuple):
    """What is known of the batches of a run before it begins.

    Attributes:
        steps_per_epoch: no program runs past the end of an epoch; None if it is not known.
        total_steps: of the run; likewise.
        num_shapes: how many shapes the batches have; each program compiles for each of them. Where
            they take turns, few steps in a row could be one program.
    """

    steps_per_epoch: int | None = None
    total_steps: int | None = None
    num_shapes: int = 1


def make_forms(
    steps_per_call: int | Literal["auto"],
    metrics: PyTree,
    expected: Expected,
    *,
    watched: bool,
    jaxpr: Callable[[], Any],
    file: Path | None = None,
) -> Forms:
    """Makes what chooses the form of a run's steps.

    Args:
        steps_per_call: a number of steps, or "auto".
        metrics: of one step, or their shapes: a fused program holds those of all its steps.
        expected: what is known of the run's batches.
        watched: whether somebody looks at each step, which then must be one program.
        jaxpr: traces the step.
        file: where choices are remembered; None to measure anew.
    """
    if steps_per_call != "auto":
        return Fixed(steps_per_call, "given")
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(metrics))
    capacity = min(
        _MAX_STEPS, expected.steps_per_epoch or _MAX_STEPS, _MAX_BYTES // max(num_bytes, 1)
    )
    if watched or expected.num_shapes > 1 or capacity < 2:
        why = "several shapes" if expected.num_shapes > 1 else "no room for more"
        return Fixed(1, "watched" if watched else why)
    traced = jaxpr()
    entry = Entry(file, "" if file is None else program_key(traced, capacity))

    def keep(form: Form, timing: Timing) -> None:
        entry.write(_facts(form, "measured", timing))

    is_long = expected.total_steps is None or expected.total_steps >= _LONG_RUN
    remembered = _recalled(entry.read(), capacity, is_long=is_long)
    return remembered or Measured(
        capacity, single_first=convolves(traced.jaxpr), is_long=is_long, chosen=keep
    )


def continued(forms: Forms, facts: Any) -> Forms:
    """Returns what chooses the form in a run that goes on: the choice that it had made, if any.

    Other forms may round otherwise.

    Args:
        forms: of the run that goes on.
        facts: of the run before it, as `Forms.facts` gave them.
    """
    if isinstance(forms, Fixed) or facts.get("why") not in ("measured", "remembered"):
        return forms
    capacity = facts.get("capacity")
    is_known = isinstance(capacity, int) and 1 <= capacity <= _MAX_STEPS
    is_long = isinstance(forms, Measured | Remembered) and forms.is_long
    return (_recalled(facts, capacity, is_long=is_long) if is_known else None) or forms


def convolves(jaxpr: Any) -> bool:
    """Tells whether a program convolves."""
    return any(
        equation.primitive.name == "conv_general_dilated"
        or any(convolves(inner) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


class Fixed:
    """The same form for every chunk.

    Args:
        steps_per_call: steps of one program.
        why: what was the reason.
    """

    measuring = False

    def __init__(self, steps_per_call: int, why: str = "given") -> None:
        self._why = why
        rest = steps_per_call if steps_per_call > 1 and _is_accelerated() else 0
        self.form = Form(steps_per_call, steps_per_call, rest)
        self.capacity = steps_per_call

    def took(self, seconds: float | None) -> None:
        """Does nothing."""

    def describe(self) -> str:
        """Returns nothing: the user knows."""
        return ""

    def facts(self) -> dict[str, Any]:
        """Returns the form."""
        return _facts(self.form, self._why, Timing(None, None))


class Timing(NamedTuple):
    """What was measured of the two forms, in seconds per step; None for a form not tried."""

    single: float | None
    fused: float | None

    def __str__(self) -> str:
        named = {"one by one": self.single, "fused": self.fused}
        return ", ".join(f"{1e3 * time:.3g} ms {name}" for name, time in named.items() if time)


class Measured:
    """Tries the forms on the first steps of the run, which train as any others do.

    Args:
        capacity: the most steps of one program.
        single_first: whether to begin with single steps, and to try fused ones only if these are
            fast. Convolutions in a loop are slow on the CPU: 25 times, where they are large.
        is_long: whether there are so many steps that another program pays.
        chosen: is told the choice.
    """

    def __init__(
        self,
        capacity: int,
        *,
        single_first: bool,
        is_long: bool = True,
        chosen: Callable[[Form, Timing], None] = lambda form, timing: None,
    ) -> None:
        self._trying = (_single_first if single_first else _fused_first)(capacity)
        self._timing, self._chosen, self._num_untold = Timing(None, None), chosen, 0
        self.form, self.is_long = next(self._trying), is_long
        self.measuring = True

    @property
    def capacity(self) -> int:
        """How many steps suit one program; 1 until that is known."""
        return 1 if self.measuring else self.form.capacity

    def took(self, seconds: float | None) -> None:
        """Goes on to the next form, until the choice is made."""
        if seconds is None:
            self._num_untold += 1
            if self._num_untold == _MAX_UNTOLD:
                self.form, self.measuring = SINGLE, False
            return
        self._num_untold = 0
        try:
            self.form = self._trying.send(seconds)
        except StopIteration as end:
            form, self._timing = end.value
            self.form = _settled(form, self._timing, is_long=self.is_long)
            self.measuring = False
            self._chosen(form, self._timing)

    def describe(self) -> str:
        """Returns the choice, and what was measured."""
        return "" if self.measuring else f"{self.form.num_steps} per call ({self._timing})"

    def facts(self) -> dict[str, Any]:
        """Returns the choice, or that it was not made yet."""
        return _facts(self.form, "measuring" if self.measuring else "measured", self._timing)


class Remembered:
    """The form that an earlier run of the same step on the same machine has chosen.

    Args:
        form: the form.
        timing: what was measured then.
        is_long: as `Measured` takes it.
    """

    measuring = False

    def __init__(self, form: Form, timing: Timing, *, is_long: bool = True) -> None:
        self.form, self._timing = _settled(form, timing, is_long=is_long), timing
        self.capacity, self.is_long = self.form.capacity, is_long

    def took(self, seconds: float | None) -> None:
        """Does nothing."""

    def describe(self) -> str:
        """Returns the choice, and what was measured for it."""
        return f"{self.form.num_steps} per call, remembered ({self._timing})"

    def facts(self) -> dict[str, Any]:
        """Returns the choice."""
        return _facts(self.form, "remembered", self._timing)


def _is_accelerated() -> bool:
    return jax.default_backend() != "cpu"


def _settled(form: Form, timing: Timing, *, is_long: bool) -> Form:
    """Returns a form that was chosen, on an accelerator with programs of just its length.

    The host of an accelerator asks after each step of a loop whether it was the last, unless the
    program knows how many there are. On an H100 that was 15 us a step, with convolutions 40 to 70.
    """
    fused = timing.fused
    is_short = fused is not None and fused < _SHORT_SECONDS
    if not (is_long and is_short and form.capacity > 1 and _is_accelerated()):
        return form
    return Form(form.num_steps, form.num_steps, rest=form.capacity)


def _facts(form: Form, why: str, timing: Timing) -> dict[str, Any]:
    numbers = {"num_steps": form.num_steps, "capacity": form.rest or form.capacity}
    return {**numbers, "why": why, "seconds_per_step": timing._asdict()}


def _recalled(value: Any, capacity: int, *, is_long: bool) -> Remembered | None:
    """Returns the choice that a file holds; None if it holds something else."""
    try:
        num_steps, seconds = value["num_steps"], value["seconds_per_step"]
        timing = Timing(seconds["single"], seconds["fused"])
    except (KeyError, TypeError):
        return None
    if type(num_steps) is not int or not 1 <= num_steps <= capacity:
        return None
    if not all(time is None or _is_seconds(time) for time in timing):
        return None
    # One step per call is the single form, unless fused steps are so slow that one is enough.
    is_single = value.get("capacity") == 1
    form = SINGLE if is_single else Form(num_steps, capacity)
    return Remembered(form, timing, is_long=is_long)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < float("inf")


Trying = Generator[Form, float, tuple[Form, Timing]]
"""Yields forms to run, is sent their seconds per step, and returns the form to keep.

Whatever else a machine does makes a step slower, never faster: of several times the least counts.
A call that compiles is not timed, but made again.
"""


def _fused_first(capacity: int) -> Trying:
    fused = yield Form(1, capacity)
    fused = min(fused, (yield _kept(capacity, fused)))
    if fused < _FAST_SECONDS:
        fused = min(fused, (yield _kept(capacity, fused)))
        return _kept(capacity, fused), Timing(None, fused)
    single = yield SINGLE
    if fused > _CLEARLY * single:
        return SINGLE, Timing(single, fused)
    return (yield from _compared(capacity, fused))


def _single_first(capacity: int) -> Trying:
    single = min([(yield SINGLE), (yield SINGLE), (yield SINGLE)])
    if single > _SLOW_SECONDS:
        return SINGLE, Timing(single, None)
    fused = yield Form(1, capacity)
    if _CLEARLY * single < fused < _HOPELESSLY * single:
        fused = min(fused, (yield Form(1, capacity)))  # another program may have been in the way
    if fused > _CLEARLY * single:
        return SINGLE, Timing(single, fused)
    return (yield from _compared(capacity, fused))


def _compared(capacity: int, fused: float) -> Trying:
    """Runs the forms in turn, twice: a busy moment of the machine meets both."""
    form, singles, fuseds = _kept(capacity, fused), [], [fused]
    num_single = max(1, min(form.num_steps, _MAX_SINGLE, capacity // 2))  # within a short epoch
    for _ in range(2):
        fuseds.append((yield form))
        total = 0.0
        for _ in range(num_single):
            total += yield SINGLE
        singles.append(total / num_single)
        form = _kept(capacity, min(fuseds))
    timing = Timing(min(singles), min(fuseds))
    return (form if min(fuseds) < min(singles) else SINGLE), timing


def _kept(capacity: int, seconds: float) -> Form:
    return Form(max(1, min(capacity, round(_AT_ONCE_SECONDS / max(seconds, 1e-9)))), capacity)
