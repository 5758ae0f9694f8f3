"""Trains, reports and prunes one trial of a search, and tests the best one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from distaff.callbacks import Callback, StepInfo, StopTraining
from distaff.data import as_loader, first_batch
from distaff.errors import ConfigError, NonFiniteError
from distaff.metrics import as_json
from distaff.metrics.monitor import Monitor
from distaff.run.directory.run_directory import RunDirectory
from distaff.run.events import make_plan
from distaff.trainer import trials
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import as_trial, path_of, watch
from distaff.tune.search import Suggestion, Trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Turns a config into a run.

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

    def trainer(self, config: Any, seed_offset: int = 0) -> TrainerModule:
        """Returns a new trainer without a display, with its own seed.

        Raises:
            ConfigError: the trainer is already initialized, or writes no runs.
        """
        trainer = self.make_trainer(config) if callable(self.make_trainer) else None
        if not isinstance(trainer, TrainerModule):
            raise ConfigError(
                "make_trainer must be a function of the config that returns a TrainerModule; "
                f"{self.make_trainer!r} returned {trainer!r}."
            )
        if trainer.state is not None:
            raise ConfigError(
                "make_trainer returned a trainer that is already initialized, so every trial would "
                "have the same seed. Create a new trainer in each call, without example_batch."
            )
        if trainer.config.root is None:
            raise ConfigError(
                "make_trainer returned a trainer with root=None, but trials need run directories. "
                "Set a root."
            )
        return as_trial(trainer, seed=trainer.config.seed + seed_offset)

    def loaders(self, config: Any) -> tuple[Any, Any, Any]:
        """Returns `(train, val, test)`.

        Raises:
            ConfigError: they are not such a tuple, or `train` or `val` is None.
        """
        loaders = self.make_loaders(config) if callable(self.make_loaders) else None
        is_three = isinstance(loaders, tuple) and len(loaders) == 3
        if not is_three or any(loader is None for loader in loaders[:2]):
            raise ConfigError(
                "make_loaders must be a function of the config that returns new loaders (train, "
                "val, test). test may be None, but val may not: it is used to compare trials. "
                "Write lambda config: data.digits(config.batch_size)."
            )
        return loaders

    def check(self, config: Any) -> TrainerModule:
        """Checks everything that can be checked without writing, and returns the trainer.

        Raises:
            DistaffError: an input is invalid (the subclass says which).
        """
        trainer = self.trainer(config)
        train, val, _ = self.loaders(config)
        as_loader(train, name="train")  # arrays would be shuffled by the seed of the trainer
        plan = make_plan(
            train,
            val,
            num_epochs=self.num_epochs,
            steps_per_epoch=self.steps_per_epoch,
            options=trainer.config,
        )
        trials.check(trainer, plan)
        self.trainer(config)  # raises if it is the same trainer
        if self.loaders(config)[0] is train:
            raise ConfigError(
                "make_loaders returned the same train loader twice. It keeps its position, so each "
                "trial would see the examples in another order. Create a new loader in each call: "
                "data.ArrayLoader(arrays, ...) copies no array."
            )
        every = plan.val_every
        if every.unit != "epochs":
            raise ConfigError(
                "Trials are compared at the ends of epochs, but this trainer validates every "
                f"{every}. Validate every n epochs."
            )
        if every.count > self.num_epochs:
            raise ConfigError(
                f"Trials are compared by their validations, but num_epochs={self.num_epochs} with "
                f"one every {every} has none. Train longer, or validate more often."
            )
        return trainer

    def run(self, config: Any, suggestion: Suggestion) -> tuple[str, float | None]:
        """Trains one trial as an ordinary run, without the test set.

        Returns:
            The trial's status, and the monitored metric of its best model.
        """
        trainer = self.trainer(config, suggestion.number)
        train, val, _ = self.loaders(config)
        reporting = Reporting(suggestion, trainer.monitor, self.num_epochs)
        watch(trainer, [reporting])
        suggestion.note(seed=trainer.config.seed)
        epochs, steps = self.num_epochs, self.steps_per_epoch
        try:
            result = trainer.train_model(train, val, num_epochs=epochs, steps_per_epoch=steps)
        except NonFiniteError as error:
            suggestion.note(reason=str(error))
            return "failed", None
        finally:
            if (path := path_of(trainer)) is not None:
                suggestion.note(path=str(path))
        if result.reason == "Ctrl-C":
            raise KeyboardInterrupt
        value = None if result.best is None else trainer.monitor.value(result.best.metrics)
        if value is None or not math.isfinite(value):
            suggestion.note(reason=f"the best {trainer.monitor.name} is {value}")
            return "failed", None
        return ("stopped" if result.status == "interrupted" else result.status), value

    def test(self, config: Any, trial: Trial) -> dict[str, Any]:
        """Tests the best model of a trial, and writes the metrics to its run directory.

        Returns:
            Metrics `test/...` as strict JSON; empty without a test loader.
        """
        train, _, test = self.loaders(config)
        if test is None or trial.path is None:
            return {}
        trainer = self.trainer(config, trial.number)
        trials.set_up(trainer, first_batch(as_loader(train, name="train"), name="train"))
        trainer.load_weights(trial.path)
        metrics = as_json(trainer.eval_model(test, "test/"))
        RunDirectory.open(trial.path).write_json("metrics/test.json", metrics)
        return metrics


class Reporting(Callback):
    """Reports each validation of a trial, and stops it if the search prunes it."""

    def __init__(self, suggestion: Suggestion, monitor: Monitor, num_epochs: int) -> None:
        self._suggestion, self._monitor, self._num_epochs = suggestion, monitor, num_epochs

    def on_epoch_end(self, info: StepInfo) -> None:
        if self._monitor.is_of_training:
            self._report(info)

    def on_validation_end(self, info: StepInfo) -> None:
        if not self._monitor.is_of_training:
            self._report(info)

    def _report(self, info: StepInfo) -> None:
        value = self._monitor.value(info.metrics)
        self._suggestion.report(value, info.epoch)
        is_last = info.epoch >= self._num_epochs
        if not is_last and self._suggestion.should_prune():
            raise StopTraining(
                f"pruned after epoch {info.epoch} with {self._monitor.name} {value:.6g}", "pruned"
            )
