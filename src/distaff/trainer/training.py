"""Runs a training from its preparation to its result."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from distaff.data import Loader, closing_made, first_to_train, loader_of, unlimited
from distaff.data.loader import begin_new_epoch
from distaff.errors import StateError
from distaff.execution.determinism import check_backend
from distaff.execution.processes import check_one_process, is_first
from distaff.mesh.planned import is_met, meet
from distaff.metrics import as_numbers
from distaff.metrics.monitor import as_monitor
from distaff.report.saved import saved_report
from distaff.run import loop
from distaff.run.directory.protocol import recorded
from distaff.run.display import as_text
from distaff.run.events import Interrupted, Plan, PlanOptions, as_argument, shortened
from distaff.run.identity.candidates import Candidate
from distaff.run.processes.support import check_prepared, check_processes, quieten
from distaff.run.result import TrainResult
from distaff.run.run import Run
from distaff.trainer.memory.ladder import fit, line_of
from distaff.trainer.preparation import Preparation


class Inputs:
    """The arguments of `train_model`, converted to loaders.

    Attributes:
        test_loader: the loader of the test; None to skip it.
        made: pairs of an argument and its loader.
    """

    def __init__(self, plan: Plan, loaders: tuple[Any, Any, Any], options: PlanOptions) -> None:
        train, val, test = loaders
        made = None if test is None else loader_of(test, options, name="test")
        self.plan = plan
        self.made = [
            (train, unlimited(plan.train_loader)),
            (test, made),
            *_validation_pairs(val, plan),
        ]
        self.test_loader = None if made is None else shortened(made, options, "test")


class Training:
    """Trains a trainer, which overrides `base`, from the preparation of a run to its result."""

    def __init__(self, trainer: Any, base: type) -> None:
        self._trainer, self._base = trainer, base
        self._here, self._options = trainer._workspace, trainer.config

    def run(self, inputs: Inputs, *, key: str | None, rerun: bool) -> TrainResult:
        """Trains, or loads the result of a finished run; see `train_model`."""
        here = self._here
        with closing_made(*inputs.made), closing(here.display):
            run = self._begin(inputs.plan)
            with run.supervisor.listening():
                preparation = Preparation(self._trainer, self._base)
                with run.supervisor.watching(None):
                    preparation.prepare(run, inputs.test_loader)
                    check_prepared(run, preparation.first_batches)
                    recording, record = here.recording, run.recorder.record
                    subject = preparation.subject
                    done = recording.finished(record, subject, key=key, rerun=rerun)
                if done is not None:
                    return self._load_finished(run, done, inputs)
                texts = {} if here.table is None else {"model.txt": as_text(here.table)}
                with (
                    saved_report(recording, self._options.save_report and is_first()),
                    recorded(recording, record, texts, run.recorder.outcome, subject),
                    run.recorder.drawing(self._options.save_curves and is_first()),
                    run.supervisor.watching(recording.path),
                    run.recovery.explaining(),
                ):
                    run.recorder.has_begun = True
                    self._train(run, inputs.test_loader, preparation)
        return run.recorder.result()

    def check(self, plan: Plan) -> None:
        """Prepares a run without starting it.

        Raises:
            DistaffError: an input is invalid (the subclass says which).
        """
        self.prepared(plan, None)

    def prepared(self, plan: Plan, test_loader: Any) -> tuple[Preparation, Run]:
        """Returns a run that is prepared and not started, and its preparation.

        Raises:
            DistaffError: an input is invalid (the subclass says which).
        """
        preparation, run = Preparation(self._trainer, self._base), self._make_run(plan)
        preparation.prepare(run, test_loader)
        return preparation, run

    def _make_run(self, plan: Plan) -> Run:
        trainer, name = self._trainer, type(self._trainer).__name__
        meet(trainer, plan)
        monitor = as_monitor(trainer.monitor)
        plan = plan._replace(count_tokens=getattr(trainer, "count_tokens", None))
        if plan.steps_per_epoch is None:  # else an epoch continues where the last one stopped
            left = self._here.feeds.is_left_within_epoch(plan.train_loader)
            plan = plan._replace(abandons=left)
        return Run(self._here, plan, self._options, trainer.callbacks, monitor, name)

    def _begin(self, plan: Plan) -> Run:
        trainer, here = self._trainer, self._here
        if here.state is None:  # before the display starts a thread with its own arena
            trainer._tune_process(first_to_train(plan.train_loader))
        if self._options.deterministic:
            check_backend()
        if self._options.mesh is None:
            check_one_process()
        quieten(here)
        if not is_met():
            fit(trainer, self._base, plan.train_loader)
            self._options = trainer.config
        run = self._make_run(plan)
        check_processes(self._options, run)
        if run.plan.abandons:  # before its next batch identifies the data
            begin_new_epoch(run.plan.train_loader)
        trainer._run = run
        run.recorder.begin()
        return run

    def _train(self, run: Run, test_loader: Any, preparation: Preparation) -> None:
        """Runs the loop, notifies callbacks of its end, and tests the best model."""
        if self._here.fit is not None:
            self._here.show(line_of(self._here.fit))
        if preparation.products:
            self._here.show(preparation.products)
        try:
            try:
                loop.train(self._trainer, run)
            except Interrupted as reason:
                run.end_early(reason)
        except BaseException as error:
            run.end_callbacks(error)
            raise
        finally:
            run.checkpointer.boundary = None
        run.end_callbacks()
        if not run.state.interrupted_by:
            if line := _off_schedule(run, preparation.total_steps):
                run.recorder.show(line)
            self._finish(run, test_loader)

    def _finish(self, run: Run, test_loader: Any) -> None:
        """Saves the last state unless already saved, loads the best model, and tests it."""
        trainer, here, store = self._trainer, self._here, run.checkpointer.store
        store.wait()
        if store.latest() != here.step:
            trainer.save_model({}, is_best=False)
        trainer.load_model()
        here.feeds.leave(run.plan.train_loader)
        best = run.best_metrics or {}
        of_best = {n: x for n, x in best.items() if n[:6] != "train/"}
        metrics = {**run.state.last_metrics, **of_best}
        if test_loader is not None:
            test_metrics = {}
            for name, weights in self._options.evaluations("test"):
                test_metrics.update(trainer.eval_model(test_loader, f"{name}/", **weights))
            trainer.save_metrics("test", test_metrics)
            run.logger.log_metrics(test_metrics, step=here.step, epoch=here.epoch)
            metrics.update(test_metrics)
        run.recorder.update(last_metrics=metrics)
        run.recorder.show_result(metrics, measures=self._options.tune_process)

    def _load_finished(self, run: Run, done: Candidate, inputs: Inputs) -> TrainResult:
        """Loads a finished run, as if it had just ended. The user's loaders move to its end.

        Raises:
            CheckpointError: its checkpoints cannot be read.
        """
        recorder, status = run.recorder, done.status
        recorder.has_begun = True
        own = [loader for argument, loader in inputs.made if argument is loader]
        run.checkpointer.load_finished(own)
        self._trainer.load_model()
        step, epoch = int(status["step"]), int(status["epoch"])
        metrics = dict(as_numbers(status["metrics"]))
        recorder.update(step=step, epoch=epoch, first_step=step, last_metrics=metrics)
        recorder.show(f"{done.path} has already finished; loading its result without training")
        reason = str(status.get("reason") or "") or "already finished: nothing was trained"
        self._here.feeds.leave(run.plan.train_loader)
        return recorder.result()._replace(status=str(status["status"]), reason=reason)


def _validation_pairs(val_loader: Any, plan: Plan) -> list[tuple[Any, Loader]]:
    """Returns pairs of an argument for validation and the loader that was made of it."""
    loaders = as_argument(plan.val_loaders)
    if not isinstance(loaders, dict):
        return [] if loaders is None else [(val_loader, unlimited(loaders))]
    return [(val_loader[name], unlimited(loader)) for name, loader in loaders.items()]


def _off_schedule(run: Run, planned: int | None) -> str:
    """Returns a line if a run by examples or tokens took another number of steps than planned."""
    steps, limit = run.state.step - run.state.begun_at[0], run.plan.limit
    is_whole = limit is not None and planned and run.timetable.is_spent(run.state)
    if not is_whole or not planned or abs(steps - planned) <= planned / 10:
        return ""
    if run.workspace.schedule is None:
        return ""
    return (
        f"{limit} took {steps} steps, but the first batch suggested {planned}, and the learning "
        f'rate was scheduled for these. Batches differ in size: num_epochs="{steps} steps" fits.'
    )


def not_trained() -> StateError:
    """Returns the error for a trainer that is asked for its run before it has one."""
    return StateError(
        "This trainer has no run yet, and so no checkpoints and metrics. Call train_model "
        "first; to load the weights of another run, use load_from_checkpoint."
    )
