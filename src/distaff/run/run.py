"""Run: one `train_model`, made of parts that each do one thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from distaff.callbacks import StopTraining
from distaff.callbacks.callbacks import Callbacks
from distaff.callbacks.chunk_scope import ChunkScope, around_epoch
from distaff.data import Loader
from distaff.data.inspection import InspectionOptions
from distaff.errors import LossError
from distaff.execution import page_faults
from distaff.execution.dispatch.calibration import calibrate
from distaff.execution.dispatch.dispatcher import Dispatcher, DispatchOptions
from distaff.execution.dispatch.packed_metrics import BadStep, WindowEnd
from distaff.execution.feed.chunk import Chunk
from distaff.execution.feed.skipped import num_drawn, skipped_batches
from distaff.execution.timers import Timers
from distaff.loggers import ManyLoggers
from distaff.metrics.monitor import Monitor
from distaff.run.checkpointer import Checkpointer
from distaff.run.directory.recording import RecordingOptions
from distaff.run.events import BadNumbers, Interrupted, Pause, Plan
from distaff.run.identity.ending import ending
from distaff.run.ranking import Better
from distaff.run.recorder import Recorder
from distaff.run.recovery import Recovery
from distaff.run.report import Report
from distaff.run.result import Best
from distaff.run.run_state import EpochProgress, RunState
from distaff.run.sanity import report_breach
from distaff.run.supervision.interruption import SupervisionOptions
from distaff.run.supervision.supervisor import Supervisor
from distaff.run.supervision.watchdog import COMPILING
from distaff.run.workspace import Workspace
from distaff.step.guard import RecoveryOptions
from distaff.step.remainder import may_have_rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(
    SupervisionOptions, InspectionOptions, RecoveryOptions, DispatchOptions, RecordingOptions
):
    """What a run reads of a trainer's options."""


