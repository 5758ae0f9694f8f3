"""Training: where a run stands, and who is told of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
)
from typing import Any

import numpy as np

from distaff.callbacks import (
    Callback,
    Callbacks,
    ChunkScope,
    StepInfo,
    around_epoch,
)
from distaff.checkpoint.record import make_record
from distaff.core.typing import Batch, Schedule
from distaff.data import Loader, as_loader, first_to_train, num_batches, num_shapes
from distaff.errors import StateError
from distaff.execution.compile.recompiles import Watch
from distaff.execution.devices import check_one_process, idle_devices
from distaff.execution.dispatch.dispatcher import Steps
from distaff.execution.dispatch.packed_metrics import BadStep, WindowEnd
from distaff.execution.dispatch.steps_per_call import Choice, fixed
from distaff.execution.feed.chunk import Chunk, Form
from distaff.execution.feed.padding import MayPad
from distaff.execution.feed.skipped import Stretch, left_out, num_drawn
from distaff.execution.peak_flops import peak_flops
from distaff.execution.timers import Ledger
from distaff.loggers import Logger
from distaff.loggers.given import as_loggers
from distaff.metrics import compute, results
from distaff.metrics.limits import Breach
from distaff.metrics.monitor import Monitor, as_monitor
from distaff.optim import OptimizerLike
from distaff.optim.given import as_optimizer
from distaff.run.directory.recording import make_recording
from distaff.run.display import rows_by_split
from distaff.run.events import BadNumbers, ChunkEnd, Interrupted, Plan
from distaff.run.learning import LearningCheck
from distaff.run.recorder import NullRecording, Recording
from distaff.run.report import Report, make_report
from distaff.run.result import Best
from distaff.run.supervision.interruption import Interruption
from distaff.run.supervision.watchdog import COMPILING, Watchdog
from distaff.run.tally import Tally
from distaff.step.guard import Flags, shown
from distaff.step.logged_rates import host_rates
from distaff.step.remainder import may_have_rest, with_rest
from distaff.trainer.constructor import constructed
from distaff.trainer.predictor import Predictor

_log = logging.getLogger("distaff")

_LAP_SECONDS = 10.0
"""How much time there is at least between two lines of `throughput.jsonl`."""


class Training(Predictor):
    """A model in training: its step, epoch and best result, its display, loggers and callbacks.

    Args:
        model: an unbound `flax.linen.Module`.
        optimizer: an `OptimizerConfig`, an Optax transformation, or a function of the total number
            of steps that returns one.
        loggers: a list of your own loggers, alongside the run directory's.
        callbacks: a list of code of your own at the six events of a run.
        **options: see `TrainerConfig`.
    """

    monitor: Monitor = Monitor("val/loss")
    example_batch: Batch
    plan: Plan
    run_record: dict[str, Any]
    first_step: int
    unsaved: dict[str, Any] | None
    last_save: int | None
    interrupted_by: str
    _updates_per_step: int = 1
    _steps_per_epoch: int | None = None
    _steps: Steps

    def __init__(
        self,
        model: Any,
        *,
        optimizer: OptimizerLike | None = None,
        loggers: Sequence[Logger] | None = (),
        callbacks: Iterable[Callback] | None = (),
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.optimizer: OptimizerLike = as_optimizer(optimizer)
        self.loggers, self.callbacks = as_loggers(loggers), Callbacks(callbacks)
        self.monitor = as_monitor(self.monitor)
        self.recording: Recording = NullRecording()
        self.best_models: tuple[Best, ...] = ()
        self.schedule: Schedule | None = None
        self.last_metrics: dict[str, Any] = {}
        self.has_run = False
        self.forms: Choice = fixed(1)
        self.ledger = Ledger()
        self._with_rest = self.execution.program(lambda state: with_rest(state), donate=0)
        self.evaluation_watch = self.make_watch()
        self.report: Report | None = None
        self.interruption, self.tally, self.unsaved = Interruption(), Tally(), None
        self.begun_at, self.interrupted_by = (0, 0), ""
        self.left_out: list[Stretch] = []
        self.num_skipped, self.watchdog = 0, Watchdog(None)

    def init_logger(self) -> Recording:
        """Returns where metrics, checkpoints and configuration go; nothing is written yet."""
        name = self.config.name or type(self).__name__.lower()
        # What a trainer that has trained already does next needs no run to be there.
        resume = self.config.resume
        if self.step and resume != "never":
            resume = "auto"
        return make_recording(self.config, name, self.loggers, resume=resume)

    @property
    def stop_reason(self) -> str | None:
        """Why a callback wants the run to end; None while none does."""
        return self.callbacks.stop_reason

    @property
    def best(self) -> Best | None:
        """The best model so far; None before the first."""
        return self.best_models[0] if self.best_models else None

    @property
    def best_metrics(self) -> dict[str, Any] | None:
        """Validation metrics of the best model; None before the first."""
        return None if self.best is None else self.best.metrics

    def info(self, metrics: Mapping[str, Any], is_best: bool = False) -> StepInfo:
        """Returns what callbacks are told."""
        return StepInfo(self.step, self.epoch, self.ready_state(), metrics, is_best)

    def record(self, **arguments: Any) -> dict[str, Any]:
        """Returns what determines this run, as strict JSON."""
        return make_record(
            trainer=type(self),
            model=self.model.record,
            optimizer=self.optimizer,
            monitor=self.monitor,
            options=self.config,
            example_batch=self.example_batch,
            **constructed(self._made_by, self.config),
            **arguments,
        )

    def make_watch(self) -> Watch:
        """Returns what watches the programs of a run, or those of evaluations."""
        recompile = "ignore" if self.config.debug else self.config.recompile
        return Watch(recompile, step=lambda: self.step, say=self.display.print)

    def begin(self, plan: Plan) -> None:
        """Counts a new run."""
        if self.state is None:  # before the display starts a thread, which would have an arena
            self.tune_process(first_to_train(plan.train_loader))
        check_one_process()
        self.evaluation_watch.expect()
        self.feeds.validate_on(plan.val_loaders.values(), plan.train_loader)
        self.plan, self.first_step, self.reached = plan, self.step, (self.step, self.epoch)
        self.begun_at, self.unsaved, self.last_save = (self.step, self.epoch), None, None
        self.left_out, self.num_skipped, self.tally = [], 0, Tally(plan.first_epoch)
        self.best_models, self.callbacks.stop_reason, self.last_metrics = (), None, {}
        self.has_run, self.ledger = False, Ledger()
        self._rates, self.report, self.interrupted_by = None, None, ""
        self._check_learning = LearningCheck(None)
        self.display.start(plan.last_epoch, plan.steps_per_epoch or num_batches(plan.train_loader))
        self.display.compiling("the model")

    def check_run(self) -> None:
        """Checks that there is a run, whose files can be written and read.

        Raises:
            StateError: nothing has been trained yet.
        """
        if not self.has_run:
            raise StateError(
                "Checkpoints and metrics are files of a run, and this trainer has trained none "
                "yet. Call train_model first; for the weights of another run, use "
                "load_from_checkpoint."
            )

    def training_chunks(self, loader: Loader) -> Generator[Chunk]:
        """Returns the chunks of one epoch, or the rest of it, to be closed.

        The loader then stands where they end.
        """
        forms, tally = self.forms, self.tally
        if tally.is_trained:
            return (chunk for chunk in ())
        without = left_out(self.left_out, tally.epoch)
        return self.feeds.of(loader, name="train").epoch(
            lambda: forms.form,
            self.plan.steps_per_epoch,
            keep_place=True,
            done=num_drawn(tally.steps, without),
            without=without,
            repeat=self.plan.repeat,
        )

    @contextmanager
    def chunks(self, loader: Any, name: str, *, even: MayPad) -> Generator[Iterator[Chunk]]:
        """Goes once through a loader, in chunks, with its progress shown.

        Args:
            loader: any iterable of batches.
            name: what errors and the display call it.
            even: whether short batches may be padded; see `Feed.repeated`.
        """
        capacity = self.forms.capacity
        with ExitStack() as stack:
            made = as_loader(loader, name=name)
            self.evaluation_watch.expect(loader, num_shapes=num_shapes(made))
            view = stack.enter_context(self.feeds.one_pass(made, name))
            length = num_batches(view)
            # Gathered rows would be a program of its own for each data set.
            feed = self.feeds.of(view, name=name, resident=False)
            total = None if length is None else -(-length // capacity)
            form = Form(capacity, capacity)
            chunks = stack.enter_context(closing(feed.repeated(form, even=even)))
            yield self.tracker(self._unless_interrupted(chunks), description=name, total=total)

    def _unless_interrupted(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        patience = COMPILING
        for chunk in chunks:
            if self.unsaved is not None and self.interruption.agreed():
                raise Interrupted(self.interruption.ending)
            self.watchdog.beat("an evaluation", self.step, patience)
            patience = 1.0
            yield chunk

    def begin_epoch(self, epoch: int) -> None:
        """Counts a new epoch, or goes on with one."""
        self.epoch, self.unsaved = epoch, None
        if self.tally.epoch != epoch:
            self.tally = Tally(epoch)
        self._epoch_start = time.perf_counter()
        self.watchdog.beat("the first step of an epoch", self.step, COMPILING)
        if self.step == self.first_step:
            state = self.ready_state()
            self._check_learning = LearningCheck(state)
            self._rates = host_rates(state.tx, state.params, self.schedule)
            if line := idle_devices(self.example_batch):
                self.show(line)
            self.display.compiling("the step")

    def around_epoch(self) -> AbstractContextManager[ChunkScope]:
        """Returns what an epoch's training runs in; its value gives what each chunk runs in."""
        path, watchers = self.recording.path, self.callbacks.chunk_watchers
        if not watchers:
            return nullcontext(lambda steps: self.execution.guard())
        return around_epoch(watchers, path and path.absolute(), self.execution.guard, self.ledger)

    def after_chunk(self, event: ChunkEnd) -> None:
        """Takes over the new state, and tells display and callbacks."""
        if self.step == self.first_step:
            self.display.running()
            self.show(f"{self.ledger.read().compiled()}; {self.forms.describe()}")
        self.state, self.step = event.state, event.step
        self.tally.steps += event.num_steps
        self.watchdog.beat("a step", event.step)
        self.recording.store.check_failure()
        self.reached = (self.step, self.epoch)
        examples = self.ledger.count(event.num_steps, event.examples)
        self.display.advance(event.step, self.epoch, examples)
        for step, metrics in enumerate(event.metrics, event.step - event.num_steps + 1):
            state = event.state if step == event.step else None
            seen = {n: x for n, x in results(metrics).items() if not isinstance(x, Flags)}
            self.emit("on_step_end", StepInfo(step, self.epoch, state, seen))

    def show(self, line: str) -> None:
        """Shows a line, and writes it into the run's log file."""
        _log.info("%s", line)
        self.display.print(line)

    def emit(self, event: str, info: StepInfo) -> None:
        """Tells callbacks of an event."""
        with self.ledger.spent("callbacks"):
            self.callbacks.emit(event, info)

    def after_window(self, event: WindowEnd) -> None:
        """Logs the metrics of a window as `step/...`.

        Raises:
            BadNumbers: a step in it is not to be trained on.
        """
        with self.ledger.spent("logging"):
            self.judge(event.bad, event.breach)
            if event.skipped:
                self.num_skipped += len(event.skipped)
                self.show(f"left out, as bad steps: {', '.join(map(str, event.skipped))}")
            num_steps = self.step - self.first_step - self.num_skipped
            self._check_learning(self.ready_state(), num_steps)
            self.tally.add(event)
            metrics = compute(shown(event.metrics, self.config), "step/")
            self.display.update({n: v for n, v in metrics.items() if np.ndim(v) == 0})
            if self._rates is not None:
                updates = max(1, event.step - self.begun_at[0] - self.num_skipped)
                rates = {
                    f"step/{n}": rate
                    for n, rate in self._rates(updates * self._updates_per_step - 1).items()
                }
                metrics = {**metrics, **rates}
            self.recording.logger.log_metrics(metrics, step=event.step, epoch=self.epoch)
            self.log_throughput(_LAP_SECONDS)

    def judge(self, bad: BadStep | None, breach: Breach | None = None) -> None:
        """Ends the work on an epoch where a bad step is not to be trained on.

        Raises:
            BadNumbers: there is one.
        """
        if bad is not None:
            is_seen = bad.is_spike or self.ready_state().guard is None
            raise BadNumbers("The loss" if is_seen else "The loss or the state", bad)

    def log_throughput(self, seconds: float = 0.0) -> None:
        """Writes a line of throughput since the last one, if that was this long ago."""
        lap = self.ledger.lap(seconds)
        if lap is not None:
            step, epoch = self.reached  # The best model may be loaded by now.
            self.recording.throughput.log_metrics(Report(lap).line(), step=step, epoch=epoch)

    def end_window(self) -> None:
        """Ends a window of accumulation that the epoch leaves incomplete, with an update."""
        state = self.ready_state()
        if may_have_rest(state):
            self.state = self._with_rest(state)

    def end_epoch(self, epoch: int, metrics: dict[str, Any], is_best: bool) -> None:
        """Logs the metrics of an epoch and its validation, and shows them as one line."""
        self.last_metrics = metrics
        self.recording.logger.log_metrics(metrics, step=self.step, epoch=epoch)
        seconds = time.perf_counter() - self._epoch_start
        shown = {name: value for name, value in metrics.items() if np.ndim(value) == 0}
        values = " ".join(f"{name} {value:.6g}" for name, value in shown.items())
        _log.info("epoch %d/%d step %d %s", epoch, self.plan.last_epoch, self.step, values)
        self.display.epoch_line(epoch, self.plan.last_epoch, self.step, shown, seconds, is_best)

    def show_result(self, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a finished run as a table of splits."""
        titles = {"train": f"train, epoch {self.reached[1]}", "test": "test"}
        if self.best is not None:
            titles = {**titles, "val": f"val, epoch {self.best.epoch} (best)"}
        self.display.table(rows_by_split(metrics, titles))
        measure_peak = peak_flops if self.config.tune_process else lambda again: None
        self.report = make_report(self.ledger.read(), self._steps.flops, measure_peak)
        self.log_throughput()
        for line in self.report.lines():
            self.show(line)
