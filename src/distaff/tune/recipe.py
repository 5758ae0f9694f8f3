"""A recipe as the task of a study: a function that trains once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Never

from distaff.errors import ConfigError
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import instead_of_training
from distaff.tune.trial import T, TrainingCall, check_trainer


class RecipeTask(NamedTuple):
    """Runs a recipe up to its call of `train_model`, which becomes the training of a trial.

    What the recipe does after that call, such as figures, is left out.

    Attributes:
        recipe: `(config) -> anything`, which calls `train_model`.
        name: its name, for errors.
    """

    recipe: Callable[[Any], Any]
    name: str

    def using(self, config: Any, act: Callable[[TrainingCall], T]) -> T:
        """Returns what a function returns for the training of a config.

        Raises:
            ConfigError: the recipe trains nothing, has no validation data, or a trainer that is
                not new.
        """
        found: list[T] = []

        def train(trainer: TrainerModule, arguments: dict[str, Any]) -> Never:
            found.append(act(self._call(trainer, arguments)))
            raise _Done

        with instead_of_training(train):
            try:
                self.recipe(config)
            except _Done:
                return found[0]
        raise ConfigError(
            f"The recipe {self.name!r} ended without a call of train_model, so there is nothing to "
            "compare. Train with a TrainerModule, such as tasks.Classifier."
        )

    def trainer(self, config: Any) -> TrainerModule:
        """Returns the trainer of a config; the recipe reads its data, too.

        Raises:
            ConfigError: see `using`.
        """
        return self.using(config, lambda call: call.trainer)

    def check_fresh(self, one: Any, other: Any) -> None:
        """Checks that two calls of the recipe have different train loaders, or arrays.

        Raises:
            ConfigError: they have the same one.
        """
        if one is other and hasattr(one, "get_state"):
            raise ConfigError(
                f"The recipe {self.name!r} used the same train loader twice. It keeps its "
                "position, so each trial would see the examples in another order. Create the "
                "loader within the recipe."
            )

    def _call(self, trainer: TrainerModule, arguments: dict[str, Any]) -> TrainingCall:
        check_trainer(trainer, f"The recipe {self.name!r} made")
        val = arguments.get("val_loader")
        if val is None:
            raise ConfigError(
                f"The recipe {self.name!r} trains without validation data, by which trials are "
                "compared. Pass a val_loader to train_model."
            )
        loaders = arguments["train_loader"], val, arguments.get("test_loader")
        given = {n: arguments[n] for n in ("steps_per_epoch", "repeat") if n in arguments}
        lengths = {"num_epochs": arguments["num_epochs"], "steps_per_epoch": None, **given}
        return TrainingCall(trainer, loaders, lengths)


class _Done(BaseException):
    """Leaves a recipe after its training. No `except Exception` of the recipe catches it."""
