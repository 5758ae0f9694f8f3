"""Recorder: tracks the progress of a run, and updates display, loggers and callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from distaff.callbacks import StepInfo
from distaff.callbacks.callbacks import Callbacks
from distaff.core.config.cadence import Count, Unit
from distaff.errors import MetricError
from distaff.execution.dispatch.dispatcher import Dispatcher
from distaff.execution.dispatch.packed_metrics import BadStep, WindowEnd
from distaff.execution.dispatch.steps_per_call import FusionChoice
from distaff.execution.feed.skipped import num_drawn, skipped_batches
from distaff.execution.peak_flops import peak_flops_of_all
from distaff.execution.placement import num_devices
from distaff.execution.step_times import StepTimes
from distaff.execution.timers import Timers
from distaff.loggers.history import History
from distaff.metrics import Metric, as_json, compute, results
from distaff.metrics.accumulators import Named
from distaff.run.directory.curves import run_title, save_curves
from distaff.run.directory.protocol import Recording
from distaff.run.display import rows_by_split
from distaff.run.display.lines import EpochLine
from distaff.run.events import ChunkEnd, Plan
from distaff.run.learning import LearningCheck
from distaff.run.report import Report, faster_data, make_report
from distaff.run.result import TrainResult
from distaff.run.run_state import EpochProgress, RunState, best_json
from distaff.run.workspace import Workspace
from distaff.step.guard import FLAGS, Flags, RecoveryOptions, shown
from distaff.step.logged_rates import host_rates, without_rates
from distaff.step.norms import is_norm

_log = logging.getLogger("distaff")

_PROGRESS_SECONDS = 0.1
"""Least time between two updates of the steps shown, or of the metrics shown."""

_LAP_SECONDS = 10.0
"""Least time between two lines of `throughput.jsonl`."""


class Recorder:
    """Records the progress of a run, and reports it.

    Args:
        workspace: the trainer's workspace.
        plan: the loaders and epochs.
        options: the policies for bad steps, which determine the metrics shown.
        callbacks: called at the events of the run.

    Attributes:
        state: the progress of the run, as one immutable value.
        record: everything that determines the run, as strict JSON.
        report: the speed of the run; None until it has finished.
        step_times: notices slow steps.
        has_observed: whether a chunk of this epoch was recorded.
        updates_per_step: optimizer updates per step.
        has_begun: whether the files of the run can be written and read.
    """

    record: dict[str, Any]

    def __init__(
        self, workspace: Workspace, plan: Plan, options: RecoveryOptions, callbacks: Callbacks
    ) -> None:
        self.workspace, self.plan, self.callbacks = workspace, plan, callbacks
        self.display, self.timers = workspace.display, Timers()
        workspace.capacity, workspace.timers = 1, self.timers
        self.step_times = StepTimes(self.timers)
        self.state = RunState.beginning(workspace.step, workspace.epoch)
        self.report: Report | None = None
        self.updates_per_step, self.has_begun, self.has_observed = 1, False, False
        self._dispatcher: Dispatcher | None = None
        self._options, self._rates, self._epoch_start = options, None, time.perf_counter()
        self._check_learning: LearningCheck | None = None
        self._num_shown, self._has_legend, self._places = 0, False, dict[str, Any]()
        self._is_timed = plan.limit is not None and plan.limit.unit == "seconds"
        self._counted_at = self.timers.since
        self._progress_due_at = self._metrics_due_at = -math.inf

    @property
    def recording(self) -> Recording:
        """The directory and the loggers of the run."""
        return self.workspace.recording

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher, which runs the steps; set once the run is prepared."""
        assert self._dispatcher is not None
        return self._dispatcher

    @dispatcher.setter
    def dispatcher(self, dispatcher: Dispatcher) -> None:
        dispatcher.timers, self._dispatcher = self.timers, dispatcher
        self.fuse(dispatcher.forms)

    def fuse(self, forms: FusionChoice) -> None:
        """Sets the number of training steps, and of evaluation batches, per call."""
        self.dispatcher.forms, self.workspace.capacity = forms, forms.capacity
        self.fusion = forms.facts()

    def update(self, **changes: Any) -> None:
        """Replaces fields of `state`."""
        self.state = self.state._replace(**changes)

    def info(self, metrics: Mapping[str, Any], is_best: bool = False) -> StepInfo:
        """Returns the argument of a callback's event."""
        workspace = self.workspace
        state, places = workspace.ready_state(), self._found_places()
        return StepInfo(workspace.step, workspace.epoch, state, metrics, is_best, **places)

    def _found_places(self) -> dict[str, Any]:
        """Returns the logger and the directory of the run, for callbacks."""
        return {"logger": self.recording.logger, "path": self.recording.path}

    def emit(self, event: str, info: StepInfo) -> None:
        """Calls the callbacks of an event, and times them."""
        with self.timers.spent("callbacks"):
            self.callbacks.emit(event, info)

    def show(self, line: str) -> None:
        """Shows a line, and writes it to the run's log file."""
        self.workspace.show(line)

    def begin(self) -> None:
        """Starts the display."""
        self.display.start(self.plan.last_epoch, self.plan.epoch_length)
        self.display.compiling("the model")

    def begin_epoch(self, epoch: int) -> None:
        """Begins or resumes an epoch."""
        self.workspace.epoch, self.has_observed = epoch, False
        self._places = self._found_places()
        if self.state.in_epoch.epoch != epoch:
            self.update(in_epoch=EpochProgress(epoch))
        self._epoch_start = time.perf_counter()
        if self.workspace.step == self.state.first_step:
            state = self.workspace.ready_state()
            placement = self.dispatcher.placement
            self._check_learning = LearningCheck(placement.fetched(state))
            self._rates = host_rates(state.tx, state.params, self.workspace.schedule)
            if line := placement.describe(self.workspace.example_batch):
                self.show(line)
            self.display.compiling("the step")

    def observe(self, event: ChunkEnd) -> None:
        """Records a chunk of steps; updates the display and calls callbacks."""
        state, epoch, store = self.state, self.workspace.epoch, self.recording.store
        self.has_observed = True
        if self.workspace.step == state.first_step:
            self.display.running()
            self.show(self.timers.read().compiled())
            _log.info("%s", self.dispatcher.forms.describe())
        self.workspace.state, self.workspace.step = event.state, event.step
        in_epoch = state.in_epoch._replace(steps=state.in_epoch.steps + event.num_steps)
        counts = {**event.counts, **self._seconds()} if self._is_timed else event.counts
        self.state = state._replace(step=event.step, epoch=epoch, in_epoch=in_epoch, counts=counts)
        if store.failures:
            store.check_failure()
        self.timers.count(event.num_steps, event.examples)
        if self.timers.since >= self._progress_due_at:
            self._show_progress()
        if self.timers.since >= self.step_times.due_at:
            self._measure_steps()
        if event.metrics:
            self._show_steps(event, epoch)

    def _seconds(self) -> dict[Unit, Count]:
        """Returns the seconds of the run, over all processes that trained it."""
        before, since = self.state.counts.get("seconds", Count(0, 0)).now, self._counted_at
        self._counted_at = self.timers.since
        return {"seconds": Count(before, before + self._counted_at - since)}

    def _show_progress(self) -> None:
        examples = self.timers.examples
        self.display.advance(self.state.step, self.state.epoch, examples - self._num_shown)
        self._num_shown, self._progress_due_at = examples, self.timers.since + _PROGRESS_SECONDS

    def _measure_steps(self) -> None:
        if line := self.step_times.measure(self.state.step):
            _log.info("%s", line)

    def _show_steps(self, event: ChunkEnd, epoch: int) -> None:
        for step, metrics in enumerate(event.metrics, event.step - event.num_steps + 1):
            state = event.state if step == event.step else None
            seen = {n: x for n, x in results(metrics).items() if not isinstance(x, Flags)}
            self.emit("on_step_end", StepInfo(step, epoch, state, seen, **self._places))

    def window(self, event: WindowEnd) -> None:
        """Logs the metrics of a window as `step/...`."""
        with self.timers.spent("logging"):
            if event.skipped:
                self.update(num_skipped=self.state.num_skipped + len(event.skipped))
                self.show(f"skipped bad steps: {', '.join(map(str, event.skipped))}")
            if self._check_learning is not None:
                self._check_that_it_learns(self._check_learning)
            self.update(in_epoch=self.state.in_epoch.with_window(event))
            self._log_window(event)

    def _check_that_it_learns(self, check: LearningCheck) -> None:
        state = self.state
        num_steps = self.workspace.step - state.first_step - state.num_skipped
        if check(self.dispatcher.placement.fetched(self.workspace.ready_state()), num_steps):
            self._check_learning = None

    def _log_window(self, event: WindowEnd) -> None:
        state = self.state
        metrics = compute(self._shown(event.metrics), "step/")
        if self._rates is not None:
            updates = max(1, event.step - state.begun_at[0] - state.num_skipped)
            applied = self._rates(updates * self.updates_per_step - 1)
            metrics = {**metrics, **{f"step/{name}": rate for name, rate in applied.items()}}
        if self.timers.since >= self._metrics_due_at:
            self.display.update({n: v for n, v in metrics.items() if np.ndim(v) == 0})
            self._metrics_due_at = self.timers.since + _PROGRESS_SECONDS
        self.recording.logger.log_metrics(metrics, step=event.step, epoch=self.workspace.epoch)
        self.log_throughput(_LAP_SECONDS)

    def end_steps(self) -> dict[str, Any]:
        """Ends the steps of an epoch; returns their metrics as `train/...`."""
        self._show_progress()
        self.update(in_epoch=self.state.in_epoch._replace(rows=None, is_trained=True))
        metrics = without_rates(self.state.in_epoch.total or {})
        return compute(self._shown(metrics), "train/")

    def _shown(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        return shown(metrics, self._options) if FLAGS in metrics else metrics

    def end_epoch(self, epoch: int, metrics: dict[str, Any], is_best: bool) -> None:
        """Logs the metrics of an epoch and its validation, and shows them as one line.

        Within an epoch, there are only metrics of the validation.
        """
        step, last = self.workspace.step, self.plan.last_epoch
        before = {} if self.state.in_epoch.is_trained else self.state.last_metrics
        self.update(last_metrics={**before, **metrics})
        counts = {unit: count.now for unit, count in self.state.counts.items()}
        self.recording.logger.log_metrics({**metrics, **counts}, step=step, epoch=epoch)
        seconds = time.perf_counter() - self._epoch_start
        scalars = {name: value for name, value in metrics.items() if np.ndim(value) == 0}
        values = " ".join(f"{name} {value:.6g}" for name, value in scalars.items())
        total = "" if last is None else f"/{last}"
        _log.info("epoch %d%s step %d %s", epoch, total, step, values)
        short = {name: value for name, value in scalars.items() if not is_norm(name)}
        self.display.epoch_line(EpochLine(epoch, last, step, short, seconds, is_best))
        if is_best and not self._has_legend:
            self._has_legend = True
            self.display.print("* best model so far")

    def log_throughput(self, seconds: float = 0.0) -> None:
        """Logs the throughput since the last line, if that is at least `seconds` old."""
        lap = self.timers.lap(seconds)
        if lap is not None:
            state = self.state
            line = Report(lap).line()
            self.recording.throughput.log_metrics(line, step=state.step, epoch=state.epoch)

    def batch_of(self, bad: BadStep) -> int:
        """Returns the index in the epoch, from 0, of the batch of a bad step."""
        step_of_epoch = bad.step - (self.workspace.step - self.state.in_epoch.steps)
        skipped = skipped_batches(self.state.skipped, self.workspace.epoch)
        return num_drawn(step_of_epoch, skipped) - 1

    def show_result(self, metrics: Mapping[str, Any], *, measures: bool) -> None:
        """Shows a table of the metrics of a finished run by split, and its speed.

        Args:
            metrics: the run's metrics.
            measures: whether the machine's peak FLOPs may be measured.
        """
        state = self.state
        titles = {"train": f"train, epoch {state.epoch}", "test": "test"}
        if state.best is not None:
            titles = {**titles, "val": f"val, epoch {state.best.epoch} (best)"}
        self.display.table(rows_by_split(metrics, titles))
        number = num_devices(self.dispatcher.blank.rows)

        def measure_peak(again: bool) -> float | None:
            return peak_flops_of_all(number, again) if measures else None

        report = make_report(self.timers.read(), self.dispatcher.flops, measure_peak)
        advice = faster_data(self.plan.train_loader)
        self.report = report._replace(advice=advice, slow=self.step_times.slow)
        self.log_throughput()
        for line in self.report.lines():
            self.show(line)
        if state.step == state.first_step:
            self.show(_nothing_left(state))

    def result(self) -> TrainResult:
        """Returns the result of a run that has ended."""
        state, stop = self.state, self.callbacks.stop_reason
        status = self.callbacks.stop_status if stop else "finished"
        is_empty = self.recording.found is not None and state.step == state.first_step
        nothing = _nothing_left(state) if is_empty else ""
        return TrainResult(
            status="interrupted" if state.interrupted_by else status,
            reason=state.interrupted_by or stop or nothing,
            step=state.step,
            epoch=state.epoch,
            metrics=Named(state.last_metrics),
            best=state.best,
            path=self.recording.path,
            first_step=state.first_step,
            history=self._history(),
        )

    def _history(self) -> History:
        best = self.state.best
        title = run_title(self.record, self.recording.path, self.plan)
        return self.recording.history(title, best and best.epoch)

    @contextmanager
    def drawing(self, enabled: bool) -> Generator[None]:
        """Draws the learning curves into the run directory at exit; a failure is a warning."""
        try:
            yield
        finally:
            if enabled and self.recording.path is not None:
                save_curves(self._history(), self.recording.path)

    def outcome(self) -> dict[str, Any]:
        """Returns the result as strict JSON, for the run's status file."""
        facts = self.result()._asdict()
        del facts["path"], facts["first_step"], facts["history"]
        with suppress(MetricError):  # this error has ended the run
            facts["metrics"] = as_json(self.state.last_metrics)
        best = None if self.state.best is None else best_json(self.state.best)
        report = self.report or Report(self.timers.read(), slow=self.step_times.slow)
        throughput, fusion = report.facts(), self.fusion
        return {**facts, "best": best, "steps_per_call": fusion, "throughput": throughput}


def _nothing_left(state: RunState) -> str:
    return f"nothing was left to train after step {state.first_step}"
