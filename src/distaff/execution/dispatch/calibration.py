"""Calibration: `steps_per_call="measure"` times single and fused steps before the first step.

It repeats the first batch on a copy of the state. The run then uses one chunk size from its first
step to its last, so two runs with the same recorded choice are equal bit for bit. Several processes
run each trial together; the first one has the clock and the files, and the others follow it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

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
    with_full_program,
)
from distaff.execution.feed.chunk import SINGLE, ChunkSize
from distaff.execution.feed.feed import Feed
from distaff.execution.feed.feeds import Feeds
from distaff.execution.placement import owned
from distaff.execution.processes import is_first, told
from distaff.step.state import TrainState

_FILE = "steps_per_call.json"
"""In the run directory, so that a run killed before its first checkpoint keeps its choice."""

_FAST_SECONDS = 5e-4
"""A fused step this fast needs no comparison: single steps would spend much of it on the host."""

_SLOW_SECONDS = 5e-3
"""A single step this slow needs no comparison: the host's part in it is negligible."""

_MAX_SINGLE = 8
"""Most single steps to time together."""

_CLEARLY, _HOPELESSLY = 2, 8
"""How many times slower fused steps must be to stop measuring: after a second try, or at once."""

Trials: TypeAlias = Generator[ChunkSize, float, tuple[ChunkSize, Timing]]
"""Yields chunk sizes to run, receives their seconds per step, and returns the size to keep.

Other load on a machine only makes steps slower, so the minimum of several times counts.
"""


def calibrate(
    dispatcher: Dispatcher,
    state: TrainState,
    feeds: Feeds,
    loader: Loader,
    directory: Path | None,
    *,
    remember: bool,
) -> FusionChoice:
    """Returns the choice of steps per call, and measures it first if necessary.

    Args:
        dispatcher: runs chunks of steps; its `forms` is set to the choice.
        state: copied, and otherwise unchanged.
        feeds: feeds that include the train loader.
        loader: the train loader. Its first batch is read, and its position does not change.
        directory: of the run; the choice is read from it if present, and saved to it. None to
            disable.
        remember: whether to reuse the choice of an earlier run of the same program on this machine,
            and to save it for later runs.
    """
    measurement = dispatcher.forms.measurement
    if measurement is None:
        return dispatcher.forms
    own = None if directory is None else directory / _FILE
    entry = _entry(measurement, remember=remember)
    choice = recorded(told(_known(own, entry) if is_first() else None))
    if choice is None:
        batch, feed = first_batch(loader, name="train"), feeds.of(loader, name="train")
        choice = _measure(measurement, timer(dispatcher, state, feed, batch))
        if is_first():
            entry.write(choice.facts())
    if own is not None and is_first():
        with suppress(OSError):  # such as a full disk; every checkpoint has the choice, too
            write_whole(own, json.dumps(choice.facts(), indent=2) + "\n")
    dispatcher.forms = choice
    return choice


def _entry(measurement: Measurement, *, remember: bool) -> Entry:
    """Returns the entry of a choice in the file of this machine."""
    home = compile_cache.home() if remember else None
    if home is None:
        return Entry(None, "")
    return Entry(home / "forms.json", program_key(measurement.step, measurement.capacity))


def _known(own: Path | None, entry: Entry) -> Any:
    """Returns the choice of this run, or else of an earlier one, as JSON; None without either."""
    if own is not None:
        with suppress(OSError, ValueError, RecursionError):
            if (choice := recorded(json.loads(own.read_bytes()))) is not None:
                return choice.facts()
    remembered = recorded(entry.read())
    return remembered and remembered._replace(why="remembered").facts()


def timer(
    dispatcher: Dispatcher, state: TrainState, feed: Feed, batch: Batch
) -> Callable[[ChunkSize], float]:
    """Returns a function that measures the seconds per step of a chunk size.

    Every process must call it; all get the seconds of the first one.
    """
    carried = dispatcher.placement.state(owned(state))

    def seconds(size: ChunkSize) -> float:
        nonlocal carried
        while True:
            chunk = feed.sample(batch, size)
            start, num_compiled = time.perf_counter(), recompiles.count()
            carried, _, _ = dispatcher(carried, dispatcher.blank, chunk, 0)
            jax.block_until_ready(carried)
            duration = time.perf_counter() - start
            has_compiled, duration = told([recompiles.count() > num_compiled, duration])
            if not has_compiled:
                return duration / chunk.num_steps

    return seconds


def _measure(measurement: Measurement, seconds: Callable[[ChunkSize], float]) -> FusionChoice:
    trials = (single_first if measurement.convolves else fused_first)(measurement.capacity)
    size = next(trials)
    try:
        while True:
            size = trials.send(seconds(size))
    except StopIteration as end:
        size, timing = end.value
    if size.capacity > 1 and timing.fused is not None:
        size = with_full_program(size, timing.fused, is_long=measurement.is_long)
    return FusionChoice(size, "measured", timing)


def fused_first(capacity: int) -> Trials:
    """Times fused steps first, and compares them with single steps unless they are fast."""
    fused = yield ChunkSize(1, capacity)
    fused = min(fused, (yield _fused_size(capacity, fused)))
    if fused < _FAST_SECONDS:
        fused = min(fused, (yield _fused_size(capacity, fused)))
        return _fused_size(capacity, fused), Timing(None, fused)
    single = yield SINGLE
    if fused > _CLEARLY * single:
        return SINGLE, Timing(single, fused)
    return (yield from _compare(capacity, fused))


def single_first(capacity: int) -> Trials:
    """Times single steps first, and tries fused steps only if single ones are fast.

    On the CPU convolutions in a loop are up to 25 times slower.
    """
    single = min([(yield SINGLE), (yield SINGLE), (yield SINGLE)])
    if single > _SLOW_SECONDS:
        return SINGLE, Timing(single, None)
    fused = yield ChunkSize(1, capacity)
    if _CLEARLY * single < fused < _HOPELESSLY * single:
        # Another program may have slowed the first one.
        fused = min(fused, (yield ChunkSize(1, capacity)))
    if fused > _CLEARLY * single:
        return SINGLE, Timing(single, fused)
    return (yield from _compare(capacity, fused))


def _compare(capacity: int, fused: float) -> Trials:
    """Times fused and single steps in turn, twice, so that other load affects both."""
    size, singles, fuseds = _fused_size(capacity, fused), [], [fused]
    num_single = max(1, min(size.num_steps, _MAX_SINGLE))
    for _ in range(2):
        fuseds.append((yield size))
        total = 0.0
        for _ in range(num_single):
            total += yield SINGLE
        singles.append(total / num_single)
        size = _fused_size(capacity, min(fuseds))
    timing = Timing(min(singles), min(fuseds))
    return (size if min(fuseds) < min(singles) else SINGLE), timing


def _fused_size(capacity: int, seconds: float) -> ChunkSize:
    return ChunkSize(num_at_once(seconds, capacity), capacity)
