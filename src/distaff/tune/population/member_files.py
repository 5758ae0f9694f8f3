"""Writes a member of a population as an ordinary run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distaff.checkpoint import CheckpointStore
from distaff.checkpoint.weights import EVALUATION_PARAMS
from distaff.core.config.encoding import to_json
from distaff.loggers import JsonlLogger
from distaff.loggers.history import History
from distaff.metrics import as_json
from distaff.optim import evaluation_params, has_evaluation_params
from distaff.run.directory.curves import save_curves
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.run_state import EpochProgress, RunState, best_json
from distaff.step.guard import form_of
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule
from distaff.tune.population.member import TrainedMember
from distaff.tune.population.settings import Setting

LOG = "metrics.jsonl"


def name_of(trainer: TrainerModule) -> str:
    """Returns the name of a trainer's runs."""
    return trainer.config.name or type(trainer).__name__.lower()


class MemberFiles:
    """The run directory of a member.

    Args:
        directory: the directory, which exists.
        setting: the member.
        record: the record of the run that its population has prepared.
        is_first: whether no other member is written before.
    """

    def __init__(
        self,
        directory: RunDirectory,
        setting: Setting,
        record: Mapping[str, Any],
        *,
        is_first: bool = True,
    ) -> None:
        self.directory, self._trainer = directory, setting.trainer
        self._store = CheckpointStore(directory.path / "checkpoints", reads_back=is_first)
        options = to_json(setting.trainer.config)
        own = {"seed": setting.seed, "name": name_of(setting.trainer)}
        self._record = {
            **{name: x for name, x in record.items() if name != "population"},
            "model": to_json(setting.trainer.model.record),
            "optimizer": to_json(setting.trainer.optimizer),
            "options": {**options, **own},
            "identity": None,  # that of the population is of another seed
        }

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    def begin(self, environment: dict[str, Any] | None = None) -> JsonlLogger:
        """Writes the first files, and returns the logger of its metrics.

        Args:
            environment: the environment of all members; None to find it out.
        """
        self.directory.write_json("config.json", self._record)
        self.directory.write_environment(environment)
        self.directory.set_status("running")
        return JsonlLogger(lambda: self.path / LOG)

    def save(self, member: TrainedMember) -> None:
        """Starts to write the checkpoint of a trained member, unless its weights are not finite."""
        if member.status == "diverged" and member.best is None:
            return
        state, best = member.state, member.best
        step, epoch = (member.step, member.epoch) if best is None else (best.step, best.epoch)
        arrays, differ = state.arrays(), has_evaluation_params(state.opt_state)
        if differ:
            arrays[EVALUATION_PARAMS] = evaluation_params(state.opt_state, state.params)
        metrics = {} if best is None else best.metrics
        facts = {
            **self._facts(member, state),
            "step": step,
            "epoch": epoch,
            "metrics": as_json(metrics),
            "is_best": best is not None,
            EVALUATION_PARAMS: differ,
        }
        self._store.save(step, arrays, facts)

    def _facts(self, member: TrainedMember, state: TrainState) -> dict[str, Any]:
        """Returns what a checkpoint of a run at its end stores, too."""
        run = RunState.beginning(0, 0)._replace(
            in_epoch=EpochProgress(member.epoch),
            best_models=() if member.best is None else (member.best,),
            last_metrics=member.metrics,
        )
        stop = [member.reason or None, "stopped"]
        averages = [*(state.averages or {})]
        judged = self._trainer.config.judged(self._trainer.monitor.name)
        return {
            "record": self._record,
            "provisional": False,
            **run.to_json(ended=member.epoch),
            "stop": stop,
            "guard": None if state.guard is None else form_of(state.guard),
            "loader": {},
            "val_loader": None,
            "callbacks": [],
            "callback_names": [],
            "logger": None,
            **({"averages": averages, "judged": judged} if averages else {}),
        }

    def end(self, member: TrainedMember) -> None:
        """Waits for the checkpoint, and writes the curves and the status.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        self._store.close()
        if self._trainer.config.save_curves:
            title = f"{name_of(self._trainer)}/{self.path.name}: seed {member.seed}"
            best = member.best and member.best.epoch
            save_curves(History(self.path, title=title, best_epoch=best), self.path)
        failed = member.status == "diverged"
        self.directory.set_status(
            "failed" if failed else member.status,
            **({"resumable": False} if failed else {}),
            reason=member.reason,
            step=member.step,
            epoch=member.epoch,
            metrics=as_json(member.metrics),
            best=None if member.best is None else best_json(member.best),
        )


def extracted(
    member: TrainedMember, setting: Setting, record: Mapping[str, Any], root: str | Path
) -> Path:
    """Writes a member as a new run below a root, and returns its directory.

    Raises:
        RunDirectoryError: the directory cannot be written.
        CheckpointError: the checkpoint could not be written.
    """
    directory = RunDirectory(root, name_of(setting.trainer))
    directory.create()
    files = MemberFiles(directory, setting, record)
    logger = files.begin()
    for row in _rows(member.history):
        logger.log_metrics(row.pop("metrics"), **row)
    logger.close(member.status)
    files.save(member)
    files.end(member)
    return files.path


def _rows(history: History) -> list[dict[str, Any]]:
    """Returns the rows of a log that holds these metrics, in the order of their steps."""
    rows: dict[Any, dict[str, Any]] = {}
    steps, epochs = history.steps, history.epochs
    for name, values in history.items():
        kind = "step" if name.startswith("step/") else "test" * name.startswith("test")
        for step, epoch, value in zip(steps[name], epochs[name], values, strict=True):
            place = int(step), int(epoch), kind
            row = {"step": int(step), "epoch": int(epoch), "metrics": {}}
            rows.setdefault(place, row)["metrics"][name] = float(value)
    order = {"step": 0, "": 1, "test": 2}
    return [rows[place] for place in sorted(rows, key=lambda x: (x[0], x[1], order[x[2]]))]
