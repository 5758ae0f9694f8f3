"""Finds the trials whose programs differ in nothing but their arguments."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from distaff.core.config.encoding import diff, override, to_json
from distaff.errors import ConfigError
from distaff.optim import OptimizerConfig
from distaff.trainer.module import TrainerModule
from distaff.tune.population.paths import form_of
from distaff.tune.trial import Task


class Kind(NamedTuple):
    """What trials have in common that share their programs.

    Attributes:
        key: differs between trials that share none.
        static: their values that are built into the programs, by path of the config.
        traced: the paths in the trainer, such as `optimizer.learning_rate`, of their other values,
            by path of the config.
    """

    key: str
    static: dict[str, Any]
    traced: dict[str, str]


class TrialGrouping:
    """Finds out which searched values are arguments of the programs of a population.

    A value is one if changing it alone changes a single field of the trainer that a population can
    trace, and nothing else that is visible in the trainer.

    Args:
        task: turns a config into a training.
        config: the config of the study.

    Attributes:
        static: paths in the trainer whose values turned out not to be traceable.
    """

    def __init__(self, task: Task, config: Any) -> None:
        self._task, self._config, self.static = task, config, set[str]()
        self._places: dict[str, str | None] = {}

    def kind_of(self, values: Mapping[str, Any], trainer: TrainerModule) -> Kind:
        """Returns what a trial shares with others.

        Args:
            values: the values of the trial, by path of the config.
            trainer: its trainer.
        """
        seen, traced = described(trainer), dict[str, str]()
        for path, value in values.items():
            if not isinstance(value, float):
                continue
            if path not in self._places:
                self._places[path] = self._place_of(path, value, values, trainer)
            place = self._places[path]
            if place is None or place in self.static or _found(seen, place) != value:
                continue
            if form_of(trainer, place, value) != repr(value):
                traced[path] = place
        static = {path: value for path, value in values.items() if path not in traced}
        places = sorted(traced.values())
        for place in places:
            _remove(seen, place)
        if not isinstance(trainer.optimizer, OptimizerConfig):
            del seen["optimizer"]  # an object of which the values are all that is known
        key = repr((type(trainer).__qualname__, sorted(static.items()), places, seen))
        return Kind(key, static, traced)

    def _place_of(
        self, path: str, value: float, values: Mapping[str, Any], trainer: TrainerModule
    ) -> str | None:
        """Returns the path in the trainer of a value of the config, if it is there only."""
        near = 0.999 * value if value else 0.001
        try:
            config = override(self._config, {**values, path: near})
        except ConfigError:
            return None
        other = self._task.trainer(config)
        changes = diff(described(trainer), described(other))
        is_alone = list(changes.values()) == [(value, near)]
        return next(iter(changes)) if is_alone else None


def described(trainer: TrainerModule) -> dict[str, Any]:
    """Returns the options, the model and the optimizer of a trainer as strict JSON, by path."""
    parts = {"optimizer": trainer.optimizer, "model": trainer.model.record}
    return copy.deepcopy(to_json({**to_json(trainer.config), **parts}))


def _found(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _remove(tree: dict[str, Any], path: str) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree[parent]
    del tree[name]
