"""Resume: what a checkpoint holds of a run beside its state, and how a run goes on from it.

A checkpoint is made at one of three places: within an epoch's steps, at a `Pause`; after them,
before they are validated; or at the epoch's end. What follows it is done again by the run that
resumes, and the log is cut to where it stood.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from distaff.callbacks import StepInfo
from distaff.checkpoint import Store
from distaff.checkpoint.failure import warned
from distaff.checkpoint.weights import EVALUATION_PARAMS
from distaff.core.warnings import warn
from distaff.data import Loader, unlimited
from distaff.errors import ChangedBatchesError, CheckpointError
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.execution.dispatch.steps_per_call import continued
from distaff.execution.feed.skipped import Stretch
from distaff.metrics import as_json, as_numbers, compute
from distaff.run.events import BadNumbers, Interrupted, Pause, given
from distaff.run.ranking import best_from_json, best_json, kept, placed
from distaff.run.report import Report
from distaff.run.result import Best
from distaff.run.supervision.interruption import Interruption
from distaff.run.supervision.watchdog import Watchdog
from distaff.run.tally import Tally
from distaff.step.finite import all_finite
from distaff.step.guard import form_of, shown
from distaff.step.logged_rates import without_rates
from distaff.step.state import TrainState, is_intact
from distaff.trainer.training import Training


class Resumable(Training):
    """A training that can be saved at any step, and goes on from where it was saved."""

    _taken_up: tuple[TrainState, int, int] | None = None

    def listening(self) -> Interruption:
        """Returns what hears of reasons to end or to save a run, to be entered."""
        options = self.config
        self.interruption = Interruption(max_time=options.max_time, save_every=options.save_every)
        return self.interruption

    def watching(self) -> Watchdog:
        """Returns what a run is watched by, to be entered; nobody is stuck in a debugger."""
        path = self.recording.path
        limit = None if self.config.debug else self.config.stuck_after
        self.watchdog = Watchdog(limit, path=path and path.absolute() / "log.txt")
        return self.watchdog

    def save(self, facts: Mapping[str, Any]) -> None:
        """Hands the arrays of the state, and what else a resume needs, to the store.

        With the members of the state go, where they differ from its `params`, the parameters to
        evaluate with: a model is loaded without its optimizer.

        Raises:
            BadNumbers: a parameter is NaN or infinite; such a model is never kept.
        """
        if not all_finite(self.ready_state().params):
            raise BadNumbers("A parameter", BadStep(self.step, is_spike=False))
        self.interruption.saved()
        self.watchdog.beat("a checkpoint", self.step)
        state, evaluated = self.ready_state(), self.evaluation_state()
        differ = evaluated is not state
        arrays = {EVALUATION_PARAMS: evaluated.params} if differ else {}
        with self.ledger.spent("checkpoint"):
            info = {**facts, EVALUATION_PARAMS: differ}
            self.recording.store.save(self.step, {**state.arrays(), **arrays}, info)
        self.unsaved, self.last_save = None, self.step

    def is_new_model_better(
        self, new_metrics: Mapping[str, Any], old_metrics: Mapping[str, Any] | None
    ) -> bool:
        """Tells whether the model just validated is better than another one, by `monitor`.

        Args:
            new_metrics: of the model just validated.
            old_metrics: of the best one, None at first; then, if it is no better and several are
                kept (`keep_best`), of one after the other, until it has its place.
        """
        old = None if old_metrics is None else self.monitor.value(old_metrics)
        return self.monitor.better(self.monitor.value(new_metrics), old)

    def rank(self, metrics: Mapping[str, Any], is_best: bool) -> None:
        """Takes the model just validated among the best ones, if it is one of them.

        Args:
            metrics: of its validation; empty where there was none.
            is_best: whether it is the best model so far.
        """
        if not (metrics or is_best):
            return
        new, better = Best(self.step, self.epoch, dict(metrics)), self.is_new_model_better
        models = placed(self.best_models, new, better, is_best=is_best)
        steps = self.recording.store.steps() if self._may_lose_saves else None
        self.best_models = kept(models, self.config.keep_best, steps)

    @property
    def _may_lose_saves(self) -> bool:
        """Whether the run goes on after a save that failed."""
        return self.config.on_failed_save == "warn" and self.config.writes

    def load_model(self) -> None:
        """Loads the best checkpoint of this run, whole; the newest where none is the best.

        Where none is, and the last save could not be written, the weights stay as they are.

        Raises:
            StateError: nothing has been trained yet.
        """
        self.check_run()
        self.settle()
        store = self.recording.store
        step = self.best.step if self.best else store.latest()
        if self._may_lose_saves and self.best is None and self.step == self.last_save != step:
            warned(
                f"The weights stay those of step {self.step}, which could not be written: they are "
                "in the memory of this process only."
            )
        elif step is not None:
            self.restore(store, step, self.saved_members(store.info(step)))

    def settle(self) -> None:
        """Waits for what is being written, and drops the best models that could not be.

        Raises:
            CheckpointError: a save failed.
        """
        store, best = self.recording.store, self.best
        store.wait()
        if not self._may_lose_saves or best is None:
            return
        steps = store.steps()
        there = [model for model in self.best_models if model.step in steps]
        self.best_models = kept(there, self.config.keep_best)
        if self.best is None:
            warned(
                f"The best model, of step {best.step}, could not be written, nor any other that "
                "was validated: this run has no best model."
            )
        elif self.best is not best:
            warned(
                f"The best model, of step {best.step}, could not be written: the best one that "
                f"was is of step {self.best.step}, and takes its place."
            )

    def pausing(self) -> bool:
        """Whether the run is to be saved after this chunk."""
        return self.interruption.agreed() is not None or self.interruption.is_save_due

    def pause(self, event: Pause) -> None:
        """Saves the run within an epoch, and ends it if that was asked for."""
        self.judge(event.bad, event.breach)
        self.tally.pause(event)
        self.save(self.facts({}, None))
        if self.interruption.ending:
            raise Interrupted(self.interruption.ending)

    def end_steps(self) -> dict[str, Any]:
        """Ends the steps of an epoch; from here on it can be saved as it is now."""
        self.tally.rows, self.tally.is_trained = None, True
        self.unsaved = self.facts({}, None)
        metrics = without_rates(self.tally.total or {})
        return compute(shown(metrics, self.config), "train/")

    def take_up(self) -> None:
        """Loads the state of a resumed run, so that `on_training_start` has its step and arrays.

        The rest follows in `go_on`: what that hook changes is not what was saved.
        """
        found, store = self.recording.found, self.recording.store
        if found is not None:
            self.restore(store, found.step, self.saved_members(store.info(found.step)))
            self._taken_up = (self.ready_state(), self.step, self.epoch)

    def go_on(self) -> StepInfo | None:
        """Goes to where a resumed run was saved; returns what `on_checkpoint` was told there."""
        saved, found = None, self.recording.found
        if found is not None:
            asked = self.callbacks.stop_reason, self.callbacks.stop_status
            saved = self.put_back(self.recording.store, found.step)
            if asked[0] is not None:  # at the start of this run
                self.callbacks.stop_reason, self.callbacks.stop_status = asked
            self.recording.confirm(self.run_record)
            self.show(found.text(self.epoch))
        elif self.recording.remark:
            self.show(self.recording.remark)
        self.first_step, self.reached = self.step, (self.step, self.epoch)
        return saved

    @property
    def epoch_to_train(self) -> int:
        """The first epoch that is not done."""
        return self.tally.epoch

    def end_early(self, interrupted: Interrupted) -> None:
        """Saves what is not saved yet of a run that ends before its time."""
        if self.unsaved is not None:
            self.save(self.unsaved)
        self.settle()
        self.interrupted_by = str(interrupted)
        again = "start it again to go on" if self.recording.path else "nothing is kept of it"
        for remark in Report(self.ledger.read()).remarks():
            self.show(remark)
        self.show(f"interrupted by {interrupted} at step {self.step}: {again}")

    def keep_form(self, facts: Any) -> None:
        """Takes over the form of the steps that a run has chosen before it was interrupted."""
        self.forms = self._steps.forms = continued(self.forms, facts)

    def facts(self, metrics: Mapping[str, Any], is_best: bool | None) -> dict[str, Any]:
        """Returns what a resume needs beside the arrays, as strict JSON.

        Args:
            metrics: of the validation before it, at the end of an epoch.
            is_best: whether that found the best model; None elsewhere than at the end of an epoch.
        """
        positions = {n: dict(self.feeds.position(v)) for n, v in self.plan.val_loaders.items()}
        return {
            "record": self.run_record,
            "step": self.step,
            "epoch": self.epoch,
            "metrics": as_json(metrics),
            "best_steps": [model.step for model in self.best_models],
            "best_models": [best_json(model) for model in self.best_models],
            "is_best": is_best,
            "provisional": is_best is None,
            # At the end of an epoch, what it has given is in the log.
            "tally": (self.tally if is_best is None else Tally(self.epoch)).to_json(),
            "last_metrics": as_json(self.last_metrics),
            "begun_at": list(self.begun_at),
            "stop": [self.callbacks.stop_reason, self.callbacks.stop_status],
            "left_out": [list(stretch) for stretch in self.left_out],
            "num_skipped": self.num_skipped,
            "guard": form_of(self.ready_state().guard),
            "loader": dict(self.feeds.position(self.plan.train_loader)),
            "val_loader": given(positions),
            "callbacks": [callback.get_state() for callback in self.callbacks.callbacks],
            "logger": self.recording.logger.position(),
            "steps_per_call": self.forms.facts(),
        }

    def saved_members(self, info: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns which members of the state a checkpoint with this info holds.

        The guard of another policy remembers something else, and begins anew.
        """
        members = self.ready_state().arrays()
        if members["guard"] is None or info.get("guard") != form_of(members["guard"]):
            members.pop("guard")
        return tuple(members)

    def put_back(self, store: Store, step: int, *, val: bool = True) -> StepInfo | None:
        """Puts a run where it was when a checkpoint was made.

        Args:
            store: where the checkpoint is.
            step: which one.
            val: whether the validation loader goes back, too.

        Returns:
            What `on_checkpoint` was told; None where the checkpoint is not of an epoch's end.

        Raises:
            CheckpointError: it cannot be read, or is of another model or another data set.
        """
        info = store.info(step)
        taken_up, self._taken_up = self._taken_up, None
        if taken_up is not None and is_intact(taken_up[0]):
            self.state, self.step, self.epoch = taken_up
        else:
            self.restore(store, step, self.saved_members(info))
        with explained(step):
            self.num_skipped = int(info.get("num_skipped", 0))
            self.left_out = [Stretch(*map(int, each)) for each in info.get("left_out", ())]
            # At the end of an epoch, what it has given is in the log.
            done = {} if info["is_best"] is None else {"total": None, "rows": None}
            self.tally = Tally.from_json({**info["tally"], **done}, self._steps.columns)
            first_step, first_epoch = info["begun_at"]
            self.begun_at = int(first_step), int(first_epoch)
            self.bring_back(info, store)
            self.go_to(info["loader"], self.plan.train_loader, "train")
            if val and info["val_loader"] is not None and self.plan.val_loaders:
                self.go_to_validation(info["val_loader"])
            self.keep_form(info["steps_per_call"])
            self.recording.logger.resume(step, info["logger"])
            is_best, metrics = info["is_best"], dict(as_numbers(info["metrics"]))
        if is_best is None:
            return None
        self.tally = Tally(self.tally.epoch + 1)
        return self.info(metrics, is_best)

    def bring_back(self, info: Mapping[str, Any], store: Store) -> None:
        """Takes back the best models, the last metrics, and what callbacks remember."""
        # One that is no longer there, after going back to an earlier step, cannot be loaded.
        steps = store.steps()
        there = [model for model in best_from_json(info) if model.step in steps]
        self.best_models = kept(there, self.config.keep_best)
        self.last_metrics = dict(as_numbers(info["last_metrics"]))
        self.callbacks.stop_reason, self.callbacks.stop_status = info["stop"]
        callbacks = self.callbacks.callbacks
        _check_same("callbacks", len(info["callbacks"]), len(callbacks))
        for callback, state in zip(callbacks, info["callbacks"], strict=True):
            callback.set_state(state)

    def go_to_validation(self, saved: Mapping[str, Any], own: Any = None) -> None:
        """Puts the validation loaders where they were; of several, only those in `own` if given."""
        loaders = {n.removeprefix("val_"): each for n, each in self.plan.val_loaders.items()}
        positions = {"val": saved} if "val" in self.plan.val_loaders else saved
        _check_same("validation sets", sorted(positions), sorted(loaders))
        for name, loader in loaders.items():
            if own is not None and not any(unlimited(loader) is each for each in own):
                continue
            self.go_to(positions[name], loader, name if name == "val" else f"val_{name}")

    def go_to(self, position: Mapping[str, Any], loader: Loader, name: str) -> None:
        """Puts a loader where it was."""
        try:
            loader.set_state(position)
        except ChangedBatchesError as error:
            if not self.config.allow_inexact_resume:
                raise ChangedBatchesError(f"the {name} loader: {error}") from error
            loader.set_state(loader.get_state())  # it stands where it shall
            line = f"the resume is inexact: the {name} loader does not yield the same batches again"
            self.show(line)
            warn(line, stacklevel=2)


@contextmanager
def explained(step: int) -> Generator[None]:
    """Turns what is wrong with the facts of a checkpoint into an error that names it."""
    try:
        yield
    except Exception as error:  # a callback of the user's own may fail in its own way
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"The run cannot go on from its checkpoint of step {step}: {reason}. Start it with "
            "the code, the data and the callbacks that it was started with, or anew: "
            "resume='never'."
        ) from error


def _check_same(what: str, saved: Any, here: Any) -> None:
    if saved != here:
        raise ValueError(f"its {what} were {saved}, and are {here}")
