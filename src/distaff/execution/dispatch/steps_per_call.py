"""Which form the steps of a run take: one by one, or many as one program.

The form is a function of the step's program, of the shapes of its batches and of the platform. No
clock has a part in it, unless it is asked for: programs of other forms may round otherwise, as
convolutions on the CPU do, so two equal runs must have equal forms. See
`docs/decisions/0025-the-clock-decides-no-number.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from distaff.core.typing import PyTree
from distaff.execution.dispatch.work import Work, seconds_of, work_of
from distaff.execution.feed.chunk import SINGLE, ChunkSize

StepsPerCall: TypeAlias = int | Literal["auto", "measure"]
"""Steps of one program; see `TrainerConfig`."""

_MAX_STEPS = 256
_MAX_BYTES = 2**24  # of metrics

AT_ONCE_SECONDS = 0.02
"""How long one program shall run: the host's part is then small, and it still answers at once."""

_SHORT_SECONDS, _LONG_RUN = 1e-3, 20_000
"""Fused steps this fast, and so many, are worth another program on an accelerator."""

_CHOSEN = ("estimated", "measured", "remembered")
"""Reasons of a choice that a resumed run takes over: all but the user's own, and the data's."""


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


class Timing(NamedTuple):
    """What was measured of the two forms, in seconds per step; None for a form not tried."""

    single: float | None = None
    fused: float | None = None

    def __str__(self) -> str:
        named = {"unfused": self.single, "fused": self.fused}
        parts = [f"{1e3 * time:.3g} ms {name}" for name, time in named.items() if time]
        return f" ({', '.join(parts)} per step)" if parts else ""


class Measurement(NamedTuple):
    """What is still to be measured before the first step.

    Attributes:
        capacity: the most steps of one program.
        convolves: whether the step has convolutions.
        is_long: whether the run has so many steps that another program pays.
        step: the traced step.
    """

    capacity: int
    convolves: bool
    is_long: bool
    step: Any


class FusionChoice(NamedTuple):
    """How the steps of a run become programs.

    Attributes:
        form: of each chunk.
        why: `"given"` by the user; `"estimated"`; `"measured"`, now or by the run that this one
            resumes; `"remembered"` of another run; or what leaves no choice.
        timing: what was measured.
        measurement: what is still to be measured; None where the choice is made.
    """

    form: ChunkSize
    why: str
    timing: Timing = Timing()
    measurement: Measurement | None = None

    @property
    def capacity(self) -> int:
        """How many steps suit one program."""
        return self.form.capacity

    def describe(self) -> str:
        """Returns the choice and its reason in a few words."""
        number = self.form.num_steps
        fused = f"{number} step{'s' * (number > 1)} per call" if self.capacity > 1 else "off"
        return f"step fusion: {fused}, {self.why}{self.timing}"

    def facts(self) -> dict[str, Any]:
        """Returns the choice as strict JSON; `recorded` reads it."""
        return {
            **self.form._asdict(),
            "why": self.why,
            "seconds_per_step": self.timing._asdict(),
        }


def chosen(
    steps_per_call: StepsPerCall,
    metrics: PyTree,
    expected: Expected,
    *,
    watched: bool,
    jaxpr: Callable[[], Any],
) -> FusionChoice:
    """Chooses the form of a run's steps.

    Args:
        steps_per_call: as in `TrainerConfig`.
        metrics: of one step, or their shapes: a fused program holds those of all its steps.
        expected: what is known of the run's batches.
        watched: whether somebody looks at each step, which then must be one program.
        jaxpr: traces the step.

    Returns:
        The choice; under `"measure"` one to be replaced before the first step.
    """
    if isinstance(steps_per_call, int):
        return fixed(steps_per_call)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(metrics))
    capacity = min(
        _MAX_STEPS, expected.steps_per_epoch or _MAX_STEPS, _MAX_BYTES // max(num_bytes, 1)
    )
    if watched:
        return FusionChoice(SINGLE, "as a callback watches each step")
    if expected.num_shapes > 1:
        return FusionChoice(SINGLE, "as batches have several shapes")
    if capacity < 2:
        return FusionChoice(SINGLE, "as an epoch is one step or metrics are large")
    step, is_long = jaxpr(), (expected.total_steps or _LONG_RUN) >= _LONG_RUN
    work = work_of(step.jaxpr)
    if steps_per_call == "auto":
        return FusionChoice(_estimated(work, capacity, is_long=is_long), "estimated")
    to_do = Measurement(capacity, work.convolves, is_long, step)
    return FusionChoice(SINGLE, "to be measured", measurement=to_do)


