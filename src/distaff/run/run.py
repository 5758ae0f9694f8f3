"""One call of `train_model`, composed of parts with one task each."""

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
from distaff.data.loader import begin_new_epoch
from distaff.execution import page_faults
from distaff.execution.dispatch.calibration import calibrate
from distaff.execution.dispatch.dispatcher import Dispatcher, DispatchOptions
from distaff.execution.dispatch.packed_metrics import BadStep, WindowEnd
from distaff.execution.feed.chunk import Chunk
from distaff.execution.feed.skipped import num_drawn, skipped_batches
from distaff.loggers import ManyLoggers
from distaff.metrics.monitor import Monitor
from distaff.run.checkpointer import Checkpointer
from distaff.run.directory.recording import RecordingOptions
from distaff.run.events import BadNumbers, Interrupted, Pause, Plan
from distaff.run.identity.ending import ending
from distaff.run.learning import LearningWatch
from distaff.run.ranking import Better
from distaff.run.recorder import Recorder
from distaff.run.recovery import Recovery
from distaff.run.report import Report, faster_data
from distaff.run.result import Best
from distaff.run.run_state import EpochProgress, RunState
from distaff.run.sanity import check_metrics, report_breach
from distaff.run.supervision.interruption import SupervisionOptions
from distaff.run.supervision.supervisor import Supervisor, Verdict
from distaff.run.supervision.timetable import Timetable, check_not_within
from distaff.run.supervision.watchdog import COMPILING
from distaff.run.workspace import Workspace, WorkspaceOptions
from distaff.step.averages import AveragingOptions, is_averaged
from distaff.step.guard import RecoveryOptions
from distaff.step.norms import NormOptions
from distaff.step.remainder import may_have_rest
from distaff.step.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(
    SupervisionOptions,
    InspectionOptions,
    RecoveryOptions,
    NormOptions,
    AveragingOptions,
    DispatchOptions,
    RecordingOptions,
    WorkspaceOptions,
):
    """The options of a trainer that a run reads."""


