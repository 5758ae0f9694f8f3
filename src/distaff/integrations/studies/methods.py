"""Optuna's samplers and pruners by name, and what a space that is a function returns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from distaff.errors import ConfigError, nearest
from distaff.tune.dimension import Choice, Dimension, Int
from distaff.tune.search import Draw
from distaff.tune.space import SpaceFn


@contextmanager
def quiet() -> Generator[None]:
    """Within the block, Optuna logs only warnings and errors."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def probe(space: SpaceFn, num_draws: int = 32) -> list[Draw]:
    """Returns what a space that is a function gives for random trials of no study."""
    with quiet():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws = []
    for trial in [study.ask() for _ in range(num_draws)]:
        values = dict(space(trial))
        draws.append(
            Draw(values, {n: partial(_accepts, x) for n, x in trial.distributions.items()})
        )
    return draws


def _accepts(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (TypeError, ValueError):  # of another kind
        return False


def sampler(name: str) -> Callable[[int], optuna.samplers.BaseSampler]:
    """Returns a function that makes a sampler from a seed, by its name.

    Args:
        name: `"tpe"`, `"random"` or `"nsgaii"`.

    Raises:
        ConfigError: the name is unknown.
    """
    kinds: dict[str, Any] = {
        # The liar counts on running trials, of this batch and of other processes, as bad ones.
        "tpe": partial(optuna.samplers.TPESampler, constant_liar=True),
        "random": optuna.samplers.RandomSampler,
        "nsgaii": optuna.samplers.NSGAIISampler,
    }
    if name not in kinds:
        raise ConfigError(
            f"The option 'sampler' of a study is the name of one, or an Optuna sampler; got "
            f"{name!r}. {nearest(name, kinds)}"
        )
    return lambda seed: kinds[name](seed=seed)


def pruner(name: str) -> optuna.pruners.BasePruner:
    """Returns a pruner by name: "median", "halving" (ASHA), "hyperband" or "none"."""
    kinds = {
        "median": optuna.pruners.MedianPruner,
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }
    return kinds[name]()


def check_pruner(given: optuna.pruners.BasePruner | None, objectives: Sequence[str]) -> None:
    """Checks that trials with several objectives have no pruner.

    Raises:
        ConfigError: they have one.
    """
    if objectives and not isinstance(given, optuna.pruners.NopPruner | None):
        raise ConfigError(
            f"Trials with several objectives ({', '.join(objectives)}) cannot be pruned, since "
            f"Optuna prunes by one value; got {type(given).__name__}. Omit pruner (--pruner)."
        )


def suggest(trial: optuna.Trial, path: str, dimension: Dimension) -> Any:
    """Returns the value of an option in a trial, drawn from its range."""
    if isinstance(dimension, Choice):
        labels = dimension.labels()
        return labels[trial.suggest_categorical(path, list(labels))]
    low, high = dimension.ends()
    if isinstance(dimension, Int):
        return trial.suggest_int(path, int(low), int(high), log=dimension.log)
    return trial.suggest_float(path, low, high, log=dimension.log)
