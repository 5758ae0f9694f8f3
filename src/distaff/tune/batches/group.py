"""Trains trials with the same static configuration as one population, batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distaff.callbacks.callbacks import Callbacks
from distaff.data import as_loader, closing_made
from distaff.errors import BatchError, ConfigError
from distaff.metrics import as_numbers
from distaff.metrics.monitor import Monitor, as_monitor
from distaff.run.directory.run_directory import read_status
from distaff.run.events import make_plan
from distaff.trainer.module import TrainerModule
from distaff.trainer.training import Inputs
from distaff.trainer.trials import as_trial, prepared_run, resume
from distaff.tune.heart import Heart
from distaff.tune.population import checks
from distaff.tune.population.directory import PopulationDirectory, recording_of
from distaff.tune.population.member import TrainedMember
from distaff.tune.population.settings import Setting
from distaff.tune.population.traceable import untraceable
from distaff.tune.population.training import PopulationRun
from distaff.tune.population.varied import TracedValues
from distaff.tune.search import Suggestion
from distaff.tune.trial import Reporting, TrainingCall, outcome

_OWNER = "A study in batches"
_REMEDY = "Or train one trial after the other, with batch=1 (--batch 1)."

Outcome = tuple[str, float | None]
"""The status of a trial, and the monitored metric of its best model."""


class UntraceableError(Exception):
    """Values of trials cannot be arguments of their programs.

    Args:
        reasons: the reasons by path of the trainer.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


class BatchTrial(NamedTuple):
    """A trial of a batch.

    Attributes:
        suggestion: its values, and how to report.
        trainer: its trainer.
        values: its traced values by path of the trainer.
    """

    suggestion: Suggestion
    trainer: TrainerModule
    values: Mapping[str, Any]


def check(call: TrainingCall) -> None:
    """Checks that the trials of a study can be trained in batches.

    Raises:
        ConfigError: they cannot.
    """
    trainer, (train, _, _) = call.trainer, call.loaders
    try:
        checks.check_trainer(trainer, _OWNER)
        if getattr(trainer.optimizer, "plateau", None) is not None:
            raise ConfigError(
                f"{_OWNER} does not lower the learning rate on a plateau, but the optimizer has "
                "plateau=Plateau(...)."
            )
        checks.check_plan(_plan(call, trainer), _OWNER)
        as_loader(train, name="train")
    except BatchError as error:
        raise ConfigError(
            f"{_OWNER} gives the trials of a batch the same batches of data, but arrays are "
            "shuffled by the seed of each trial. Pass data.ArrayLoader(arrays, batch_size=..., "
            f"shuffle=True) instead. {_REMEDY}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{error} {_REMEDY}") from error


def _plan(call: TrainingCall, trainer: TrainerModule) -> Any:
    seed, options = trainer.config.seed, trainer.config
    return make_plan(*call.loaders[:2], options=options, seed=seed, **call.lengths)


