"""Trains a population whose worst members continue from its best ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distaff.callbacks import EarlyStopping
from distaff.core.config.checks import whole
from distaff.core.config.encoding import to_json
from distaff.errors import ConfigError
from distaff.run.events import Plan
from distaff.trainer.module import TrainerModule
from distaff.tune.dimension import Float
from distaff.tune.evolution.rules import Evolution
from distaff.tune.population.checks import check_trainer
from distaff.tune.population.multi_seed import trained_population
from distaff.tune.population.result import Population
from distaff.tune.population.settings import Setting, grouped, make_settings
from distaff.tune.population.training import PopulationRun

_OWNER = "population_based_training"
_MOST = 0.5


def population_based_training(
    trainer: TrainerModule,
    train_loader: Any,
    val_loader: Any,
    test_loader: Any = None,
    *,
    space: Mapping[str, Float],
    num_epochs: int,
    size: int = 16,
    every: int = 1,
    **options: Any,
) -> Population:
    """Trains members whose worst ones continue from the best, with perturbed values.

    After every few epochs, the worst members by the trainer's monitor take over the state and the
    values of random members among the best. Each value is then multiplied by 0.8 or 1.25, or, with
    probability 0.25, drawn again from its range (Jaderberg et al. 2017, arXiv:1711.09846, section
    4). A member that diverged is replaced, too. All members train in the same program.

    The history of a member has its values at each epoch, by path: the schedule that was found. Its
    `settings` are its last values. It is saved and resumed like any population.

    Args:
        trainer: as for `multi_seed`, without `EarlyStopping`. Its seed decides all draws.
        train_loader: as for `train_model`; all members get the same batches.
        val_loader: as for `train_model`; its metrics decide which members are replaced.
        test_loader: as for `train_model`. No member is chosen by it.
        space: a `Float` for each path, such as `{"optimizer.learning_rate": Float(1e-4, 1e-1,
            log=True)}`. Paths are those whose values share a program in `train_population`.
        num_epochs: epochs of the training, an integer.
        size: number of members, from 2.
        every: epochs between two replacements; members must be validated then.
        **options: `fraction`, the share of the members that are replaced, and of those that they
            are replaced by, 0.2 by default; `form`, as for `multi_seed`.

    Returns:
        The members; `best` is the best one.

    Raises:
        ConfigError: the space has a value that cannot change while members train, or another
            argument is invalid.
        DistaffError: another input is invalid (the subclass says which).
    """
    check_trainer(trainer, _OWNER)
    fraction, form = options.pop("fraction", 0.2), options.pop("form", "auto")
    if options:
        raise ConfigError(f"{_OWNER} has no option {next(iter(options))!r}: fraction and form.")
    if any(isinstance(each, EarlyStopping) for each in trainer.callbacks.callbacks):
        raise ConfigError(
            f"{_OWNER} replaces members that do badly, and this trainer has EarlyStopping, which "
            "would end them. Pass trainer.variant(callbacks=[])."
        )
    _check(space, size, every, fraction)
    evolution = Evolution(dict(space), every, float(fraction), trainer.config.seed)
    first = trainer.config.seed
    settings = [
        make_settings(trainer, [values], [first + number])[0]
        for number, values in enumerate(evolution.initial(size))
    ]
    for group in grouped(settings)[1:]:
        raise _fixed(next(iter(group.values), next(iter(space))))
    loaders = train_loader, val_loader, test_loader

    def between(run: PopulationRun, plan: Plan) -> Replacing:
        return Replacing(run, plan, trainer, evolution)

    return trained_population(_OWNER, trainer, settings, loaders, num_epochs, form, between)


class Replacing:
    """Replaces members of a population between two epochs.

    Args:
        run: trains the members.
        plan: says when members are validated.
        trainer: the trainer from which they differ.
        evolution: decides which members are replaced.

    Raises:
        ConfigError: members are not validated when they are replaced, or are never replaced.
    """

    def __init__(
        self, run: PopulationRun, plan: Plan, trainer: TrainerModule, evolution: Evolution
    ) -> None:
        self._run, self._trainer, self._evolution = run, trainer, evolution
        self._monitor = trainer.monitor
        if not plan.val_every.is_due("epochs", evolution.every):
            raise ConfigError(
                f"every={evolution.every} epochs, members are compared by {self._monitor.name}, "
                f"but they are validated every {plan.val_every}. Make one a multiple of the other."
            )
        if evolution.every >= (plan.num_epochs or 0):
            raise ConfigError(
                f"every={evolution.every} epochs is not less than the training of "
                f"{plan.num_epochs}, so no member would be replaced. Lower every, or train longer."
            )
        self._log(run.settings)

    def record(self) -> dict[str, Any]:
        """Returns what must be equal to resume, as strict JSON."""
        found = self._evolution
        return {"space": to_json(found.space), "every": found.every, "fraction": found.fraction}

    def facts(self) -> dict[str, Any]:
        """Returns what a resume needs, as strict JSON."""
        return {"values": [dict(each.values) for each in self._run.settings]}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Restores what `facts` has returned."""
        values = facts["values"]
        self._exchange(range(len(values)), values)

    def __call__(self, epoch: int) -> None:
        """Replaces members after an epoch, if it is due."""
        if not self._evolution.is_due(epoch):
            return
        values = [each.values for each in self._run.settings]
        scores = [self._score(each) for each in self._run.members]
        self._exchange(*self._evolution.next(values, scores, epoch))

    def _exchange(self, sources: Sequence[int], values: Sequence[Mapping[str, Any]]) -> None:
        settings = [
            make_settings(self._trainer, [dict(own)], [old.seed])[0]
            for own, old in zip(values, self._run.settings, strict=True)
        ]
        self._run.exchange(sources, settings)
        self._log(settings)

    def _log(self, settings: Sequence[Setting]) -> None:
        """Lets members log their values with each epoch."""
        for member, setting in zip(self._run.members, settings, strict=True):
            member.values = dict(setting.values)

    def _score(self, member: Any) -> float | None:
        """Returns the monitored metric, the larger the better; None for one that diverged."""
        if not member.is_running:
            return None
        value = self._monitor.value(member.last_metrics)
        if not math.isfinite(value):
            return None
        return -value if self._monitor.mode == "min" else value


def _check(space: Any, size: Any, every: Any, fraction: Any) -> None:
    whole("every", every)
    if whole("size", size) < 2:
        raise ConfigError(f"size={size}: a population has at least two members.")
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not is_number or not 0 < fraction <= _MOST:
        raise ConfigError(f"fraction must be above 0 and at most {_MOST}; got {fraction!r}.")
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(
            f"{_OWNER} needs a space, such as {{'optimizer.learning_rate': Float(1e-4, 1e-1, "
            f"log=True)}}; got {space!r}."
        )
    for path, dimension in space.items():
        is_plain = isinstance(dimension, Float) and not dimension.when
        if not is_plain or isinstance(dimension.low, str) or isinstance(dimension.high, str):
            raise ConfigError(
                f"Members differ in real numbers, so {path!r} must be a Float between two numbers "
                f"and without conditions; got {dimension!r}."
            )


def _fixed(path: str) -> ConfigError:
    return ConfigError(
        f"{path!r} is static in this trainer, and cannot change while members train. Leave it out, "
        "or compare its values by tune.train_population or tune.study."
    )
