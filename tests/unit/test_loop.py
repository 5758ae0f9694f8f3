"""The loop over the steps of an epoch: where windows close, when they are read, how it stops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.execution.dispatch.dispatcher import Dispatcher
from distaff.execution.dispatch.packed_metrics import WindowEnd
from distaff.execution.dispatch.steps_per_call import fixed
from distaff.execution.execution import Eager
from distaff.execution.feed.chunk import Chunk, One
from distaff.metrics import Mean
from distaff.run import loop
from distaff.run.events import ChunkEnd
from distaff.run.supervision.supervisor import Verdict

METRICS = {"loss": Mean(jnp.float32(0), jnp.float32(0))}


class Program:
    """A step whose state is the number of its calls and whose loss is the batch's mean."""

    def __init__(self, bad_step: int | None = None) -> None:
        self.bad_step, self.heard = bad_step, []

    def __call__(self, state: Any, batch: Any) -> Any:
        state += 1
        self.heard.append(("program", state))
        total = np.nan if state == self.bad_step else batch.sum()
        return state, {"loss": Mean(jnp.float32(total), jnp.float32(len(batch)))}


class Batches:
    """Batches of these sizes, that count how many were taken."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.taken = sizes, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for size in self.sizes:
            self.taken += 1
            yield np.full(size, float(self.taken))


def steps(
    program: Program, batches: Batches, *, step: int, log_every: int, verdict: Any = None
) -> Iterator[ChunkEnd | WindowEnd]:
    run = Dispatcher(Eager(), program, METRICS, forms=fixed(1), log_every=log_every, watched=True)
    chunks = (Chunk(1, len(batch), One(batch)) for batch in batches)
    return loop.steps(run, step, chunks, step=step, verdict=verdict or (lambda: Verdict.CONTINUE))


def run(
    sizes: list[int], *, start: int = 0, log_every: int = 2, stop_at: int | None = None
) -> tuple[list[ChunkEnd | WindowEnd], Batches]:
    program, batches = Program(), Batches(sizes)

    def verdict() -> Verdict:
        is_over = stop_at is not None and program.heard[-1] >= ("program", stop_at)
        return Verdict.STOP if is_over else Verdict.CONTINUE

    events = steps(program, batches, step=start, log_every=log_every, verdict=verdict)
    return list(events), batches


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), max_size=14),
    start=st.integers(0, 9),
    log_every=st.integers(1, 6),
    stop_after=st.none() | st.integers(1, 14),
)
def test_steps_loses_no_window_and_counts_none_twice(sizes, start, log_every, stop_after):
    stop_at = None if stop_after is None else start + stop_after
    events, batches = run(sizes, start=start, log_every=log_every, stop_at=stop_at)
    done = sizes if stop_after is None else sizes[:stop_after]
    last = start + len(done)

    ended = [event for event in events if isinstance(event, ChunkEnd)]
    assert [event.step for event in ended] == list(range(start + 1, last + 1))
    assert [event.state for event in ended] == [event.step for event in ended]
    assert [event.examples for event in ended] == done
    assert batches.taken == len(done)

    windows = [event for event in events if isinstance(event, WindowEnd)]
    boundaries = [step for step in range(start + 1, last) if step % log_every == 0]
    assert [event.step for event in windows] == boundaries + [last] * bool(done)
    for first, window in zip([start, *boundaries], windows, strict=False):
        members = range(first - start, window.step - start)
        total: Any = window.metrics["loss"]
        assert total.weight == sum(sizes[member] for member in members)
        assert total.total == sum(sizes[member] * (member + 1) for member in members)


def named(events: list[ChunkEnd | WindowEnd]) -> list[str]:
    return [f"{type(event).__name__} {event.step}" for event in events]


def test_steps_reads_each_window_when_the_next_one_closes():
    assert named(run([1] * 5, start=1)[0]) == [
        *("ChunkEnd 2", "ChunkEnd 3", "ChunkEnd 4", "WindowEnd 2"),
        *("ChunkEnd 5", "ChunkEnd 6", "WindowEnd 4", "WindowEnd 6"),
    ]


@pytest.mark.parametrize(
    ("stop_at", "flushed"),
    [(1, ["WindowEnd 1"]), (2, ["WindowEnd 2"]), (3, ["WindowEnd 2", "WindowEnd 3"])],
)
def test_steps_ends_after_the_step_that_stops_it_and_reads_what_is_left(stop_at, flushed):
    events, batches = run([1] * 9, stop_at=stop_at)
    assert named(events) == [*(f"ChunkEnd {step}" for step in range(1, stop_at + 1)), *flushed]
    assert batches.taken == stop_at


def test_steps_hands_out_a_step_before_it_runs_the_next():
    program = Program()
    for event in steps(program, Batches([1] * 3), step=0, log_every=10):
        program.heard.append((type(event).__name__, event.step))
    assert program.heard == [
        *(("program", 1), ("ChunkEnd", 1), ("program", 2), ("ChunkEnd", 2)),
        *(("program", 3), ("ChunkEnd", 3), ("WindowEnd", 3)),
    ]


def test_steps_names_the_first_bad_step_in_its_own_window_only():
    events = steps(Program(bad_step=3), Batches([1] * 6), step=0, log_every=2)
    bad = {
        event.step: event.bad and event.bad.step for event in events if isinstance(event, WindowEnd)
    }
    assert bad == {2: None, 4: 3, 6: None}


def test_steps_gives_windows_in_float64_on_the_host_and_nothing_for_no_batches():
    events, _ = run([3])
    window: Any = events[-1]
    assert {leaf.dtype for leaf in jax.tree.leaves(window.metrics)} == {np.dtype(np.float64)}
    assert isinstance(window.metrics["loss"].total, np.float64)
    assert run([])[0] == []
