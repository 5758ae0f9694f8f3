"""Chooses the number of steps per call: single steps, or many fused into one program.

The choice depends on the program of a step, the shapes of its batches and the platform, and on
measured times only for `"measure"`: fused steps may round differently (convolutions on the CPU do),
so equal runs must choose equally. See `docs/decisions/0025-the-clock-decides-no-number.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from distaff.core.typing import PyTree
from distaff.execution.dispatch.work import Work, seconds_of, work_of
from distaff.execution.feed.chunk import SINGLE, ChunkSize

StepsPerCall: TypeAlias = int | Literal["auto", "measure"]
"""See `TrainerConfig`."""

_MAX_STEPS = 256
_MAX_BYTES = 2**24  # of metrics

_CALL_SECONDS = 0.02
"""Target duration of one program: the host's overhead is small, and the run stays responsive."""

_SHORT_SECONDS, _LONG_RUN = 1e-3, 20_000
"""Seconds of a fused step, and steps of a run, for which a second program pays on accelerators."""

_CHOSEN = ("estimated", "measured", "remembered")
"""Reasons of choices that a resumed run reuses: not the user's choice, nor one due to the data."""

_KEYS = ("num_steps", "capacity", "rest")
"""JSON keys of the fields of a `ChunkSize`."""


class Expected(NamedTuple):
    """Facts about the batches of a run that are known before it starts.

    Attributes:
        steps_per_epoch: limits the steps per call; None if unknown.
        total_steps: steps of the run; None if unknown.
        num_shapes: number of different shapes of batches. Each program compiles for each of them,
            and steps are not fused.
    """

    steps_per_epoch: int | None = None
    total_steps: int | None = None
    num_shapes: int = 1


class Timing(NamedTuple):
    """Measured seconds per step, single and fused; None if not measured."""

    single: float | None = None
    fused: float | None = None

    def __str__(self) -> str:
        times = {"unfused": self.single, "fused": self.fused}
        parts = [f"{1e3 * time:.3g} ms {name}" for name, time in times.items() if time]
        return f" ({', '.join(parts)} per step)" if parts else ""


class Measurement(NamedTuple):
    """A measurement to be made before the first step.

    Attributes:
        capacity: most steps per call.
        convolves: whether the step has convolutions.
        is_long: whether the run is long enough for a second program.
        step: the traced step.
    """

    capacity: int
    convolves: bool
    is_long: bool
    step: Any


class FusionChoice(NamedTuple):
    """The choice of steps per call.

    Attributes:
        chunk_size: size of each chunk.
        why: `"given"` by the user; `"estimated"`; `"measured"` by this run or the run it resumes;
            `"remembered"` from another run; or a reason that leaves no choice.
        timing: the measured times.
        measurement: the measurement still to be made; None if the choice is final.
    """

    chunk_size: ChunkSize
    why: str
    timing: Timing = Timing()
    measurement: Measurement | None = None

    @property
    def capacity(self) -> int:
        """Most steps per call."""
        return self.chunk_size.capacity

    def describe(self) -> str:
        """Describes the choice and its reason."""
        number = self.chunk_size.num_steps
        fused = f"{number} step{'s' * (number > 1)} per call" if self.capacity > 1 else "off"
        return f"step fusion: {fused}, {self.why}{self.timing}"

    def facts(self) -> dict[str, Any]:
        """Returns the choice as strict JSON; `recorded` reads it."""
        return {
            **dict(zip(_KEYS, self.chunk_size, strict=True)),
            "why": self.why,
            "seconds_per_step": self.timing._asdict(),
        }


def choose_fusion(
    steps_per_call: StepsPerCall,
    metrics: PyTree,
    expected: Expected,
    *,
    watched: bool,
    jaxpr: Callable[[], Any],
) -> FusionChoice:
    """Chooses the number of steps per call.

    Args:
        steps_per_call: as in `TrainerConfig`.
        metrics: the metrics of one step, or their shapes; a fused program holds them for all steps.
        expected: known facts about the run's batches.
        watched: whether a callback watches each step, which prevents fusion.
        jaxpr: traces the step.

    Returns:
        The choice. With `"measure"`, its `measurement` is to be made before the first step.
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
    measurement = Measurement(capacity, work.convolves, is_long, step)
    return FusionChoice(SINGLE, "to be measured", measurement=measurement)


def fixed(steps_per_call: int) -> FusionChoice:
    """Returns the choice of a number given by the user."""
    partial_capacity = steps_per_call if steps_per_call > 1 and _is_accelerated() else 0
    return FusionChoice(ChunkSize(steps_per_call, steps_per_call, partial_capacity), "given")


def continued(choice: FusionChoice, facts: Any) -> FusionChoice:
    """Returns the choice of a resumed run: its earlier choice if it made one, else `choice`.

    Args:
        choice: the choice that the run would make now.
        facts: the earlier choice, as `FusionChoice.facts` returned it.

    Raises:
        ValueError: `facts` is not valid.
    """
    if not isinstance(facts, Mapping):
        raise ValueError(f"its steps_per_call is {facts!r}")
    return (choice.why in (*_CHOSEN, "to be measured") and recorded(facts)) or choice


def recorded(facts: Any) -> FusionChoice | None:
    """Reads a choice from JSON; None if it is invalid or was not estimated or measured.

    Args:
        facts: as `FusionChoice.facts` returned them.
    """
    if not isinstance(facts, Mapping) or facts.get("why") not in _CHOSEN:
        return None
    size = ChunkSize(*(facts.get(key, 0) for key in _KEYS))
    seconds = facts.get("seconds_per_step")
    if not isinstance(seconds, Mapping) or not all(type(number) is int for number in size):
        return None
    timing = Timing(seconds.get("single"), seconds.get("fused"))
    is_size = 1 <= size.num_steps <= size.capacity <= _MAX_STEPS
    is_size = is_size and 0 <= size.partial_capacity <= _MAX_STEPS
    is_timing = all(time is None or _is_seconds(time) for time in timing)
    return FusionChoice(size, facts["why"], timing) if is_size and is_timing else None


def with_full_program(size: ChunkSize, seconds: float, *, is_long: bool) -> ChunkSize:
    """Returns a chunk size; on an accelerator with a program for full chunks alone if that pays.

    The host of an accelerator checks after each step of a loop whether it was the last one, unless
    the program has a fixed number of steps. On an H100 a check took 15 us, with convolutions 40 to
    70.

    Args:
        size: the chosen size.
        seconds: seconds per fused step.
        is_long: whether the run is long enough for a second program.
    """
    if not (is_long and seconds < _SHORT_SECONDS and size.num_steps > 1 and _is_accelerated()):
        return size
    return ChunkSize(size.num_steps, size.num_steps, partial_capacity=size.capacity)


def num_at_once(seconds: float, capacity: int) -> int:
    """Returns the number of steps that make a program of the right duration.

    Args:
        seconds: seconds per fused step.
        capacity: most steps per call.
    """
    return max(1, min(capacity, round(_CALL_SECONDS / max(seconds, 1e-9))))


def _estimated(work: Work, capacity: int, *, is_long: bool) -> ChunkSize:
    if work.convolves and not _is_accelerated():
        return SINGLE  # XLA's CPU backend runs convolutions in a loop up to 25 times slower
    seconds = seconds_of(work, jax.default_backend())
    number = num_at_once(seconds, capacity)
    return with_full_program(ChunkSize(number, max(number, 2)), seconds, is_long=is_long)


def _is_accelerated() -> bool:
    return jax.default_backend() != "cpu"


def _is_seconds(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < float("inf")