class Run:
    """One training run: its parts, and the methods that the loop calls.

    Args:
        workspace: the trainer's workspace.
        plan: the loaders and epochs.
        options: the trainer's options.
        callbacks: called at the events of the run.
        monitor: the metric that ranks models.
        owner: name of the user's class, for the reason of a stop.

    Attributes:
        interruptible: ends an evaluation early if the run is interrupted; see `Supervisor`.
        timers: count the seconds of the run.
        timetable: when to validate and save.
        validate: validates within an epoch; set by the loop.
        verdict: returns what to do after a chunk of steps; see `Supervisor.verdict`.
    """

    validate: Callable[[int, dict[str, Any]], None]
    verdict: Callable[[], Verdict]

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
        self.monitor, self._options, self._owner = monitor, options, owner
        callbacks.stop_reason = None
        self.timetable = Timetable(plan, options.saving)
        workspace.evaluation_watch.expect()
        workspace.feeds.validate_on(plan.val_loaders.values(), plan.train_loader)
        self.recorder = Recorder(workspace, plan, options, callbacks)
        self.supervisor = Supervisor(options, callbacks, is_watched=not options.debug)
        self.checkpointer = Checkpointer(self.recorder, self.supervisor, options)
        self.recovery = Recovery(self.recorder, self.checkpointer, self.supervisor, options)
        self.recovery.check()
        self._learning = LearningWatch(workspace, monitor, callbacks, plan.num_epochs)
        workspace.feeds.make_room(2 + len(plan.val_loaders))
        self.timers = self.recorder.timers
        self.interruptible = partial(self.supervisor.interruptible, self.checkpointer)
        self.verdict = self._verdict_within if self.timetable.within else self.supervisor.verdict

    @property
    def state(self) -> RunState:
        """The progress of the run, as one immutable value."""
        return self.recorder.state

    @property
    def dispatcher(self) -> Dispatcher:
        """Runs the steps."""
        return self.recorder.dispatcher

    @property
    def report(self) -> Report | None:
        """The speed of the run; None until it has finished."""
        return self.recorder.report

    @property
    def forms(self) -> Any:
        """The number of steps per call, and how it was chosen."""
        return self.dispatcher.forms

    @property
    def logger(self) -> ManyLoggers:
        """The loggers of the run, for values that your class logs itself."""
        return self.recorder.recording.logger

    @property
    def path(self) -> Path | None:
        """The run directory; None if nothing is written."""
        return self.recorder.recording.path

    @property
    def best_models(self) -> tuple[Best, ...]:
        """The best models, best first, each with a checkpoint."""
        return self.state.best_models

    @property
    def best_metrics(self) -> dict[str, Any] | None:
        """Validation metrics of the best model; None before the first."""
        return None if self.state.best is None else self.state.best.metrics

    @property
    def is_stopped(self) -> bool:
        """Whether a callback or hook has stopped the run."""
        return self.callbacks.stop_reason is not None

    def resume_or_begin(self) -> None:
        """Restores the position of a resumed run, or saves the initial state of a new one."""
        self._show_origin()
        saved = self.checkpointer.resume()
        self.timetable.check_counts(self.state)
        if self.recorder.recording.found is None:
            self.recovery.save_origin()
        if saved is not None:
            self.recorder.emit("on_checkpoint", saved)

    def _show_origin(self) -> None:
        """Shows where the weights of a new run come from.

        Raises:
            DistaffError: the weights could not be loaded.
        """
        workspace = self.workspace
        not_loaded, workspace.not_loaded = workspace.not_loaded, None
        if self.recorder.recording.found is None and not workspace.step:
            if not_loaded is not None:
                raise not_loaded
            if workspace.origin:
                self.recorder.show(workspace.origin)

    def next_epoch(self) -> int | None:
        """Returns the next epoch to train; None at the end of the run."""
        progress = self.state.in_epoch
        is_left = self.is_stopped and not (progress.is_trained or progress.is_validated)
        return None if is_left or self.timetable.is_over(self.state) else progress.epoch

    def call(self, hook: Callable[..., None], *arguments: Any) -> None:
        """Calls a hook of the user's class; like a callback, it may raise `StopTraining`."""
        try:
            hook(*arguments)
        except StopTraining as stop:
            self.callbacks.stop(stop, self._owner)
        self.supervisor.agree_on_stop()

    def emit(
        self, event: str, metrics: Mapping[str, Any] | None = None, *, is_best: bool = False
    ) -> None:
        """Calls the callbacks of an event."""
        self.recorder.emit(event, self.recorder.info(metrics or {}, is_best))
        self.supervisor.agree_on_stop()

    def begin_epoch(self, epoch: int) -> None:
        """Begins or resumes an epoch."""
        self.checkpointer.boundary = None
        self.supervisor.beat("the first step of an epoch", self.workspace.step, COMPILING)
        self.recorder.begin_epoch(epoch)
        if self.timetable.is_due_within(self.state):  # it was interrupted
            self._validate_within()

    def choose_steps_per_call(self, loader: Loader) -> None:
        """Chooses the number of steps per call, by measuring if configured."""
        state, feeds = self.workspace.ready_state(), self.workspace.feeds
        remember = self._options.tune_process
        choice = calibrate(self.dispatcher, state, feeds, loader, self.path, remember=remember)
        self.recorder.fuse(choice)

    def training_chunks(self, loader: Loader) -> Generator[Chunk]:
        """Returns the remaining chunks of the epoch; close it to put the loader at their end."""
        progress = self.state.in_epoch
        if progress.is_trained or self.is_stopped or self.timetable.is_spent(self.state):
            return (chunk for chunk in ())
        if self.plan.abandons and progress.epoch == self.plan.first_epoch and not progress.steps:
            begin_new_epoch(loader)
        skipped = skipped_batches(self.state.skipped, progress.epoch)
        return self.workspace.feeds.of(loader, name="train").epoch(
            self.dispatcher.chunk_size,
            self.plan.steps_of(progress.epoch),
            keep_place=True,
            done=num_drawn(progress.steps, skipped),
            without=skipped,
            repeat=self.plan.repeat,
            room=self.timetable.room(self.state),
        )

    def placed_state(self) -> TrainState:
        """Returns the current state, on the devices of the steps."""
        return self.dispatcher.placement.state(self.workspace.ready_state())

    def fetched(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields chunks, and times how long they take to fetch."""
        return self.timers.fetched(page_faults.watched(chunks, self._options.tune_process))

    def around_epoch(self) -> AbstractContextManager[ChunkScope]:
        """Returns a context for the steps of an epoch; its value makes the context of a chunk."""
        watchers = self.callbacks.chunk_watchers
        if not watchers:
            return nullcontext(nullcontext)
        return around_epoch(watchers, self.path and self.path.absolute(), self.timers)

    def pause(self, event: Pause) -> None:
        """Validates within an epoch if due, saves the run, and raises if it was interrupted.

        Raises:
            BadNumbers: a step is bad.
            BatchError: a batch has a value out of range, under `on_bad_input="raise"`.
            Interrupted: the run was interrupted.
        """
        self.reject(event)
        self.recorder.update(in_epoch=self.state.in_epoch._replace(rows=event.rows))
        is_requested = self.supervisor.is_save_requested
        self._validate_within()
        if is_requested:
            self.recorder.show(f"saved at step {event.step}, as requested")
        self.supervisor.raise_if_interrupted()

    def _verdict_within(self) -> Verdict:
        """Returns what to do after a chunk if the run validates, saves or ends within epochs."""
        verdict = Verdict.STOP if self.timetable.is_spent(self.state) else self.supervisor.verdict()
        is_due = verdict is Verdict.CONTINUE and self.timetable.is_pause_due(self.state)
        return Verdict.SAVE if is_due else verdict

    def _validate_within(self) -> None:
        """Validates within an epoch if due, and saves the run; if interrupted, it validates again.

        Raises:
            Interrupted: the run was interrupted during the validation.
        """
        checkpointer, progress = self.checkpointer, self.state.in_epoch
        checkpointer.boundary = checkpointer.facts({}, None)
        if self.timetable.is_due_within(self.state):
            self.recorder.update(in_epoch=progress._replace(validated=progress.steps))
            self.validate(progress.epoch, {})
        if checkpointer.boundary is not None:  # not saved by `save_model`
            checkpointer.save(checkpointer.boundary)

    def reject(self, event: WindowEnd | Pause) -> None:
        """Raises if a step is bad, or a batch has a value out of range.

        Raises:
            BadNumbers: a step is bad.
            BatchError: a batch has a value out of range, under `on_bad_input="raise"`.
        """
        workspace, bad, breach = self.workspace, event.bad, event.breach
        if breach is not None and (bad is None or breach.batch < bad.step):
            step = breach.batch + 1
            batch = self.recorder.batch_of(BadStep(step, is_spike=False)) + 1
            place = f"batch {batch} of epoch {workspace.epoch} of the train loader (step {step})"
            report_breach(breach, place, "train", workspace.warned, self._options)
        if bad is not None:
            is_seen = bad.is_spike or workspace.ready_state().guard is None
            raise BadNumbers("The loss" if is_seen else "The loss or the state", bad)

    def end_steps(self) -> dict[str, Any]:
        """Ends the steps of an epoch; returns their metrics as `train/...`.

        Raises:
            NonFiniteError: all batches of the epoch were skipped.
        """
        workspace, state = self.workspace, self.workspace.ready_state()
        if may_have_rest(state):  # apply the gradients accumulated so far
            workspace.state = workspace.with_rest(state)
            self._forget_validation()
        self.recovery.raise_if_all_skipped()
        return self.recorder.end_steps()

    def _forget_validation(self) -> None:
        """Notes that the state has changed since a validation within the epoch."""
        self.recorder.update(in_epoch=self.state.in_epoch._replace(validated=None))

    def evaluate(self, eval_model: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """Returns the metrics of all validation loaders, and of averages of the weights."""
        validation: dict[str, Any] = {}
        for name, loader in self.plan.val_loaders.items():
            for prefix, weights in self._options.evaluations(name):
                metrics = eval_model(loader, f"{prefix}/", **weights)
                check_metrics(metrics, "eval_model")
                validation.update(metrics)
        return validation

    @property
    def is_validation_due(self) -> bool:
        """Whether the run validates and saves at the end of this epoch."""
        return self.timetable.is_due_after(self.state, is_stopped=self.is_stopped)

    def record_epoch(self, metrics: Any) -> dict[str, Any]:
        """Records a trained epoch, also if your own `train_epoch` made its steps.

        If the run is interrupted during validation, this point is saved.

        Raises:
            LossError: `metrics` is not a dict of metrics by name.
            ConfigError: your own `train_epoch` makes its steps, and the run validates within it.
        """
        check_metrics(metrics, "train_epoch")
        workspace, progress = self.workspace, self.state.in_epoch
        if not self.recorder.has_observed and not progress.is_trained:
            check_not_within(self.timetable.within, self._owner)
            step = int(workspace.ready_state().step)
            steps = progress.steps + step - workspace.step
            progress = progress._replace(steps=steps, is_trained=True)
            workspace.step = step
            self.recorder.update(step=step, epoch=workspace.epoch, in_epoch=progress)
        if is_averaged(self._options, workspace.epoch):
            workspace.state = workspace.with_epoch(workspace.ready_state())
            self._forget_validation()
        facts = self.checkpointer.boundary = self.checkpointer.facts({}, None)
        is_due = self.timetable.is_save_due("epochs", workspace.epoch)
        if is_due and not self.is_validation_due:
            self.checkpointer.save(facts)
        return metrics

    def rank(self, judged: Mapping[str, Any], is_best: bool, better: Better) -> None:
        """Ranks the model just validated; its optimizer may lower the learning rate.

        Args:
            judged: its metrics.
            is_best: whether it is the best model so far.
            better: compares the metrics of two models.

        Raises:
            MetricError: the optimizer needs the monitored metric, and it is missing.
        """
        self.checkpointer.rank(judged, is_best, better)
        self._learning.validated(judged, self.state.last_metrics)

    def finish_epoch(self, epoch: int) -> None:
        """Moves the run to the next epoch."""
        self.recorder.update(in_epoch=EpochProgress(epoch + 1))

    def end_early(self, interrupted: Interrupted) -> None:
        """Saves an interrupted run if it is not saved yet, and shows how to resume it."""
        if self.checkpointer.boundary is not None:
            self.checkpointer.save(self.checkpointer.boundary)
        self.checkpointer.settle()
        self.recorder.update(interrupted_by=str(interrupted))
        remedy = "Run the same command again to resume." if self.path else "Nothing was saved."
        advice, slow = faster_data(self.plan.train_loader), self.recorder.step_times.slow
        for remark in Report(self.timers.read(), advice=advice, slow=slow).remarks():
            self.recorder.show(remark)
        self.recorder.show(f"interrupted by {interrupted} at step {self.workspace.step}. {remedy}")

    def end_callbacks(self, error: BaseException | None = None) -> None:
        """Calls the callbacks at the end of the run; see `Callbacks.end`."""
        result = self.recorder.result()
        status, reason = result.status, result.reason
        if error is not None:
            facts = ending(error)
            status, reason = facts["status"], facts["reason"]
        info = self.recorder.info(self.state.last_metrics)
        self.callbacks.end(info, status, reason, error)
