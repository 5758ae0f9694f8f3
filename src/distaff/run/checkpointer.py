"""Saves the checkpoints of a run, and resumes a run from them.

A checkpoint is saved at one of four points: between the steps of an epoch; after a validation
between them; after all steps, before the validation; or at the end of the epoch. A resumed run
repeats everything after the checkpoint, and truncates the log to it.
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
from distaff.run.events import BadNumbers, as_argument
from distaff.run.ranking import Better, insert, retain
from distaff.run.recorder import Recorder
from distaff.run.result import Best
from distaff.run.supervision.supervisor import Supervisor
from distaff.run.supervision.watchdog import SAVING
from distaff.step.finite import all_finite
from distaff.step.guard import form_of
from distaff.step.state import TrainState, is_intact

_NOTHING = NullStore()


class Checkpointer:
    """Saves and restores a run at any step.

    Args:
        recorder: the progress of the run.
        supervisor: restarts its save timer at each save.
        options: the options of the run.

    Attributes:
        boundary: the facts of a checkpoint that may be saved during an evaluation; None if the
            run is elsewhere.
        origin: holds the state before the first step until the first save.
    """

    boundary: dict[str, Any] | None = None
    origin: Store
    _last_save: int | None = None
    _loaded: tuple[TrainState, int, int] | None = None

    def __init__(
        self, recorder: Recorder, supervisor: Supervisor, options: RecordingOptions
    ) -> None:
        self._recorder, self._supervisor, self._options = recorder, supervisor, options
        self._workspace, self.origin = recorder.workspace, _NOTHING
        self._val_loaders = as_argument(recorder.plan.val_loaders)

    @property
    def store(self) -> Store:
        """The checkpoints of the run."""
        return self._workspace.recording.store

    def save(self, facts: Mapping[str, Any]) -> None:
        """Saves the arrays of the state, with the facts that a resume needs.

        The evaluation parameters are saved too if they differ from `params`, so that a model can be
        loaded without its optimizer.

        Raises:
            BadNumbers: a parameter is NaN or infinite; such a model is never saved.
        """
        workspace = self._workspace
        state = workspace.ready_state()
        if not all_finite(state.params):
            raise BadNumbers("A parameter", BadStep(workspace.step, is_spike=False))
        self._supervisor.saved()
        evaluated = workspace.evaluation_state()
        differ = evaluated is not state
        arrays = {EVALUATION_PARAMS: evaluated.params} if differ else {}
        watched = self._supervisor.patience("a checkpoint", workspace.step, SAVING)
        with watched, self._recorder.timers.spent("checkpoint"):
            info = {**facts, EVALUATION_PARAMS: differ}
            self.store.save(workspace.step, {**state.arrays(), **arrays}, info)
        self.boundary, self._last_save, self.origin = None, workspace.step, _NOTHING

    def facts(self, metrics: Mapping[str, Any], is_best: bool | None) -> dict[str, Any]:
        """Returns what a resume needs in addition to the arrays, as strict JSON.

        Args:
            metrics: validation metrics; empty except after a validation.
            is_best: whether the model is the best so far; None except after a validation, or at the
                end of an epoch.
        """
        recorder, workspace = self._recorder, self._workspace
        callbacks, plan = recorder.callbacks, recorder.plan
        guard, progress = workspace.ready_state().guard, recorder.state.in_epoch
        is_within = is_best is None or progress.is_validated
        return {
            "record": recorder.record,
            "step": workspace.step,
            "epoch": workspace.epoch,
            "metrics": as_json(metrics),
            "is_best": is_best,
            "provisional": is_best is None,
            **recorder.state.to_json(ended=None if is_within else workspace.epoch),
            "stop": [callbacks.stop_reason, callbacks.stop_status],
            "guard": None if guard is None else form_of(guard),
            "loader": dict(workspace.feeds.position(plan.train_loader)),
            "val_loader": self._validation_positions(),
            "callbacks": [callback.get_state() for callback in callbacks.callbacks],
            "callback_names": callbacks.names,
            "logger": workspace.recording.logger.position(),
            "steps_per_call": recorder.fusion,
            **self._averages(),
        }

    def _averages(self) -> dict[str, Any]:
        """Returns the names of the averages of the weights, and the judged weights, if any."""
        averages = self._workspace.ready_state().averages
        return {"averages": [*averages], "judged": self._workspace.judged} if averages else {}

    def _validation_positions(self) -> Any:
        position, loaders = self._workspace.feeds.position, self._val_loaders
        if isinstance(loaders, dict):
            return {name: dict(position(loader)) for name, loader in loaders.items()}
        return None if loaders is None else dict(position(loaders))

    def rank(self, metrics: Mapping[str, Any], is_best: bool, better: Better) -> None:
        """Adds the model just validated to the best models if it ranks among them.

        Args:
            metrics: its validation metrics; empty without validation.
            is_best: whether it is the best model so far.
            better: compares the metrics of two models.
        """
        if not (metrics or is_best):
            return
        recorder, workspace = self._recorder, self._workspace
        new = Best(workspace.step, workspace.epoch, dict(metrics))
        models = insert(recorder.state.best_models, new, better, is_best=is_best)
        steps = self.store.steps() if self._may_lose_saves else None
        recorder.update(best_models=retain(models, self._options.keep_best, steps))

    def load_best(self) -> None:
        """Loads the best checkpoint of this run; the newest if no model was ranked.

        If no model was ranked and the last save failed, keeps the current weights and warns.
        """
        self.settle()
        best, workspace, store = self._recorder.state.best, self._workspace, self.store
        step = best.step if best else store.latest()
        if self._may_lose_saves and best is None and workspace.step == self._last_save != step:
            warned(
                f"The weights of step {workspace.step} could not be written. They are kept, but "
                "only in the memory of this process."
            )
        elif step is not None:
            self._load(store, step)

    def _load(self, store: Store, step: int) -> None:
        """Loads the arrays of a checkpoint into the state."""
        with self._supervisor.patience("the restore of a checkpoint", step, SAVING):
            self._workspace.restore(store, step, self.saved_members(store.info(step)))

    def settle(self) -> None:
        """Waits for pending saves, and drops best models whose save failed.

        Raises:
            CheckpointError: a save failed.
        """
        recorder, store, best = self._recorder, self.store, self._recorder.state.best
        store.wait()
        if not self._may_lose_saves or best is None:
            return
        steps = store.steps()
        written = [model for model in recorder.state.best_models if model.step in steps]
        recorder.update(best_models=retain(written, self._options.keep_best))
        now = recorder.state.best
        if now is None:
            warned(
                f"The best model, of step {best.step}, could not be written, nor any other "
                "validated model. This run has no best model."
            )
        elif now is not best:
            warned(
                f"The best model, of step {best.step}, could not be written. The best model that "
                f"was written, of step {now.step}, replaces it."
            )

    @property
    def _may_lose_saves(self) -> bool:
        """Whether the run continues after a failed save."""
        return self._options.on_failed_save == "warn" and self._options.writes

    def load_state(self) -> None:
        """Loads the state of a resumed run, so that `on_training_start` sees its step and arrays.

        `resume` restores the rest after that hook, and thus overrides what the hook changes.
        """
        found, workspace = self._recorder.recording.found, self._workspace
        if found is not None:
            self._load(self.store, found.step)
            self._loaded = (workspace.ready_state(), workspace.step, workspace.epoch)

    def resume(self) -> StepInfo | None:
        """Restores a resumed run; returns the argument of its last `on_checkpoint`, or None."""
        recorder, found, saved = self._recorder, self._recorder.recording.found, None
        if found is not None:
            asked = recorder.callbacks.stop_reason, recorder.callbacks.stop_status
            saved = self.restore(self.store, found.step)
            if asked[0] is not None:  # at the start of this run
                recorder.callbacks.stop_reason, recorder.callbacks.stop_status = asked
            recorder.recording.confirm(recorder.record)
            recorder.show(found.text(self._workspace.epoch))
        elif recorder.recording.remark:
            recorder.show(recorder.recording.remark)
        workspace = self._workspace
        recorder.update(first_step=workspace.step, step=workspace.step, epoch=workspace.epoch)
        return saved

    def saved_members(self, info: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the members of the state to load from a checkpoint with this info.

        The guard is left out if it belongs to another policy: it then starts afresh; so do
        averages of the weights that the checkpoint does not have.
        """
        members = self._workspace.ready_state().arrays()
        if set(info.get("averages", ())) != set(members.get("averages", ())):
            members.pop("averages", None)
        if members["guard"] is None or info.get("guard") != form_of(members["guard"]):
            members.pop("guard")
        return tuple(members)

    def restore(self, store: Store, step: int, *, val: bool = True) -> StepInfo | None:
        """Restores the run from a checkpoint.

        Args:
            store: the store of the checkpoint.
            step: the step of the checkpoint.
            val: whether to restore the positions of the validation loaders.

        Returns:
            The argument of `on_checkpoint`; None unless the checkpoint is from the end of an epoch,
            or of a validation.

        Raises:
            CheckpointError: the checkpoint cannot be read, or the model or the data differ.
        """
        info, workspace, recorder = store.info(step), self._workspace, self._recorder
        loaded, self._loaded = self._loaded, None
        if loaded is not None and is_intact(loaded[0]):
            workspace.state, workspace.step, workspace.epoch = loaded
        else:
            self._load(store, step)
        plan, dispatcher = recorder.plan, recorder.dispatcher
        with _naming_step(step):
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
        """Loads the results of a finished run.

        Args:
            own: the loaders that the user passed, which are moved to the end of the run.

        Raises:
            CheckpointError: a checkpoint cannot be read.
        """
        step, plan = self.store.latest(), self._recorder.plan
        assert step is not None  # a finished run has a checkpoint
        info, recorder = self.store.info(step), self._recorder
        with _naming_step(step):
            recorder.state = recorder.state.with_results(
                info, self.store.steps(), self._options.keep_best
            )
            self._restore_callbacks(info)
            if any(unlimited(plan.train_loader) is each for each in own):
                self.seek(info["loader"], plan.train_loader, "train")
            if info["val_loader"] is not None and plan.val_loaders:
                self.seek_validation(info["val_loader"], own)

    def _restore_callbacks(self, info: Mapping[str, Any]) -> None:
        callbacks = self._recorder.callbacks
        callbacks.stop_reason, callbacks.stop_status = info["stop"]
        names = callbacks.names
        saved_names = info.get("callback_names", names)
        _check_same("number of callbacks", len(info["callbacks"]), len(names))
        states = dict(zip(saved_names, info["callbacks"], strict=True))
        for name, callback in zip(names, callbacks.callbacks, strict=True):
            if name in states:  # else its class has changed, and it starts afresh
                callback.set_state(states[name])

    def seek_validation(self, saved: Mapping[str, Any], own: Any = None) -> None:
        """Restores the positions of the validation loaders; `own` limits which ones."""
        val_loaders = self._recorder.plan.val_loaders
        loaders = {n.removeprefix("val_"): each for n, each in val_loaders.items()}
        positions = {"val": saved} if "val" in val_loaders else saved
        _check_same("validation sets", sorted(positions), sorted(loaders))
        for name, loader in loaders.items():
            if own is not None and not any(unlimited(loader) is each for each in own):
                continue
            self.seek(positions[name], loader, name if name == "val" else f"val_{name}")

    def seek(self, position: Mapping[str, Any], loader: Loader, name: str) -> None:
        """Restores the position of a loader; warns if it is inexact and that is allowed."""
        try:
            loader.set_state(position)
        except ChangedBatchesError as error:
            if not self._options.allow_inexact_resume:
                raise ChangedBatchesError(f"the {name} loader: {error}") from error
            loader.set_state(loader.get_state())  # it has moved to the right place
            line = f"the resume is inexact: the {name} loader does not yield the same batches again"
            self._recorder.show(line)
            warn(line, stacklevel=2)


@contextmanager
def _naming_step(step: int) -> Generator[None]:
    """Turns any exception into a CheckpointError that names the step of the checkpoint."""
    try:
        yield
    except Exception as error:  # a custom callback may raise anything
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"The run cannot resume from its checkpoint of step {step}: {reason}. Use the same "
            "code, data and callbacks as before, or start a new run with resume='never'."
        ) from error


def _check_same(what: str, saved: Any, now: Any) -> None:
    if saved != now:
        raise ValueError(f"{what}: {saved} in the checkpoint, {now} in this run")
