"""Trains, reports and prunes one trial of a search, and tests the best one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from distaff.callbacks import Callback, StepInfo, StopTraining
from distaff.data import as_loader, first_to_train, training_loader_of
from distaff.errors import CheckpointError, ConfigError, NonFiniteError
from distaff.execution.device_memory import is_out_of_memory
from distaff.metrics import as_json
from distaff.metrics.monitor import Monitor, as_monitor
from distaff.run.directory.run_directory import RunDirectory, read_status
from distaff.run.events import make_plan
from distaff.trainer import trials
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import as_trial, is_interrupted, path_of, watch
from distaff.tune.heart import Heart
from distaff.tune.objectives import Objective
from distaff.tune.search import Suggestion, Trial

T = TypeVar("T")

_log = logging.getLogger("distaff")


class TrainingCall(NamedTuple):
    """The trainer and the arguments of one training.

    Attributes:
        trainer: the trainer, which is not initialized.
        loaders: data for training, validation and the test.
        lengths: further arguments of `train_model`, such as `num_epochs`.
    """

    trainer: TrainerModule
    loaders: tuple[Any, Any, Any]
    lengths: dict[str, Any]


class Task(Protocol):
    """Turns a config into a training."""

    def using(self, config: Any, act: Callable[[TrainingCall], T]) -> T:
        """Returns what a function returns for the training of a config."""

    def trainer(self, config: Any) -> TrainerModule:
        """Returns the trainer of a config."""

    def check_fresh(self, one: Any, other: Any) -> None:
        """Checks that two calls have different train loaders, each with its own position.

        Raises:
            ConfigError: they have the same one.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoryTask:
    """Makes the trainer and the loaders of a training by functions of the config.

    Args:
        make_trainer: `(config) -> trainer`.
        make_loaders: `(config) -> (train, val, test)`; `test` may be None.
        num_epochs: epochs per trial.
        steps_per_epoch: steps per epoch; None for the length of the loader.
    """

    make_trainer: Callable[[Any], TrainerModule]
    make_loaders: Callable[[Any], tuple[Any, Any, Any]]
    num_epochs: int
    steps_per_epoch: int | None = None

    def using(self, config: Any, act: Callable[[TrainingCall], T]) -> T:
        """Returns what a function returns for the training of a config.

        Raises:
            ConfigError: a function returned something else than a new trainer or three loaders.
        """
        lengths = {"num_epochs": self.num_epochs, "steps_per_epoch": self.steps_per_epoch}
        return act(TrainingCall(self.trainer(config), self._loaders(config), lengths))

    def trainer(self, config: Any) -> TrainerModule:
        """Returns the trainer of a config.

        Raises:
            ConfigError: the function returned something else than a new trainer.
        """
        trainer = self.make_trainer(config) if callable(self.make_trainer) else None
        if not isinstance(trainer, TrainerModule):
            raise ConfigError(
                "make_trainer must be a function of the config that returns a TrainerModule; "
                f"{self.make_trainer!r} returned {trainer!r}."
            )
        check_trainer(trainer, "make_trainer returned")
        return trainer

    def check_fresh(self, one: Any, other: Any) -> None:
        """Checks that two calls have different train loaders.

        Raises:
            ConfigError: they have the same one.
        """
        if one is other:
            raise ConfigError(
                "make_loaders returned the same train loader twice. It keeps its position, so each "
                "trial would see the examples in another order. Create a new loader in each call: "
                "data.ArrayLoader(arrays, ...) copies no array."
            )

    def _loaders(self, config: Any) -> tuple[Any, Any, Any]:
        loaders = self.make_loaders(config) if callable(self.make_loaders) else None
        is_three = isinstance(loaders, tuple) and len(loaders) == 3
        if not is_three or any(loader is None for loader in loaders[:2]):
            raise ConfigError(
                "make_loaders must be a function of the config that returns new loaders (train, "
                "val, test). test may be None, but val may not: it is used to compare trials. "
                "Write lambda config: data.digits(config.batch_size)."
            )
        as_loader(loaders[0], name="train")  # arrays would be shuffled by the trainer's seed
        return loaders


def check_trainer(trainer: TrainerModule, giver: str) -> None:
    """Checks that a trainer is new, and writes runs.

    Raises:
        ConfigError: it is initialized already, or has no root.
    """
    if trainer.state is not None:
        raise ConfigError(
            f"{giver} a trainer that is already initialized, so every trial would have the same "
            "seed. Create a new trainer in each call, without example_batch."
        )
    if trainer.config.root is None:
        raise ConfigError(
            f"{giver} a trainer with root=None, but trials need run directories. Set a root."
        )


def check(task: Task, config: Any, objectives: Sequence[Monitor] = ()) -> TrainingCall:
    """Checks everything that can be checked without writing, and returns the training.

    Raises:
        DistaffError: an input is invalid (the subclass says which).
    """
    call = task.using(config, partial(_checked, objectives=objectives))
    again = task.using(config, lambda call: call)
    task.check_fresh(again.loaders[0], call.loaders[0])
    return call


def _checked(call: TrainingCall, objectives: Sequence[Monitor]) -> TrainingCall:
    trainer = as_trial(call.trainer, seed=call.trainer.config.seed)
    train, val, _ = call.loaders
    plan = make_plan(train, val, options=trainer.config, seed=trainer.config.seed, **call.lengths)
    trials.check(trainer, plan, list(map(Objective, objectives)))
    every, num_epochs = plan.val_every, call.lengths["num_epochs"]
    if every.unit != "epochs":
        raise ConfigError(
            "Trials are compared at the ends of epochs, but this trainer validates every "
            f"{every}. Validate every n epochs."
        )
    if isinstance(num_epochs, int) and every.count > num_epochs:
        raise ConfigError(
            f"Trials are compared by their validations, but num_epochs={num_epochs} with "
            f"one every {every} has none. Train longer, or validate more often."
        )
    return call


