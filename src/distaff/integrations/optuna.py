"""Optuna: samplers, pruners and storages for `distaff.tune.study`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GridSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from distaff.core import optional
from distaff.core.config.encoding import diff, to_json
from distaff.core.paths import as_path
from distaff.errors import ConfigError
from distaff.run.directory.process import is_alive, this_process
from distaff.tune.objectives import directions
from distaff.tune.search import Trial, checked_options, described, listed
from distaff.tune.space import Space, SpaceFn, drawn, restored, stored, with_tuples

MAX_ATTEMPTS = 3
"""Number of attempts with the same values before they count as failed."""

# A trial without an owner after this time belongs to a process that was killed.
_PATIENCE = timedelta(minutes=1)
# So does one whose process, on another machine, has not reported for as long.
_SILENCE = timedelta(minutes=5)
_STATES = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_OPTIONS = {
    "storage": (str, Path, BaseStorage),
    "sampler": (str, BaseSampler),
    "pruner": (BasePruner,),
    "study_name": (str,),
}


class OptunaSuggestion:
    """A running Optuna trial.

    If another process ends it, because this one seems to be dead, later reports are ignored.

    Args:
        trial: the trial from `Study.ask`.
        place: its number, if the study had never been interrupted.
        root: the folder of all runs.
        objectives: names of the objectives, if there are several.
    """

    def __init__(
        self, trial: optuna.Trial, place: int, root: str, objectives: Sequence[str] = ()
    ) -> None:
        self.trial, self._root, self.number = trial, root, trial.number
        self.objectives = tuple(objectives)
        self.values: dict[str, Any] = {}
        left = trial.user_attrs.get("left")
        self.origin: int = trial.user_attrs.get("origin", place)
        self.left = None if left is None else Path(root) / left
        self.study: str = trial.study.study_name
        self.key = f"{self.study}/trial-{self.origin}"
        self._reported = set(trial.storage.get_trial(trial._trial_id).intermediate_values)
        self.on_report: Callable[[], object] = lambda: None

    def report(self, value: float, epoch: int) -> None:
        """Reports a value to the pruner, unless an earlier attempt has reported it."""
        if self.objectives:  # of which Optuna stores no intermediate values
            self.note(reached=epoch)
        elif epoch not in self._reported:
            with suppress(UpdateFinishedTrialError):
                self.trial.report(value, epoch)
        self.on_report()

    def should_prune(self) -> bool:
        """Returns whether the pruner ends the trial."""
        if self.objectives:
            return False
        with suppress(UpdateFinishedTrialError):
            return self.trial.should_prune()
        return False

    def note(self, **facts: Any) -> None:
        """Stores user attributes of the trial."""
        for name, fact in facts.items():
            fact = os.path.relpath(fact, self._root) if name == "path" else fact
            with suppress(UpdateFinishedTrialError):
                self.trial.set_user_attr(name, fact)

    def beat(self) -> None:
        """Stores that its process is alive."""
        self.note(seen=datetime.now(UTC).timestamp())


class OptunaSearch:
    """An Optuna study, which is reopened if it exists.

    Args:
        space: the search space, by dotted path, or as a function of the trial.
        form: the settings that must be equal for trials to be comparable, as strict JSON; `"mode"`
            is `"min"` or `"max"`, `"objectives"` has the modes of several objectives by name.
        first: values of the first trial; None to leave them to the sampler.
        seed: seed of a sampler that is given by name.
        root: the folder of all runs, and of the default storage.
        options: `storage`, `sampler`, `pruner`, `study_name`, see `distaff.tune.study`.

    Raises:
        ConfigError: an option is unknown or of the wrong type, a pruner is given for several
            objectives, or the study has another form.
        RunDirectoryError: the storage cannot be opened.
    """

    def __init__(
        self,
        space: Space | SpaceFn,
        form: Mapping[str, Any],
        *,
        first: Mapping[str, Any] | None,
        seed: int,
        root: str,
        options: Mapping[str, Any],
    ) -> None:
        options = checked_options(options, _OPTIONS)
        name = options.get("study_name", "study")
        root = str(as_path(root, "root"))
        self._space, self._root, self._seed = space, root, seed
        self.on_change: Callable[[], object] = lambda: None
        self._objectives, self._mode = directions(form), form["mode"]
        modes = self._objectives.values() or [form["mode"]]
        ways: list[Any] = ["minimize" if mode == "min" else "maximize" for mode in modes]
        sampler = options.get("sampler", "tpe")
        methods = optional.load("studies.methods", extra="tune")
        methods.check_pruner(options.get("pruner"), list(self._objectives))
        self._make_sampler = methods.sampler(sampler) if isinstance(sampler, str) else None
        storages = optional.load("studies.storages", extra="tune")
        study: dict[str, Any] = {
            "storage": storages.opened(options.get("storage", Path(root) / f"{name}.journal")),
            "study_name": name,
            "sampler": sampler if self._make_sampler is None else self._make_sampler(seed),
            "pruner": options.get("pruner"),
        }
        try:
            self.study = optuna.create_study(directions=ways, **study)
        except DuplicatedStudyError:
            self.study = optuna.load_study(**study)
            if self._make_sampler is None:
                # With the same seed, all processes would start with the same draws.
                self.study.sampler.reseed_rng()
        else:
            # A grid cannot have values that are not on it.
            if first is not None and not isinstance(sampler, GridSampler):
                self.study.enqueue_trial(stored(first))
        self._check_form(form, ways)
        self._objectives = directions(self.recall("form"))  # in the order of their directions

    def _check_form(self, form: Mapping[str, Any], ways: list[str]) -> None:
        begun = self.recall("form")
        name = self.study.study_name
        found = [way.name.lower() for way in self.study.directions]
        if begun is None and found != ways:
            raise ConfigError(
                f"The study {name!r} was not created by distaff.tune.study: its direction is "
                f"{', '.join(found)}, not {', '.join(ways)}. Choose another study_name."
            )
        if begun is None:
            self.remember("form", form)
        elif changes := diff(begun, form):
            raise ConfigError(
                "Changing a study would make its trials incomparable; "
                f"{name!r} was begun with {listed(changes)}. Choose another study_name (--name)."
            )

    def ask(self, num_trials: int) -> OptunaSuggestion | None:
        """Starts a trial; returns None if the study is complete."""
        self._recover()
        if self._is_exhausted() or len(self._counted()) >= num_trials:
            return None
        trial = self.study.ask()
        place = self._place(trial.number)
        suggestion = OptunaSuggestion(trial, place, self._root, tuple(self._objectives))
        try:
            suggestion.note(owner=this_process(), origin=suggestion.origin)
            suggestion.beat()
            # If several processes start the last trial at once, all but the first withdraw.
            numbers = [trial.number for trial in self._counted()]
            is_late = sum(number < suggestion.number for number in numbers) >= num_trials
            if is_late or self._is_double(suggestion.number):
                self._withdraw(suggestion)
                return None if is_late else self.ask(num_trials)
            self._fill(suggestion)
        except Exception:  # the sampler does not support the space: a retry would fail too
            self._withdraw(suggestion)
            raise
        except BaseException:
            self.abandon(suggestion)
            raise
        suggestion.on_report = self.on_change
        self.on_change()
        return suggestion

    def _fill(self, suggestion: OptunaSuggestion) -> None:
        """Gives a trial its values, which depend on the seed and its place in the study."""
        if self._make_sampler is not None:
            seeds = np.random.SeedSequence([self._seed % 2**64, suggestion.origin])
            # Optuna draws the values as they are suggested, after the trial has its number.
            self.study.sampler = self._make_sampler(int(seeds.generate_state(1)[0]))
        if callable(self._space):
            found: Any = self._space(suggestion.trial)
            suggestion.values = dict(found)
            suggestion.note(values=to_json(suggestion.values))
        else:
            suggest = optional.load("studies.methods", extra="tune").suggest
            suggestion.values = drawn(self._space, partial(suggest, suggestion.trial))

    def tell(self, suggestion: OptunaSuggestion, status: str, value: float | None) -> Trial:
        """Ends a trial."""
        suggestion.note(status=status)
        state, values = _STATES[status], [value]
        if self._objectives:
            suggestion.note(monitored=value)
            noted = self._find(suggestion.number).user_attrs.get("objectives", {})
            values = [noted.get(name) for name in self._objectives]
        self._end(suggestion.number, state, values if state == TrialState.COMPLETE else None)
        return self._as_trial(self._find(suggestion.number))

    def abandon(self, suggestion: OptunaSuggestion, *, resumes: bool = True) -> None:
        """Ends an interrupted trial; its values are tried again."""
        if not resumes:
            suggestion.note(restart=True)
        self._end(suggestion.number, TrialState.FAIL)
        self._retry_lost()

    def trials(self) -> list[Trial]:
        """Returns all completed trials, by number."""
        return [self._as_trial(trial) for trial in self._counted() if trial.state.is_finished()]

    def table(self) -> list[Trial]:
        """Returns all completed and running trials, by number."""
        return [self._as_trial(trial) for trial in self._counted()]

    def front(self) -> list[Trial]:
        """Returns the trials of the Pareto front, by number."""
        numbers = {trial.number for trial in self.study.best_trials}
        return [trial for trial in self.trials() if trial.number in numbers]

    def underway(self) -> list[str]:
        """Returns descriptions of the running trials."""
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        return [described(trial.number, trial.user_attrs.get("owner")) for trial in running]

    def remember(self, name: str, fact: Any) -> None:
        """Stores strict JSON as a user attribute of the study."""
        self.study.set_user_attr(name, fact)

    def recall(self, name: str) -> Any:
        """Returns a user attribute of the study, or None."""
        return self.study.user_attrs.get(name)

    def _find(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _place(self, number: int) -> int:
        """Returns the number of a trial without the earlier ones that repeat others."""
        earlier = self.study.get_trials(deepcopy=False)[:number]
        return sum("retry_of" not in trial.user_attrs for trial in earlier)

    def _counted(self) -> list[FrozenTrial]:
        """Returns the completed and running trials."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state == TrialState.RUNNING or _status(trial) is not None
        ]

    def _is_exhausted(self) -> bool:
        if self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            return False
        sampler = self.study.sampler
        if isinstance(sampler, GridSampler):
            return sampler.is_exhausted(self.study)
        return self.recall("exhausted") == type(sampler).__name__

    def _end(self, number: int, state: TrialState, values: Any = None) -> None:
        """Ends a trial, unless another process has ended it already."""
        try:
            self.study.tell(number, values, state=state)
        except (ValueError, RuntimeError) as error:
            trial = self._find(number)
            if not trial.state.is_finished():
                raise
            # An exhausted sampler calls Study.stop, which raises outside of Study.optimize, after
            # the end of the trial is stored.
            is_exhausted = not isinstance(error, ValueError | UpdateFinishedTrialError)
            if is_exhausted and _status(trial) is not None:
                self.remember("exhausted", type(self.study.sampler).__name__)

    def _withdraw(self, suggestion: OptunaSuggestion) -> None:
        """Ends a trial that counts nowhere and is not tried again."""
        suggestion.note(withdrawn=True)
        self._end(suggestion.number, TrialState.FAIL)

    def _recover(self) -> None:
        """Abandons the trials of dead processes."""
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if _is_orphaned(trial):
                self._end(trial.number, TrialState.FAIL)
        self._retry_lost()

    def _retry_lost(self) -> None:
        """Queues the values of abandoned trials, also where a process was killed before it did."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            is_lost = trial.state == TrialState.FAIL and _status(trial) is None
            if is_lost and trial.number not in retried and "withdrawn" not in trial.user_attrs:
                self.study.add_trial(self._retry(trial))

    def _is_double(self, number: int) -> bool:
        """Whether two processes have queued the values of the same abandoned trial."""
        trials = self.study.get_trials(deepcopy=False)
        source = trials[number].user_attrs.get("retry_of")
        same = (each.number for each in trials if each.user_attrs.get("retry_of") == source)
        return source is not None and min(same) < number

    def _retry(self, trial: FrozenTrial) -> FrozenTrial:
        attempts = optional.load("studies.attempts", extra="tune")
        return attempts.retry(trial, self._place(trial.number), _num_attempts(trial))

    def _as_trial(self, trial: FrozenTrial) -> Trial:
        facts, reports = trial.user_attrs, trial.intermediate_values
        path, is_running = facts.get("path"), trial.state == TrialState.RUNNING
        value = facts.get("monitored") if self._objectives else trial.value
        if is_running and reports:
            value = (min if self._mode == "min" else max)(reports.values())
        return Trial(
            number=trial.number,
            status="running" if is_running else _status(trial) or "abandoned",
            value=value,
            values=self._values_of(trial),
            seed=facts.get("seed"),
            path=None if path is None else Path(self._root) / path,
            objectives=facts.get("objectives"),
            epoch=max(reports, default=facts.get("reached")),
        )

    def _values_of(self, trial: FrozenTrial) -> dict[str, Any]:
        if callable(self._space):
            return {n: with_tuples(x) for n, x in trial.user_attrs.get("values", {}).items()}
        return restored(self._space, trial.params)


def _status(trial: FrozenTrial) -> str | None:
    """Returns the status of a completed trial; None for running and abandoned ones."""
    status = trial.user_attrs.get("status")
    if _STATES.get(status) == trial.state:
        return status
    is_over = _num_attempts(trial) >= MAX_ATTEMPTS and "withdrawn" not in trial.user_attrs
    return "failed" if is_over and trial.state == TrialState.FAIL else None


def _num_attempts(trial: FrozenTrial) -> int:
    return trial.user_attrs.get("attempt", 1)


def _is_orphaned(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get("owner")
    if owner is not None and (alive := is_alive(owner)) is not None:
        return not alive
    if (seen := trial.user_attrs.get("seen")) is not None:
        return datetime.now(UTC).timestamp() - seen > _SILENCE.total_seconds()
    begun = trial.datetime_start
    return begun is not None and datetime.now() - begun > _PATIENCE
