"""The loop: a generator of events, to be read from top to bottom.

    on_training_start
    for each epoch:
        for each batch:                                              train_epoch
            state, row = step(state, batch)                          on_step_end
            at each log boundary: read the rows of the window before this one
            where the run shall end, or is to be saved: pause
        on_training_epoch_end                                        on_epoch_end
        every n-th epoch, and at the last one:
            eval_model
            on_validation_epoch_end                                  on_validation_end
            save_metrics
            is_new_model_better
        end_epoch
        every n-th epoch, and at the last one:
            save_model                                               on_checkpoint
                                                                     on_training_end

On the left what the trainer does, each line an override point; on the right the events that
callbacks see. `epochs` yields the events of a run, `steps` those of one epoch. The last epoch is
the one in which a callback stops the run. `on_training_end` comes after every end, an error
included; the trainer emits it.

A run that was interrupted goes on where its checkpoint was made: within an epoch's steps, after
them, or after `save_model`. What the log holds at a checkpoint is what came before it. A run that
goes back from a bad step does the same, in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from distaff.callbacks import StepInfo, StopTraining
from distaff.execution.dispatch.dispatcher import Steps
from distaff.execution.dispatch.in_flight import Flight
from distaff.execution.dispatch.packed_metrics import Readout, WindowEnd
from distaff.execution.feed.chunk import Chunk
from distaff.run.events import BadNumbers, ChunkEnd, Pause, Plan, Run, given
from distaff.step.state import TrainState


def steps(
    run: Steps,
    state: TrainState,
    chunks: Iterable[Chunk],
    *,
    step: int,
    stopping: Callable[[], bool],
    pausing: Callable[[], bool] = bool,
    rows: np.ndarray | None = None,
    guard: Callable[[range], AbstractContextManager[None]] = nullcontext,
) -> Iterator[ChunkEnd | WindowEnd | Pause]:
    """Trains on the chunks of one epoch.

    A window ends at every multiple of `run.log_every` in the global step, and with the epoch; it is
    read when the next one ends, so that the device never waits for the host.

    Args:
        run: runs chunks; the state is donated to it.
        state: the state to start from; it is not usable afterwards.
        chunks: what is left of the epoch.
        step: completed updates so far.
        stopping: asked after each chunk; True ends the epoch there.
        pausing: asked after each chunk; True reads what the device has done so far.
        rows: of the last of the completed steps, as a `Pause` has left them.
        guard: what to run each chunk in, given its steps, such as a guard against transfers to the
            host.

    Yields:
        A `ChunkEnd` for each chunk, a `WindowEnd` for each window, a `Pause` where asked for.
    """
    strip, flight, readout = run.blank, Flight(), Readout(run.columns, run.log_every, step, rows)
    for chunk in chunks:
        with guard(range(step + 1, step + 1 + chunk.num_steps)):
            state, strip, metrics = run(state, strip, chunk, step)
        flight.add(strip.table, chunk.num_bytes)
        step += chunk.num_steps
        yield ChunkEnd(step, chunk.num_steps, state, metrics, chunk.examples)
        yield from readout.add(strip, step)
        if stopping():
            break
        if pausing():
            yield from readout.due()
            rows = readout.left()
            yield Pause(step, rows, readout.bad(rows), readout.breach(rows))
    yield from readout.rest()


def epochs(run: Run, plan: Plan) -> Iterator[tuple[str, StepInfo]]:
    """Runs the epochs of a plan; see the top of this file.

    Args:
        run: the trainer. Its `stop_reason` is looked at after each epoch's work is saved.
        plan: loaders and epochs.

    Yields:
        The name of an event and what callbacks are told.
    """
    run.take_up()
    _hooked(run, run.on_training_start)
    yield "on_training_start", run.info({})
    saved = run.go_on()
    if saved is not None:
        yield "on_checkpoint", saved
    while True:
        try:
            yield from _rest(run, plan)
            break
        except BadNumbers as found:
            run.recover(found)


def _hooked(run: Run, hook: Callable[..., None], *arguments: Any) -> None:
    """Calls a hook of the trainer, which may stop the run as a callback does."""
    try:
        hook(*arguments)
    except StopTraining as stop:
        run.stop(stop)


def _rest(run: Run, plan: Plan) -> Iterator[tuple[str, StepInfo]]:
    """Runs the epochs that are not done."""
    for epoch in range(run.epoch_to_train, plan.last_epoch + 1):
        if run.stop_reason and not run.is_trained(epoch):
            break
        metrics = run.train_epoch(plan.train_loader, epoch)
        _hooked(run, run.on_training_epoch_end, epoch, metrics)
        yield "on_epoch_end", run.info(metrics)
        validation: dict[str, Any] = {}
        is_last = epoch == plan.last_epoch or bool(run.stop_reason)
        is_due, is_best = is_last or epoch % plan.check_val_every_n_epoch == 0, False
        if is_due and plan.val_loaders:
            for name, loader in plan.val_loaders.items():
                validation.update(run.eval_model(loader, f"{name}/"))
            _hooked(run, run.on_validation_epoch_end, epoch, validation, given(plan.val_loaders))
            yield "on_validation_end", run.info(validation)
            run.save_metrics(f"val_epoch_{epoch:04d}", validation)
        judged = run.monitor.judged(metrics, validation)
        if is_due and judged:
            is_best = run.is_new_model_better(judged, run.best_metrics)
        run.end_epoch(epoch, {**metrics, **validation}, is_best)
        if is_due:
            run.save_model(judged, is_best)
            yield "on_checkpoint", run.info(judged, is_best)
