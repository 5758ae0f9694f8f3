"""Rehearsal: `steps_per_call="measure"` times the forms of a step before the first one is trained.

It runs on a copy of the state and on the first batch again and again, so that a run has one form
from its first step to its last, and two runs with one recorded form are equal bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import jax

from distaff.core.files import write_whole
from distaff.core.typing import Batch
from distaff.data import Loader, first_batch
from distaff.execution import compile_cache
from distaff.execution.compile import recompiles
from distaff.execution.compile.measured_choices import Entry, program_key
from distaff.execution.dispatch.dispatcher import Dispatcher
from distaff.execution.dispatch.steps_per_call import (
    FusionChoice,
    Measurement,
    Timing,
    num_at_once,
    recorded,
    settled,
)
from distaff.execution.feed.chunk import SINGLE, ChunkSize
from distaff.execution.feed.feed import Feed
from distaff.execution.feed.feeds import Feeds
from distaff.execution.placement import owned
from distaff.step.state import TrainState

_FILE = "steps_per_call.json"
"""In a run's directory: one that was killed before its first checkpoint keeps its form, too."""

_FAST_SECONDS = 5e-4
"""A fused step this fast needs no comparison: the host alone would cost a good part of it."""

_SLOW_SECONDS = 5e-3
"""A single step this slow needs none either: the host's part in it is lost in the noise."""

_MAX_SINGLE = 8
"""How many single steps are timed together."""

_CLEARLY, _HOPELESSLY = 2, 8
"""How many times slower a form is that is not worth more steps, or not even a second look."""

Trying: TypeAlias = Generator[ChunkSize, float, tuple[ChunkSize, Timing]]
"""Yields forms to run, is sent their seconds per step, and returns the form to keep.

Whatever else a machine does makes a step slower, never faster: of several times the least counts.
"""


def rehearsed(
    steps: Dispatcher,
    state: TrainState,
    feeds: Feeds,
    loader: Loader,
    directory: Path | None,
    *,
    remember: bool,
) -> FusionChoice:
    """Returns the choice of a run that is about to begin: measured, if that is still to be done.

    Args:
        steps: runs chunks of steps.
        state: copied, and otherwise left alone.
        feeds: has that of the train loader.
        loader: the train loader. Its first batch is looked at, and it stays where it is.
        directory: of the run, where the choice is looked for first, and kept; None for none.
        remember: whether to look for the choice of an earlier run of the same program on this
            machine, and to keep it for later ones.
    """
    measurement = steps.forms.measurement
    if measurement is None:
        return steps.forms
    own = None if directory is None else directory / _FILE
    choice = None if own is None else _read(own)
    if choice is None:
        home = compile_cache.home() if remember else None
        file = None if home is None else home / "forms.json"
        key = "" if file is None else program_key(measurement.step, measurement.capacity)
        entry = Entry(file, key)
        kept = recorded(entry.read())
        choice = None if kept is None else kept._replace(why="remembered")
        if choice is None:
            batch, feed = first_batch(loader, name="train"), feeds.of(loader, name="train")
            choice = _measured(measurement, _stopwatch(steps, state, feed, batch))
        if choice.why == "measured":
            entry.write(choice.facts())
    if own is not None:
        with suppress(OSError):  # a full disk: it is in every checkpoint, too
            write_whole(own, json.dumps(choice.facts(), indent=2) + "\n")
    steps.forms = choice
    return choice


def _read(file: Path) -> FusionChoice | None:
    with suppress(OSError, ValueError, RecursionError):
        return recorded(json.loads(file.read_bytes()))
    return None


def _stopwatch(
    steps: Dispatcher, state: TrainState, feed: Feed, batch: Batch
) -> Callable[[ChunkSize], float]:
    """Returns what gives the seconds per step of a form."""
    carried = steps.placement.state(owned(state))

    def seconds(form: ChunkSize) -> float:
        nonlocal carried
        while True:
            chunk = feed.sample(batch, form)
            start, num_compiled = time.perf_counter(), recompiles.count()
            carried, _, _ = steps(carried, steps.blank, chunk, 0)
            jax.block_until_ready(carried)
            if recompiles.count() == num_compiled:
                return (time.perf_counter() - start) / chunk.num_steps

    return seconds


def _measured(measurement: Measurement, seconds: Callable[[ChunkSize], float]) -> FusionChoice:
    """Measures, and returns the choice."""
    trying = (single_first if measurement.convolves else fused_first)(measurement.capacity)
    form = next(trying)
    try:
        while True:
            form = trying.send(seconds(form))
    except StopIteration as end:
        form, timing = end.value
    if form.capacity > 1 and timing.fused is not None:
        form = settled(form, timing.fused, is_long=measurement.is_long)
    return FusionChoice(form, "measured", timing)


def fused_first(capacity: int) -> Trying:
    """Begins with fused steps, and compares them unless they are fast."""
    fused = yield ChunkSize(1, capacity)
    fused = min(fused, (yield _kept(capacity, fused)))
    if fused < _FAST_SECONDS:
        fused = min(fused, (yield _kept(capacity, fused)))
        return _kept(capacity, fused), Timing(None, fused)
    single = yield SINGLE
    if fused > _CLEARLY * single:
        return SINGLE, Timing(single, fused)
    return (yield from _compared(capacity, fused))


def single_first(capacity: int) -> Trying:
    """Begins with single steps, and tries fused ones only if these are fast.

    Convolutions in a loop are slow on the CPU: 25 times, where they are large.
    """
    single = min([(yield SINGLE), (yield SINGLE), (yield SINGLE)])
    if single > _SLOW_SECONDS:
        return SINGLE, Timing(single, None)
    fused = yield ChunkSize(1, capacity)
    if _CLEARLY * single < fused < _HOPELESSLY * single:
        fused = min(
            fused, (yield ChunkSize(1, capacity))
        )  # another program may have been in the way
    if fused > _CLEARLY * single:
        return SINGLE, Timing(single, fused)
    return (yield from _compared(capacity, fused))


def _compared(capacity: int, fused: float) -> Trying:
    """Runs the forms in turn, twice: a busy moment of the machine meets both."""
    form, singles, fuseds = _kept(capacity, fused), [], [fused]
    num_single = max(1, min(form.num_steps, _MAX_SINGLE))
    for _ in range(2):
        fuseds.append((yield form))
        total = 0.0
        for _ in range(num_single):
            total += yield SINGLE
        singles.append(total / num_single)
        form = _kept(capacity, min(fuseds))
    timing = Timing(min(singles), min(fuseds))
    return (form if min(fuseds) < min(singles) else SINGLE), timing


def _kept(capacity: int, seconds: float) -> ChunkSize:
    return ChunkSize(num_at_once(seconds, capacity), capacity)