class TrialGroup:
    """Trains trials that differ in seeds and traced values only, and keeps their programs.

    Args:
        show: shows a line.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._run, self._most = show, None, 0
        self._prepared: Any = None

    @property
    def num_programs(self) -> int:
        """The number of programs compiled so far, for training and evaluation."""
        return 0 if self._run is None else self._run.num_programs

    @property
    def room(self) -> int | None:
        """The number of trials that the programs can train at once; None for any number."""
        return self._most if self._run is not None and self._run.form == "stacked" else None

    def train(self, call: TrainingCall, trials: Sequence[BatchTrial]) -> list[Outcome]:
        """Trains trials as members of a population, without the test set.

        Args:
            call: the training of the static configuration, with new loaders.
            trials: the trials. If all were interrupted together, they resume.

        Returns:
            The outcome of each trial.

        Raises:
            UntraceableError: values must be static; nothing has been trained or written.
        """
        trainer = as_trial(call.trainer, seed=call.trainer.config.seed)
        if trials[0].suggestion.left is not None:
            resume(trainer)
        settings = [_setting(each, trainer.config) for each in trials]
        plan = _plan(call, trainer)
        inputs = Inputs(plan, (*call.loaders[:2], None), trainer.config)
        with closing_made(*inputs.made):
            run = self._begun(trainer, plan, settings, trials)
            for member, each in zip(run.members, trials, strict=True):
                report = Reporting(each.suggestion, self._prepared.trainer, plan.num_epochs)
                member.callbacks = Callbacks([*member.callbacks.callbacks, report])
            members = self._recorded(run, settings, trials, plan.length)
        monitor = as_monitor(trainer.monitor)
        pairs = zip(trials, members, strict=True)
        return [_outcome(each.suggestion, member, monitor) for each, member in pairs]

    def _begun(
        self,
        trainer: TrainerModule,
        plan: Any,
        settings: Sequence[Setting],
        trials: Sequence[BatchTrial],
    ) -> PopulationRun:
        """Returns the training of a population, with the programs of earlier ones."""
        run = self._run
        if run is not None:
            here = self._prepared.workspace
            here.recording, self._prepared.run.plan = recording_of(trainer), plan
            here.feeds.validate_on(plan.val_loaders.values(), plan.train_loader)
            run.again(settings)
            return run
        # A study has checked a validation, which would be a program more.
        checked = trainer.variant(check_validation=False)
        self._prepared = prepared_run(checked, plan, None, recording_of(trainer))
        paths = list(trials[0].values)
        if reasons := untraceable(self._prepared, settings, paths):
            raise UntraceableError(reasons)
        traced = TracedValues(self._prepared, paths)
        self._run = PopulationRun(self._prepared, settings, "auto", traced)
        self._most = len(settings)
        return self._run

    def _recorded(
        self,
        run: PopulationRun,
        settings: Sequence[Setting],
        trials: Sequence[BatchTrial],
        length: Any,
    ) -> Sequence[TrainedMember]:
        """Trains the members in a directory, from which they resume, and writes them."""
        suggestions = [each.suggestion for each in trials]
        keys = [each.key for each in suggestions]
        extra = {"num_epochs": length, "trials": keys}
        indices = range(len(settings))
        directory = PopulationDirectory(self._prepared, run, settings, indices, extra)
        with directory.opened(self._show, keys[0]):
            for each, setting, path in zip(
                suggestions, settings, directory.paths or [], strict=True
            ):
                each.note(seed=setting.seed, path=str(path))

            def beat() -> None:
                for each in suggestions:
                    each.beat()

            with Heart(beat):
                run.train(_ignore, directory.save)
            return directory.write(run.tested(None))


def _ignore(line: str) -> None:
    """Shows no line per epoch."""


def _setting(trial: BatchTrial, options: Any) -> Setting:
    """Returns a trial as a member; the record of a population has the seed of the study."""
    trainer = as_trial(trial.trainer, seed=options.seed)
    return Setting(options.seed + trial.suggestion.origin, dict(trial.values), trainer)


def _outcome(suggestion: Suggestion, member: TrainedMember, monitor: Monitor) -> Outcome:
    if member.status == "pruned":
        return "pruned", None
    if member.status == "diverged":
        suggestion.note(reason=member.reason)
        return "failed", None
    metrics = None if member.best is None else member.best.metrics
    return outcome(suggestion, member.status, metrics, monitor)


def outcome_left(suggestion: Suggestion, monitor: Monitor) -> Outcome | None:
    """Returns the outcome of a trial whose process was killed after its end, from its directory."""
    status = None if suggestion.left is None else read_status(suggestion.left)
    if status is None or status["status"] not in ("finished", "stopped", "pruned", "failed"):
        return None
    if status["status"] == "failed":
        return None if status.get("resumable", True) else ("failed", None)
    if status["status"] == "pruned":
        return "pruned", None
    best = status.get("best")
    metrics = None if best is None else as_numbers(best["metrics"])
    return outcome(suggestion, status["status"], metrics, monitor)
