"""The loop: a generator of events, to be read from top to bottom.

    on_training_start
    for each epoch:
        for each batch:                                              train_epoch
            state, window = step(state, window, batch)               on_step_end
            at each log boundary: read the window before this one
        on_training_epoch_end                                        on_epoch_end
        every n-th epoch:
            eval_model
            on_validation_epoch_end                                  on_validation_end
            save_metrics
            is_new_model_better
            save_model                                               on_checkpoint
    on_training_end

On the left what the trainer does, each line an override point; on the right the events that
callbacks see. `epochs` yields the events of a run, `steps` those of one epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

from distaff import metrics as metrics_lib
from distaff.callbacks import StepInfo
from distaff.events import Plan, Run, StepEnd, WindowEnd
from distaff.state import TrainState
from distaff.typing import Batch
from distaff.window import NEVER, Window


def steps(
    program: Callable[[TrainState, Window, Batch], tuple[TrainState, Window, Any]],
    state: TrainState,
    batches: Iterable[Batch],
    *,
    step: int,
    empty: Window,
    log_every: int,
    stopping: Callable[[], bool],
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[StepEnd | WindowEnd]:
    """Trains on the batches of one epoch.

    A window is closed at every multiple of `log_every` in the global step, and at the end; it is
    read when the next one closes, so that the device never waits for the host.

    Args:
        program: a windowed step (`distaff.window.windowed`), compiled; the state is donated to it.
        state: the state to start from; it is not usable afterwards.
        batches: what is left of the epoch.
        step: completed updates so far.
        empty: the window before its first step.
        log_every: steps per window.
        stopping: asked after each step; True ends the epoch there.
        guard: what to run each step in, such as a guard against transfers to the host.

    Yields:
        A `StepEnd` for each batch, a `WindowEnd` for each window.
    """
    window, closed = empty, None
    for batch in batches:
        with guard():
            state, window, metrics = program(state, window, batch)
        step += 1
        yield StepEnd(step, state, metrics, len(jax.tree.leaves(batch)[0]))
        if step % log_every == 0:
            if closed is not None:
                yield _read(*closed)
            closed, window = (step, _sent(window)), empty
        if stopping():
            break
    if closed is not None:
        yield _read(*closed)
    if window is not empty:
        yield _read(step, window)


def _sent(window: Window) -> Window:
    for leaf in jax.tree.leaves(window):
        leaf.copy_to_host_async()
    return window


def _read(step: int, window: Window) -> WindowEnd:
    first_bad_step = int(np.min(window.first_bad_step))
    return WindowEnd(
        step,
        metrics_lib.to_host(window.metrics),
        None if first_bad_step == NEVER else first_bad_step,
    )


def epochs(run: Run, plan: Plan) -> Iterator[tuple[str, StepInfo]]:
    """Runs the epochs of a plan; see the top of this file.

    Args:
        run: the trainer. Its `stop_reason` is looked at after each epoch's work is saved.
        plan: loaders and epochs.

    Yields:
        The name of an event and what callbacks are told.
    """
    run.on_training_start()
    yield "on_training_start", run.info({})
    for epoch in range(plan.first_epoch, plan.last_epoch + 1):
        if run.stop_reason:
            break
        metrics = run.train_epoch(plan.train_loader, epoch)
        if run.stop_reason:
            break
        run.on_training_epoch_end(epoch, metrics)
        yield "on_epoch_end", run.info(metrics)
        is_best = False
        if epoch % plan.check_val_every_n_epoch == 0:
            validation: dict[str, Any] = {}
            if plan.val_loader is not None:
                validation = run.eval_model(plan.val_loader, "val/")
                run.on_validation_epoch_end(epoch, validation, plan.val_loader)
                yield "on_validation_end", run.info(validation)
                run.save_metrics(f"val_epoch_{epoch:04d}", validation)
                is_best = run.is_new_model_better(validation, run.best_metrics)
            run.save_model(validation, is_best)
            yield "on_checkpoint", run.info(validation, is_best)
            metrics = {**metrics, **validation}
        run.end_epoch(epoch, metrics, is_best)
    yield "on_training_end", run.info({})