class Run:
    """One training: what it is made of, and what the loop asks of it.

    Args:
        workspace: of the trainer.
        plan: loaders and epochs.
        options: of the trainer.
        callbacks: told of the events of the run.
        monitor: what models are judged by.
        owner: the name of the user's class.

    Attributes:
        state: where the run stands, a value.
        report: how fast the run was; None before it has finished.
        logger: the loggers of the run, for what your class logs itself.
        path: of the run directory; None where nothing is written.
        best_models: the best first, each with a checkpoint.
        forms: how many steps are one program.
        interruptible: ends an evaluation when the run is asked to end; see `Supervisor`.
    """

    def __init__(
        self,
        workspace: Workspace,
        plan: Plan,
        options: RunOptions,
        callbacks: Callbacks,
        monitor: Monitor,
        owner: str,
    ) -> None:
        self.workspace, self.plan, self.callbacks = workspace, plan, callbacks
        self._options, self._monitor, self._owner = options, monitor, owner
        callbacks.stop_reason = None
        workspace.evaluation_watch.expect()
        workspace.feeds.validate_on(plan.val_loaders.values(), plan.train_loader)
        self.recorder = Recorder(workspace, plan, options, callbacks)
        self.supervisor = Supervisor(options, callbacks, is_watched=not options.debug)
        self.checkpointer = Checkpointer(self.recorder, self.supervisor, options)
        self.recovery = Recovery(self.recorder, self.checkpointer, self.supervisor, options)
        self.recovery.check()
        workspace.feeds.make_room(2 + len(plan.val_loaders))
        self.interruptible = partial(self.supervisor.interruptible, self.checkpointer)

    @property
    def state(self) -> RunState:
        """Where the run stands."""
        return self.recorder.state

    @property
    def dispatcher(self) -> Dispatcher:
        """Runs the steps."""
        return self.recorder.dispatcher

    @property
    def timers(self) -> Timers:
        """Counts the seconds of the run."""
        return self.recorder.timers

    @property
    def report(self) -> Report | None:
        """How fast the run was; None before it has finished."""
        return self.recorder.report

    @property
    def forms(self) -> Any:
        """How many steps are one program."""
        return self.recorder.forms

    @property
    def logger(self) -> ManyLoggers:
        """The loggers of the run."""
        return self.recorder.recording.logger

    @property
    def path(self) -> Path | None:
        """The run directory; None where nothing is written."""
        return self.recorder.recording.path

    @property
    def best_models(self) -> tuple[Best, ...]:
        """The best models, each with a checkpoint."""
        return self.state.best_models

    @property
    def best_metrics(self) -> dict[str, Any] | None:
        """Validation metrics of the best model; None before the first."""
        return None if self.state.best is None else self.state.best.metrics

    @property
    def is_stopped(self) -> bool:
        """Whether a callback or a hook wants this epoch to be the last one."""
        return self.callbacks.stop_reason is not None

    def take_up(self) -> None:
        """Loads the state of a run that is resumed."""
        self.checkpointer.take_up()

    def resume_or_begin(self) -> None:
        """Goes to where a resumed run was saved, or keeps the state that a new one begins with."""
        self._begin_from_weights()
        saved = self.checkpointer.resume()
        if self.recorder.recording.found is None:
            self.recovery.keep_origin()
        if saved is not None:
            self.recorder.emit("on_checkpoint", saved)

    def _begin_from_weights(self) -> None:
        """Says where the weights of a new run come from.

        Raises:
            DistaffError: they could not be loaded.
        """
        here = self.workspace
        not_loaded, here.not_loaded = here.not_loaded, None
        if self.recorder.recording.found is None and not here.step:
            if not_loaded is not None:
                raise not_loaded
            if here.origin:
                self.recorder.show(here.origin)

    def next_epoch(self) -> int | None:
        """Returns the first epoch that is not done; None where the run ends."""
        progress = self.state.in_epoch
        is_over = progress.epoch > self.plan.last_epoch
        return None if is_over or (self.is_stopped and not progress.is_trained) else progress.epoch

    def call(self, hook: Callable[..., None], *arguments: Any) -> None:
        """Calls a hook of the user's class, which may stop the run as a callback does."""
        try:
            hook(*arguments)
        except StopTraining as stop:
            self.callbacks.stop(stop, self._owner)

    def emit(
        self, event: str, metrics: Mapping[str, Any] | None = None, *, is_best: bool = False
    ) -> None:
        """Tells callbacks of an event."""
        self.recorder.emit(event, self.recorder.info(metrics or {}, is_best))

    def begin_epoch(self, epoch: int) -> None:
        """Begins an epoch, or the rest of one."""
        self.checkpointer.boundary = None
        self.supervisor.beat("the first step of an epoch", self.workspace.step, COMPILING)
        self.recorder.begin_epoch(epoch)

    def choose_form(self, loader: Loader) -> None:
        """Chooses how many steps are one program, where that is to be measured."""
        here, tunes = self.workspace, self._options.tune_process
        self.recorder.fuse(
            calibrate(
                self.dispatcher, here.ready_state(), here.feeds, loader, self.path, remember=tunes
            )
        )

    def training_chunks(self, loader: Loader) -> Generator[Chunk]:
        """Returns the chunks of one epoch, or the rest of it, to be closed.

        The loader then stands where they end.
        """
        progress = self.state.in_epoch
        if progress.is_trained:
            return (chunk for chunk in ())
        without = skipped_batches(self.state.skipped, progress.epoch)
        return self.workspace.feeds.of(loader, name="train").epoch(
            self.dispatcher.chunk_size,
            self.plan.steps_per_epoch,
            keep_place=True,
            done=num_drawn(progress.steps, without),
            without=without,
            repeat=self.plan.repeat,
        )

    def fetched(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields chunks, and counts the time to get them."""
        return self.timers.fetched(page_faults.watched(chunks, self._options.tune_process))

    def around_epoch(self) -> AbstractContextManager[ChunkScope]:
        """Returns the context of an epoch's steps; its value returns that of each chunk."""
        watchers = self.callbacks.chunk_watchers
        if not watchers:
            return nullcontext(nullcontext)
        return around_epoch(watchers, self.path and self.path.absolute(), self.timers)

    def pause(self, event: Pause) -> None:
        """Saves the run within an epoch, and ends it if that was asked for.

        Raises:
            BadNumbers: a step is bad.
            BatchError: a batch has a value out of range.
            Interrupted: the run was asked to end.
        """
        self.reject(event)
        self.recorder.update(in_epoch=self.state.in_epoch._replace(rows=event.rows))
        self.checkpointer.save(self.checkpointer.facts({}, None))
        self.supervisor.raise_if_interrupted()

    def reject(self, event: WindowEnd | Pause) -> None:
        """Raises if a step is bad or a batch out of range.

        Raises:
            BadNumbers: a step is bad.
            BatchError: a batch has a value out of range, under `on_bad_input="raise"`.
        """
        here, bad, breach = self.workspace, event.bad, event.breach
        if breach is not None and (bad is None or breach.batch < bad.step):
            step = breach.batch + 1
            batch = self.recorder.batch_of(BadStep(step, is_spike=False)) + 1
            place = f"batch {batch} of epoch {here.epoch} of the train loader (step {step})"
            report_breach(breach, place, "train", here.told, self._options)
        if bad is not None:
            is_seen = bad.is_spike or here.ready_state().guard is None
            raise BadNumbers("The loss" if is_seen else "The loss or the state", bad)

    def end_steps(self) -> dict[str, Any]:
        """Ends the steps of an epoch; returns their metrics as `train/...`.

        Raises:
            NonFiniteError: all of its batches were left out.
        """
        here, state = self.workspace, self.workspace.ready_state()
        if may_have_rest(state):  # a window of accumulation ends with an update
            here.state = here.with_rest(state)
        self.recovery.raise_if_nothing_is_left()
        return self.recorder.end_steps()

    def is_validation_due(self, epoch: int) -> bool:
        """Whether the run validates and saves after an epoch."""
        plan = self.plan
        is_last = epoch == plan.last_epoch or self.is_stopped
        return is_last or epoch % plan.check_val_every_n_epoch == 0

    def trained(self, metrics: Any) -> dict[str, Any]:
        """Keeps the books of an epoch that was trained, by the loop or by the user's own.

        From here on the run can be saved as it is now, while it is validated.

        Raises:
            LossError: it gave no metrics by name.
        """
        check_metrics(metrics, "train_epoch")
        here, progress = self.workspace, self.state.in_epoch
        if not self.recorder.has_observed and not progress.is_trained:
            step = int(here.ready_state().step)
            progress = progress._replace(steps=progress.steps + step - here.step, is_trained=True)
            here.step = step
            self.recorder.update(step=step, epoch=here.epoch, in_epoch=progress)
        self.checkpointer.boundary = self.checkpointer.facts({}, None)
        return metrics

    def judged(
        self, metrics: Mapping[str, Any], validation: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Returns what a model is judged by; see `Monitor.judged`."""
        return self._monitor.judged(metrics, validation)

    def end_epoch(self, epoch: int, metrics: dict[str, Any], is_best: bool) -> None:
        """Logs and shows a finished epoch."""
        self.recorder.end_epoch(epoch, metrics, is_best)

    def rank(self, metrics: Mapping[str, Any], is_best: bool, better: Better) -> None:
        """Takes the model just validated among the best ones, if it is one of them."""
        self.checkpointer.rank(metrics, is_best, better)

    def finish_epoch(self, epoch: int) -> None:
        """Turns to the next epoch."""
        self.recorder.update(in_epoch=EpochProgress(epoch + 1))

    def end_early(self, interrupted: Interrupted) -> None:
        """Saves what is not saved yet of a run that ends before its time."""
        if self.checkpointer.boundary is not None:
            self.checkpointer.save(self.checkpointer.boundary)
        self.checkpointer.settle()
        self.recorder.update(interrupted_by=str(interrupted))
        again = "start it again to go on" if self.path else "nothing is kept of it"
        for remark in Report(self.timers.read()).remarks():
            self.recorder.show(remark)
        self.recorder.show(f"interrupted by {interrupted} at step {self.workspace.step}: {again}")

    def tell_end(self, error: BaseException | None = None) -> None:
        """Tells callbacks how the run has ended; see `Callbacks.end`."""
        result = self.recorder.result()
        status, reason = result.status, result.reason
        if error is not None:
            facts = ending(error)
            status, reason = facts["status"], facts["reason"]
        info = self.recorder.info(self.state.last_metrics)
        self.callbacks.end(info, status, reason, error)


def check_metrics(metrics: Any, method: str) -> None:
    """Checks that a method of the user's class gave metrics by name.

    Raises:
        LossError: it did not.
    """
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        raise LossError(
            f"{method} returns a dict of metrics by name, such as {{'val/loss': 0.1}}; got "
            f"{metrics!r}."
        )
