"""Checkpointer: what a checkpoint holds of a run beside its arrays, and how a run resumes from it.

A checkpoint is made at one of three places: within an epoch's steps; after them, before they are
validated; or at the epoch's end. What follows it is done again by the run that resumes, and the log
is cut to where it stood.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from distaff.callbacks import StepInfo
from distaff.checkpoint import NullStore, Store
from distaff.checkpoint.failure import warned
from distaff.checkpoint.weights import EVALUATION_PARAMS
from distaff.core.warnings import warn
from distaff.data import Loader, unlimited
from distaff.errors import ChangedBatchesError, CheckpointError
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.execution.dispatch.steps_per_call import continued
from distaff.metrics import as_json, as_numbers
from distaff.run.directory.recording import RecordingOptions
from distaff.run.events import BadNumbers, given
from distaff.run.ranking import Better, kept, placed
from distaff.run.recorder import Recorder
from distaff.run.result import Best
from distaff.run.supervision.supervisor import Supervisor
from distaff.step.finite import all_finite
from distaff.step.guard import form_of
from distaff.step.state import TrainState, is_intact

_NOTHING = NullStore()


class Checkpointer:
    """Saves a run at any step, and puts it back where it was saved.

    Args:
        recorder: of the run.
        supervisor: is told of each save.
        options: of the run.

    Attributes:
        boundary: the facts of a checkpoint that may be made now, in the middle of an evaluation;
            None where there is none.
        origin: keeps the state before the first step, until something is saved.
    """

    boundary: dict[str, Any] | None = None
    origin: Store
    _last_save: int | None = None
    _taken_up: tuple[TrainState, int, int] | None = None

    def __init__(
        self, recorder: Recorder, supervisor: Supervisor, options: RecordingOptions
    ) -> None:
        self._recorder, self._supervisor, self._options = recorder, supervisor, options
        self._here, self.origin = recorder.workspace, _NOTHING
        self._val_loaders = given(recorder.plan.val_loaders)

    @property
    def store(self) -> Store:
        """The checkpoints of the run."""
        return self._here.recording.store

    def save(self, facts: Mapping[str, Any]) -> None:
        """Hands the arrays of the state, and what else a resume needs, to the store.

        With the members of the state go, where they differ from its `params`, the parameters to
        evaluate with: a model is loaded without its optimizer.

        Raises:
            BadNumbers: a parameter is NaN or infinite; such a model is never kept.
        """
        here = self._here
        state = here.ready_state()
        if not all_finite(state.params):
            raise BadNumbers("A parameter", BadStep(here.step, is_spike=False))
        self._supervisor.saved()
        self._supervisor.beat("a checkpoint", here.step)
        evaluated = here.evaluation_state()
        differ = evaluated is not state
        arrays = {EVALUATION_PARAMS: evaluated.params} if differ else {}
        with self._recorder.timers.spent("checkpoint"):
            info = {**facts, EVALUATION_PARAMS: differ}
            self.store.save(here.step, {**state.arrays(), **arrays}, info)
        self.boundary, self._last_save, self.origin = None, here.step, _NOTHING

    def facts(self, metrics: Mapping[str, Any], is_best: bool | None) -> dict[str, Any]:
        """Returns what a resume needs beside the arrays, as strict JSON.

        Args:
            metrics: of the validation before it, at the end of an epoch.
            is_best: whether that found the best model; None elsewhere than at the end of an epoch.
        """
        recorder, here = self._recorder, self._here
        callbacks, plan = recorder.callbacks, recorder.plan
        guard = here.ready_state().guard
        return {
            "record": recorder.record,
            "step": here.step,
            "epoch": here.epoch,
            "metrics": as_json(metrics),
            "is_best": is_best,
            "provisional": is_best is None,
            **recorder.state.to_json(ended=None if is_best is None else here.epoch),
            "stop": [callbacks.stop_reason, callbacks.stop_status],
            "guard": None if guard is None else form_of(guard),
            "loader": dict(here.feeds.position(plan.train_loader)),
            "val_loader": self._validation_positions(),
            "callbacks": [callback.get_state() for callback in callbacks.callbacks],
            "callback_names": callbacks.names,
            "logger": here.recording.logger.position(),
            "steps_per_call": recorder.fusion,
        }

    def _validation_positions(self) -> Any:
        """Returns the positions of the loaders of the validation, in the form of `val_loader`."""
        position, loaders = self._here.feeds.position, self._val_loaders
        if isinstance(loaders, dict):
            return {name: dict(position(loader)) for name, loader in loaders.items()}
        return None if loaders is None else dict(position(loaders))

    def rank(self, metrics: Mapping[str, Any], is_best: bool, better: Better) -> None:
        """Takes the model just validated among the best ones, if it is one of them.

        Args:
            metrics: of its validation; empty where there was none.
            is_best: whether it is the best model so far.
            better: compares two validations.
        """
        if not (metrics or is_best):
            return
        recorder, here = self._recorder, self._here
        new = Best(here.step, here.epoch, dict(metrics))
        models = placed(recorder.state.best_models, new, better, is_best=is_best)
        steps = self.store.steps() if self._may_lose_saves else None
        recorder.update(best_models=kept(models, self._options.keep_best, steps))

    def load_best(self) -> None:
        """Loads the best checkpoint of this run, whole; the newest where none is the best.

        Where none is, and the last save could not be written, the weights stay as they are.
        """
        self.settle()
        best, here, store = self._recorder.state.best, self._here, self.store
        step = best.step if best else store.latest()
        if self._may_lose_saves and best is None and here.step == self._last_save != step:
            warned(
                f"The weights stay those of step {here.step}, which could not be written: they are "
                "in the memory of this process only."
            )
        elif step is not None:
            here.restore(store, step, self.saved_members(store.info(step)))

    def settle(self) -> None:
        """Waits for what is being written, and drops the best models that could not be.

        Raises:
            CheckpointError: a save failed.
        """
        recorder, store, best = self._recorder, self.store, self._recorder.state.best
        store.wait()
        if not self._may_lose_saves or best is None:
            return
        steps = store.steps()
        there = [model for model in recorder.state.best_models if model.step in steps]
        recorder.update(best_models=kept(there, self._options.keep_best))
        now = recorder.state.best
        if now is None:
            warned(
                f"The best model, of step {best.step}, could not be written, nor any other that "
                "was validated: this run has no best model."
            )
        elif now is not best:
            warned(
                f"The best model, of step {best.step}, could not be written: the best one that "
                f"was is of step {now.step}, and takes its place."
            )

    @property
    def _may_lose_saves(self) -> bool:
        """Whether the run continues after a save that failed."""
        return self._options.on_failed_save == "warn" and self._options.writes

    def take_up(self) -> None:
        """Loads the state of a resumed run, so that `on_training_start` has its step and arrays.

        The rest follows in `resume`: what that hook changes is not what was saved.
        """
        found, here = self._recorder.recording.found, self._here
        if found is not None:
            here.restore(self.store, found.step, self.saved_members(self.store.info(found.step)))
            self._taken_up = (here.ready_state(), here.step, here.epoch)

    def resume(self) -> StepInfo | None:
        """Goes to where a resumed run was saved; returns what `on_checkpoint` was told there."""
        recorder, found, saved = self._recorder, self._recorder.recording.found, None
        if found is not None:
            asked = recorder.callbacks.stop_reason, recorder.callbacks.stop_status
            saved = self.restore(self.store, found.step)
            if asked[0] is not None:  # at the start of this run
                recorder.callbacks.stop_reason, recorder.callbacks.stop_status = asked
            recorder.recording.confirm(recorder.record)
            recorder.show(found.text(self._here.epoch))
        elif recorder.recording.remark:
            recorder.show(recorder.recording.remark)
        here = self._here
        recorder.update(first_step=here.step, step=here.step, epoch=here.epoch)
        return saved

    def saved_members(self, info: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns which members of the state a checkpoint with this info holds.

        The guard of another policy remembers something else, and starts afresh.
        """
        members = self._here.ready_state().arrays()
        if members["guard"] is None or info.get("guard") != form_of(members["guard"]):
            members.pop("guard")
        return tuple(members)

    def restore(self, store: Store, step: int, *, val: bool = True) -> StepInfo | None:
        """Puts the run where it was when a checkpoint was made.

        Args:
            store: where the checkpoint is.
            step: which one.
            val: whether the validation loaders go back, too.

        Returns:
            What `on_checkpoint` was told; None where the checkpoint is not of an epoch's end.

        Raises:
            CheckpointError: it cannot be read, or is of another model or another data set.
        """
        info, here, recorder = store.info(step), self._here, self._recorder
        taken_up, self._taken_up = self._taken_up, None
        if taken_up is not None and is_intact(taken_up[0]):
            here.state, here.step, here.epoch = taken_up
        else:
            here.restore(store, step, self.saved_members(info))
        plan, dispatcher = recorder.plan, recorder.dispatcher
        with explained(step):
            recorder.state = recorder.state.from_json(
                info, dispatcher.layout, store.steps(), self._options.keep_best
            )
            self._restore_callbacks(info)
            self.seek(info["loader"], plan.train_loader, "train")
            if val and info["val_loader"] is not None and plan.val_loaders:
                self.seek_validation(info["val_loader"])
            recorder.fuse(continued(dispatcher.forms, info["steps_per_call"]))
            recorder.recording.logger.resume(step, info["logger"])
            is_best, metrics = info["is_best"], dict(as_numbers(info["metrics"]))
        return None if is_best is None else recorder.info(metrics, is_best)

    def load_finished(self, own: list[Any]) -> None:
        """Loads the results and the best model of a run that is finished.

        Args:
            own: the user's own loaders, which go to where the run has left them.

        Raises:
            CheckpointError: its checkpoints cannot be read.
        """
        step, plan = self.store.latest(), self._recorder.plan
        assert step is not None  # or it would not be one to load
        info, recorder = self.store.info(step), self._recorder
        with explained(step):
            recorder.state = recorder.state.with_results(
                info, self.store.steps(), self._options.keep_best
            )
            self._restore_callbacks(info)
            if any(unlimited(plan.train_loader) is each for each in own):
                self.seek(info["loader"], plan.train_loader, "train")
            if info["val_loader"] is not None and plan.val_loaders:
                self.seek_validation(info["val_loader"], own)

    def _restore_callbacks(self, info: Mapping[str, Any]) -> None:
        """Gives callbacks back what they remember."""
        callbacks = self._recorder.callbacks
        callbacks.stop_reason, callbacks.stop_status = info["stop"]
        names = callbacks.names
        saved_names = info.get("callback_names", names)
        _check_same("callbacks", len(info["callbacks"]), len(names))
        states = dict(zip(saved_names, info["callbacks"], strict=True))
        for name, callback in zip(names, callbacks.callbacks, strict=True):
            if name in states:  # else it is of another class, and remembers nothing yet
                callback.set_state(states[name])

    def seek_validation(self, saved: Mapping[str, Any], own: Any = None) -> None:
        """Puts the validation loaders where they were; of several, only those in `own` if given."""
        val_loaders = self._recorder.plan.val_loaders
        loaders = {n.removeprefix("val_"): each for n, each in val_loaders.items()}
        positions = {"val": saved} if "val" in val_loaders else saved
        _check_same("validation sets", sorted(positions), sorted(loaders))
        for name, loader in loaders.items():
            if own is not None and not any(unlimited(loader) is each for each in own):
                continue
            self.seek(positions[name], loader, name if name == "val" else f"val_{name}")

    def seek(self, position: Mapping[str, Any], loader: Loader, name: str) -> None:
        """Puts a loader where it was."""
        try:
            loader.set_state(position)
        except ChangedBatchesError as error:
            if not self._options.allow_inexact_resume:
                raise ChangedBatchesError(f"the {name} loader: {error}") from error
            loader.set_state(loader.get_state())  # it stands where it shall
            line = f"the resume is inexact: the {name} loader does not yield the same batches again"
            self._recorder.show(line)
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