def run(task: Task, config: Any, suggestion: Suggestion) -> tuple[str, float | None]:
    """Trains one trial as an ordinary run, without the test set, or resumes it.

    Returns:
        The trial's status, and the monitored metric of its best model.
    """
    if suggestion.left is not None:
        status = read_status(suggestion.left)
        if status is not None and status["status"] == "pruned":
            return "pruned", None
    try:
        with Heart(suggestion.beat):
            return _resumed(task, config, suggestion)
    except (NonFiniteError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, NonFiniteError) and not is_out_of_memory(error):
            raise
        suggestion.note(reason=str(error))
        return "failed", None


def _resumed(task: Task, config: Any, suggestion: Suggestion) -> tuple[str, float | None]:
    """Resumes an interrupted attempt, or trains from the start."""
    train = partial(_trained, suggestion=suggestion)
    if suggestion.left is not None:
        try:
            return task.using(config, partial(train, resumes=True))
        except CheckpointError as error:
            _log.warning("%s starts again: %s", suggestion.key, error)
    return task.using(config, train)


def _trained(
    call: TrainingCall, suggestion: Suggestion, *, resumes: bool = False
) -> tuple[str, float | None]:
    trainer = as_trial(call.trainer, seed=call.trainer.config.seed + suggestion.origin)
    if resumes:
        trials.resume(trainer)
    trials.group(trainer, suggestion.study)
    watch(trainer, [Reporting(suggestion, trainer, call.lengths["num_epochs"])])
    suggestion.note(seed=trainer.config.seed)
    train, val, _ = call.loaders
    try:
        result = trainer.train_model(train, val, key=suggestion.key, **call.lengths)
    finally:
        if (path := path_of(trainer)) is not None:
            suggestion.note(path=str(path))
    if is_interrupted(trainer):  # the next start loads a trial that finished nevertheless
        raise KeyboardInterrupt
    if result.reason == "SIGTERM":
        raise SystemExit(143)
    status = "stopped" if result.status == "interrupted" else result.status
    metrics = None if result.best is None else result.best.metrics
    return outcome(suggestion, status, metrics, trainer.monitor)


def outcome(
    suggestion: Suggestion, status: str, metrics: Mapping[str, Any] | None, monitor: Monitor
) -> tuple[str, float | None]:
    """Returns the outcome of a training that has ended, and notes its objectives.

    Args:
        suggestion: the trial.
        status: how it ended.
        metrics: validation metrics of its best model; None without one.
        monitor: the metric that ranks models.
    """
    if metrics is None:
        suggestion.note(reason=f"no model has a {monitor.name}")
        return "failed", None
    names = suggestion.objectives
    found = {monitor.name: monitor.value(metrics), **{n: Monitor(n).value(metrics) for n in names}}
    for name, value in found.items():
        if not math.isfinite(value):
            suggestion.note(reason=f"the {name} of the best model is {value}")
            return "failed", None
    if names:
        suggestion.note(objectives={name: found[name] for name in names})
    return status, found[monitor.name]


def test(task: Task, config: Any, trial: Trial) -> dict[str, Any]:
    """Tests the best model of a trial, and writes the metrics to its run directory.

    Returns:
        Metrics `test/...` as strict JSON; empty without a test loader.
    """
    return task.using(config, partial(_tested, trial=trial))


def _tested(call: TrainingCall, trial: Trial) -> dict[str, Any]:
    train, _, test_loader = call.loaders
    if test_loader is None or trial.path is None:
        return {}
    seed = call.trainer.config.seed if trial.seed is None else trial.seed
    trainer = as_trial(call.trainer, seed=seed)
    trials.set_up(trainer, first_to_train(training_loader_of(train, trainer.config, seed=seed)))
    trainer.load_weights(trial.path)
    metrics = as_json(trainer.eval_model(test_loader, "test/"))
    RunDirectory.open(trial.path).write_json("metrics/test.json", metrics)
    return metrics


class Reporting(Callback):
    """Reports each validation of a trial, and stops it if the search prunes it."""

    def __init__(self, suggestion: Suggestion, trainer: TrainerModule, num_epochs: Any) -> None:
        self._suggestion, self._trainer = suggestion, trainer
        self._monitor, self._num_epochs = as_monitor(trainer.monitor), num_epochs

    def on_training_start(self, info: StepInfo) -> None:
        if (path := path_of(self._trainer)) is not None:  # a kill leaves no time to note it
            self._suggestion.note(path=str(path))

    def on_epoch_end(self, info: StepInfo) -> None:
        if self._monitor.is_of_training:
            self._report(info)

    def on_validation_end(self, info: StepInfo) -> None:
        if not self._monitor.is_of_training:
            self._report(info)

    def _report(self, info: StepInfo) -> None:
        value = self._monitor.value(info.metrics)
        self._suggestion.report(value, info.epoch)
        is_last = isinstance(self._num_epochs, int) and info.epoch >= self._num_epochs
        if not is_last and self._suggestion.should_prune():
            raise StopTraining(
                f"pruned after epoch {info.epoch} with {self._monitor.name} {value:.6g}", "pruned"
            )
