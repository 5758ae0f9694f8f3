"""The loop: two functions, to be read from top to bottom.

    on_training_start
    for each epoch:
        for each batch:                                              train_epoch
            state, row = step(state, batch)                          on_step_end
            at each log boundary: read the rows of the window before this one
            a verdict: continue, validate and save, or stop
        on_training_epoch_end                                        on_epoch_end
        every n-th epoch, or n-th step also within an epoch, and at the end, validate:
            eval_model
            on_validation_epoch_end                                  on_validation_end
            save_metrics
            is_new_model_better
            save_model                                               on_checkpoint
                                                                     on_training_end

Left: methods of the user's class, each of which may be overridden. Right: events of callbacks.
A resumed run continues where it was saved: within an epoch, after its steps, or after `save_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import numpy as np

from distaff.callbacks.chunk_scope import ChunkScope
from distaff.data import Loader
from distaff.execution.dispatch.dispatcher import Dispatcher
from distaff.execution.dispatch.packed_metrics import MetricWindows, WindowEnd
from distaff.execution.feed.chunk import Chunk
from distaff.run.events import BadNumbers, ChunkEnd, Hooks, Pause, as_argument
from distaff.run.run import Run
from distaff.run.supervision.supervisor import Verdict
from distaff.step.state import TrainState


def train(hooks: Hooks, run: Run) -> None:
    """Trains the epochs of a run's plan. Raises `Interrupted` if the run is asked to end early."""
    run.validate = partial(_validate, hooks, run)
    run.checkpointer.load_state()
    run.call(hooks.on_training_start)
    run.emit("on_training_start")
    run.resume_or_begin()
    while (epoch := run.next_epoch()) is not None:
        try:
            _train_epoch(hooks, run, epoch)
        except BadNumbers as found:
            run.recovery.recover(found)


def _train_epoch(hooks: Hooks, run: Run, epoch: int) -> None:
    """Trains the rest of an epoch, and validates if due."""
    run.begin_epoch(epoch)
    metrics = run.record_epoch(hooks.train_epoch(run.plan.train_loader, epoch))
    run.call(hooks.on_training_epoch_end, epoch, metrics)
    run.emit("on_epoch_end", metrics)
    if run.is_validation_due:
        run.validate(epoch, metrics)
    else:
        run.recorder.end_epoch(epoch, metrics, is_best=False)
    run.finish_epoch(epoch)


def _validate(hooks: Hooks, run: Run, epoch: int, metrics: dict[str, Any]) -> None:
    """Validates, ranks and saves the model. Within an epoch, `metrics` is empty."""
    validation = run.evaluate(hooks.eval_model)
    if run.plan.val_loaders:
        loaders = as_argument(run.plan.val_loaders)
        run.call(hooks.on_validation_epoch_end, epoch, validation, loaders)
        run.emit("on_validation_end", validation)
        hooks.save_metrics(run.state.validation_name, validation)
    judged = run.monitor.judged(metrics, validation)
    is_best = bool(judged) and hooks.is_new_model_better(judged, run.best_metrics)
    run.recorder.end_epoch(epoch, {**metrics, **validation}, is_best)
    run.rank(judged, is_best, hooks.is_new_model_better)
    hooks.save_model(judged, is_best)
    run.emit("on_checkpoint", judged, is_best=is_best)


def epoch_steps(run: Run, loader: Loader) -> Iterator[ChunkEnd]:
    """Trains on the rest of an epoch and records it. Yields after each program of steps."""
    run.choose_steps_per_call(loader)
    recorder, supervisor, taken_up = run.recorder, run.supervisor, run.placed_state
    step, rows, verdict = run.workspace.step, run.state.in_epoch.rows, run.verdict
    with closing(run.training_chunks(loader)) as chunks, run.around_epoch() as around:
        given = {"rows": rows, "around": around, "verdict": verdict, "taken_up": taken_up}
        events = steps(run.dispatcher, taken_up(), run.fetched(chunks), step=step, **given)
        for event in run.timers.timed(events, "device"):
            match event:
                case ChunkEnd():
                    recorder.observe(event)
                    supervisor.beat("a step", event.step)
                    yield event
                case WindowEnd(bad=None, breach=None):
                    recorder.window(event)
                case WindowEnd():
                    run.reject(event)
                    recorder.window(event)
                case Pause():
                    run.pause(event)


def steps(
    dispatcher: Dispatcher,
    state: TrainState,
    chunks: Iterable[Chunk],
    *,
    step: int,
    verdict: Callable[[], Verdict] = lambda: Verdict.CONTINUE,
    rows: np.ndarray | None = None,
    taken_up: Callable[[], TrainState] | None = None,
    around: ChunkScope = nullcontext,
) -> Iterator[ChunkEnd | WindowEnd | Pause]:
    """Trains on the chunks of one epoch.

    A window ends at every multiple of `dispatcher.log_every` in the global step, and with the
    epoch. It is read when the next one ends, so the device never waits for the host.

    Args:
        dispatcher: runs the chunks.
        state: the state to start from; it is donated.
        chunks: the rest of the epoch.
        step: completed updates so far.
        verdict: called after each chunk, and after a `Pause`: STOP ends the epoch; SAVE pauses.
        rows: metrics of the last completed steps, from a `Pause`.
        taken_up: returns the state after a `Pause`, as hooks may replace it; None if nothing does.
        around: returns the context to run a chunk in, given its steps.
    """
    table = dispatcher.blank
    windows = MetricWindows(dispatcher.layout, dispatcher.log_every, step, rows)
    for chunk in chunks:
        with around(range(step + 1, step + 1 + chunk.num_steps)):
            state, table, metrics = dispatcher(state, table, chunk, step)
        step += chunk.num_steps
        yield ChunkEnd(step, chunk.num_steps, state, metrics, chunk.examples, chunk.counts)
        yield from windows.add(table, step)
        decision = verdict()
        if decision is Verdict.SAVE:
            yield from windows.due()
            rows = windows.left()
            yield Pause(step, rows, windows.bad(rows), windows.breach(rows))
            state, decision = taken_up() if taken_up else state, verdict()
        if decision is Verdict.STOP:
            break
    yield from windows.rest()
