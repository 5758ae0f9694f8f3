"""Optuna: its samplers, pruners and storages as the engine of `distaff.tune.study`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distaff.config import to_json
from distaff.errors import ConfigError, nearest
from distaff.tune.search import Trial
from distaff.tune.space import Choice, Dimension, Int, Space

_STATES = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_OPTIONS = ("storage", "sampler", "pruner", "study_name")


class OptunaSuggestion:
    """A trial of Optuna that is under way.

    Args:
        trial: as `Study.ask` returns it.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial
        self.number, self.values = trial.number, dict(trial.params)

    def report(self, value: float, epoch: int) -> None:
        """Hands a value on to the pruner."""
        self.trial.report(value, epoch)

    def should_prune(self) -> bool:
        """Asks the pruner."""
        return self.trial.should_prune()

    def note(self, **facts: Any) -> None:
        """Keeps facts as the trial's user attributes."""
        for name, fact in facts.items():
            self.trial.set_user_attr(name, fact)


class OptunaSearch:
    """A study of Optuna, opened again where it exists already.

    Args:
        space: what varies, by dotted path.
        mode: whether a smaller (`"min"`) or a larger (`"max"`) value is better.
        root: the folder of the journal, where no storage is given.
        **options: `storage`, `sampler`, `pruner`, `study_name`, see `distaff.tune.study`.

    Raises:
        ConfigError: an option is unknown, or the study was begun with another space or direction.
    """

    def __init__(
        self, space: Space, mode: Literal["min", "max"], *, root: str, **options: Any
    ) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise ConfigError(f"A study has no option {name!r}. {nearest(name, _OPTIONS)}")
        name = options.get("study_name") or "study"
        form = {"mode": mode, "space": _as_json(space)}
        storage = _storage(options.get("storage") or Path(root) / f"{name}.journal")
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=options.get("sampler"),
            pruner=options.get("pruner"),
            direction="minimize" if mode == "min" else "maximize",
            load_if_exists=True,
        )
        begun = self.recall("form")
        if begun is None:
            self.remember("form", form)
        elif begun != form:
            raise ConfigError(
                f"A study goes on with the space it was begun with; {name!r} was begun with "
                f"{begun}, and is given {form}. Choose another study_name."
            )
        if options.get("sampler") is None:
            # With one seed, a study that is continued would begin with the same draws again.
            self.study.sampler = optuna.samplers.TPESampler(seed=len(self.study.trials))
        self._distributions = {path: _distribution(each) for path, each in space.items()}
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            if _is_orphan(trial):
                self._abandon(trial.number, trial.params)

    def enqueue_first(self, values: dict[str, Any]) -> None:
        """Has these values tried first, in a study without trials."""
        if not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(values)

    def ask(self) -> OptunaSuggestion:
        """Begins a trial."""
        suggestion = OptunaSuggestion(self.study.ask(self._distributions))
        suggestion.note(owner=self._owner)
        return suggestion

    def tell(self, suggestion: OptunaSuggestion, status: str, value: float | None) -> None:
        """Ends a trial."""
        suggestion.note(status=status)
        state = _STATES[status]
        values = value if state == TrialState.COMPLETE else None
        self.study.tell(suggestion.number, values, state=state)

    def abandon(self, suggestion: OptunaSuggestion) -> None:
        """Ends a trial that was interrupted: its values are tried again later."""
        self._abandon(suggestion.number, suggestion.values)

    def best(self) -> Trial | None:
        """Returns the best trial that was not pruned; None where there is none."""
        complete = self.study.get_trials(states=[TrialState.COMPLETE])
        return _as_trial(self.study.best_trial) if complete else None

    def remember(self, name: str, fact: Any) -> None:
        """Keeps strict JSON as a user attribute of the study."""
        self.study.set_user_attr(name, fact)

    def recall(self, name: str) -> Any:
        """Returns a user attribute of the study, or None."""
        return self.study.user_attrs.get(name)

    def trials(self) -> list[Trial]:
        """Returns all trials that came to an end of their own, by number."""
        found = self.study.get_trials(states=list(_STATES.values()))
        return [_as_trial(trial) for trial in found if not _is_abandoned(trial)]

    def underway(self) -> int:
        """Returns how many trials other processes are at."""
        return len(self.study.get_trials(states=[TrialState.RUNNING]))

    def _abandon(self, number: int, values: dict[str, Any]) -> None:
        self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        self.study.enqueue_trial(values)


def _storage(storage: Any) -> BaseStorage | str:
    if isinstance(storage, BaseStorage) or (isinstance(storage, str) and "://" in storage):
        return storage
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    if isinstance(dimension, Int):
        return optuna.distributions.IntDistribution(
            dimension.low, dimension.high, log=dimension.log
        )
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _as_json(space: Space) -> dict[str, Any]:
    return {
        path: {"kind": type(dimension).__name__, **to_json(dimension)}
        for path, dimension in sorted(space.items())
    }


def _as_trial(trial: FrozenTrial) -> Trial:
    facts = trial.user_attrs
    path = facts.get("path")
    return Trial(
        number=trial.number,
        status=facts["status"],
        value=trial.value,
        values=dict(trial.params),
        seed=facts.get("seed"),
        path=None if path is None else Path(path),
    )


def _is_abandoned(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and trial.user_attrs.get("status") != "failed"


def _is_orphan(trial: FrozenTrial) -> bool:
    """Tells whether the process that had begun a trial on this machine is gone."""
    host, _, pid = trial.user_attrs.get("owner", "").rpartition(":")
    if host != socket.gethostname():
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