def fixed(steps_per_call: int) -> FusionChoice:
    """Returns the choice of a user."""
    rest = steps_per_call if steps_per_call > 1 and _is_accelerated() else 0
    return FusionChoice(ChunkSize(steps_per_call, steps_per_call, rest), "given")


def continued(choice: FusionChoice, facts: Any) -> FusionChoice:
    """Returns the choice of a resumed run: the one that it had made, if any.

    Args:
        choice: that the same run would make now.
        facts: of the run before it, as `FusionChoice.facts` gave them.

    Raises:
        ValueError: no run has written them.
    """
    if not isinstance(facts, Mapping):
        raise ValueError(f"its steps_per_call is {facts!r}")
    return (choice.why in (*_CHOSEN, "to be measured") and recorded(facts)) or choice


def recorded(facts: Any) -> FusionChoice | None:
    """Returns a choice that was kept as JSON; None if it is not one that a run has made by itself.

    Args:
        facts: as `FusionChoice.facts` gave them.
    """
    if not isinstance(facts, Mapping) or facts.get("why") not in _CHOSEN:
        return None
    form = ChunkSize(*(facts.get(name, 0) for name in ChunkSize._fields))
    seconds = facts.get("seconds_per_step")
    if not isinstance(seconds, Mapping) or not all(type(number) is int for number in form):
        return None
    timing = Timing(seconds.get("single"), seconds.get("fused"))
    is_form = 1 <= form.num_steps <= form.capacity <= _MAX_STEPS and 0 <= form.rest <= _MAX_STEPS
    is_timing = all(time is None or _is_seconds(time) for time in timing)
    return FusionChoice(form, facts["why"], timing) if is_form and is_timing else None


def settled(form: ChunkSize, seconds: float, *, is_long: bool) -> ChunkSize:
    """Returns a form, on an accelerator with programs of just its length where that pays.

    The host of an accelerator asks after each step of a loop whether it was the last, unless the
    program knows how many there are. On an H100 that was 15 us a step, with convolutions 40 to 70.

    Args:
        form: that was chosen.
        seconds: that a fused step takes.
        is_long: whether the run has so many steps that another program pays.
    """
    if not (is_long and seconds < _SHORT_SECONDS and form.num_steps > 1 and _is_accelerated()):
        return form
    return ChunkSize(form.num_steps, form.num_steps, rest=form.capacity)


def num_at_once(seconds: float, capacity: int) -> int:
    """Returns how many steps make a program of the right length.

    Args:
        seconds: that a fused step takes.
        capacity: the most steps of one program.
    """
    return max(1, min(capacity, round(AT_ONCE_SECONDS / max(seconds, 1e-9))))


def _estimated(work: Work, capacity: int, *, is_long: bool) -> ChunkSize:
    """Returns the form that suits the work of a step."""
    if work.convolves and not _is_accelerated():
        return SINGLE  # XLA's CPU backend runs convolutions in a loop up to 25 times slower
    seconds = seconds_of(work, jax.default_backend())
    number = num_at_once(seconds, capacity)
    return settled(ChunkSize(number, max(number, 2)), seconds, is_long=is_long)


def _is_accelerated() -> bool:
    return jax.default_backend() != "cpu"


def _is_seconds(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < float("inf")
