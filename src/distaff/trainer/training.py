"""Training: a run from its preparation to its result."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from distaff.data import as_loader, closing_made, first_to_train, limited, unlimited
from distaff.errors import StateError
from distaff.execution.devices import check_one_process
from distaff.metrics import as_numbers
from distaff.metrics.monitor import as_monitor
from distaff.run import loop
from distaff.run.directory.protocol import recorded
from distaff.run.display import as_text
from distaff.run.events import Interrupted, Plan, PlanOptions, made_of
from distaff.run.identity.candidates import Candidate
from distaff.run.result import TrainResult
from distaff.run.run import Run
from distaff.trainer.preparation import Preparation


class Given:
    """What `train_model` was given, and the loaders it became.

    Args:
        plan: of the run.
        loaders: as they were given: to train on, to validate on, and to test on.
        options: how many batches to take.

    Attributes:
        test_loader: what is tested on; None for nothing.
        made: what was given, each with the loader that it became.
    """

    def __init__(self, plan: Plan, loaders: tuple[Any, Any, Any], options: PlanOptions) -> None:
        train, val, test = loaders
        made = None if test is None else as_loader(test, name="test")
        self.plan = plan
        self.made = [(train, unlimited(plan.train_loader)), (test, made), *made_of(val, plan)]
        self.test_loader = None if made is None else limited(made, options.most_batches)


class Training:
    """Runs a user's class from its preparation to its result.

    Args:
        trainer: of the user's class.
        base: the class whose methods it overrides.
    """

    def __init__(self, trainer: Any, base: type) -> None:
        self._trainer, self._base = trainer, base
        self._here, self._options = trainer._workspace, trainer.config

    def run(self, given: Given, *, key: str | None, rerun: bool) -> TrainResult:
        """Trains, or takes the result of a run that is finished; see `train_model`."""
        here = self._here
        with closing_made(*given.made), closing(here.display):
            run = self._begin(given.plan)
            with run.supervisor.listening():
                preparation = Preparation(self._trainer, self._base)
                preparation.prepare(run, given.test_loader)
                recording, record = here.recording, run.recorder.record
                subject = preparation.subject
                done = recording.finished(record, subject, key=key, rerun=rerun)
                if done is not None:
                    return self._load_finished(run, done, given)
                texts = {} if here.table is None else {"model.txt": as_text(here.table)}
                with (
                    recorded(recording, record, texts, run.recorder.outcome, subject),
                    run.supervisor.watching(recording),
                    run.recovery.explaining(),
                ):
                    run.recorder.has_begun = True
                    self._train(run, given.test_loader)
        return run.recorder.result()

    def check(self, plan: Plan) -> None:
        """Prepares a run, and begins none.

        Raises:
            DistaffError: any bad input, by its kind.
        """
        Preparation(self._trainer, self._base).prepare(self._made(plan), None)

    def _made(self, plan: Plan) -> Run:
        trainer, name = self._trainer, type(self._trainer).__name__
        monitor = as_monitor(trainer.monitor)
        return Run(self._here, plan, self._options, trainer.callbacks, monitor, name)

    def _begin(self, plan: Plan) -> Run:
        trainer, here = self._trainer, self._here
        if here.state is None:  # before the display starts a thread, which would have an arena
            trainer._tune_process(first_to_train(plan.train_loader))
        check_one_process()
        run = self._made(plan)
        trainer._run = run
        run.recorder.begin()
        return run

    def _train(self, run: Run, test_loader: Any) -> None:
        """Trains to an end of whatever kind, tells callbacks of it, and tests the best model."""
        try:
            try:
                loop.train(self._trainer, run)
            except Interrupted as reason:
                run.end_early(reason)
        except BaseException as error:
            run.tell_end(error)
            raise
        finally:
            run.checkpointer.boundary = None
        run.tell_end()
        if not run.state.interrupted_by:
            self._finish(run, test_loader)

    def _finish(self, run: Run, test_loader: Any) -> None:
        """Keeps the last state where no epoch's end has, loads the best, and tests it."""
        trainer, here, store = self._trainer, self._here, run.checkpointer.store
        store.wait()
        if store.latest() != here.step:
            trainer.save_model({}, is_best=False)
        trainer.load_model()
        best = run.best_metrics or {}
        of_best = {n: x for n, x in best.items() if n[:6] != "train/"}
        metrics = {**run.state.last_metrics, **of_best}
        if test_loader is not None:
            test_metrics = trainer.eval_model(test_loader, "test/")
            trainer.save_metrics("test", test_metrics)
            run.logger.log_metrics(test_metrics, step=here.step, epoch=here.epoch)
            metrics.update(test_metrics)
        run.recorder.update(last_metrics=metrics)
        run.recorder.show_result(metrics, measures=self._options.tune_process)

    def _load_finished(self, run: Run, done: Candidate, given: Given) -> TrainResult:
        """Takes the result of a run that is finished, and leaves all as if it had just been made.

        Loaders of the user's own go to where the run has left them.

        Raises:
            CheckpointError: its checkpoints cannot be read.
        """
        recorder, status = run.recorder, done.status
        recorder.has_begun = True
        own = [loader for argument, loader in given.made if argument is loader]
        run.checkpointer.load_finished(own)
        self._trainer.load_model()
        step, epoch = int(status["step"]), int(status["epoch"])
        metrics = dict(as_numbers(status["metrics"]))
        recorder.update(step=step, epoch=epoch, first_step=step, last_metrics=metrics)
        recorder.show(f"{done.path} is finished: it is loaded, and nothing is trained")
        reason = str(status.get("reason") or "") or "finished before: nothing was trained"
        return recorder.result()._replace(status=str(status["status"]), reason=reason)


def not_trained() -> StateError:
    """Returns the error for a trainer that is asked for its run before it has one."""
    return StateError(
        "Checkpoints and metrics are files of a run, and this trainer has not trained yet. "
        "Call train_model first; for weights of another run, use load_from_checkpoint."
    )
