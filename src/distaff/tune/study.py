"""study: a search over the options of a run, by Optuna, that continues where it was left."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

from distaff.core import optional
from distaff.core.config.checks import whole
from distaff.core.config.encoding import diff, override, to_json
from distaff.core.warnings import warn
from distaff.errors import NonFiniteError, StateError
from distaff.execution import compile_cache
from distaff.metrics.monitor import Monitor
from distaff.run.display import make_display
from distaff.trainer.module import TrainerModule
from distaff.tune.search import Search, Suggestion, Trial, listed
from distaff.tune.space import Space, check_space, contains, space_to_json, values_of
from distaff.tune.trial import Task


class StudyResult(NamedTuple):
    """What a search found.

    Attributes:
        best: the best trial that was not pruned.
        config: the config it was trained with.
        metrics: of its best model on the test set, as `test/...`; empty without one, and as long
            as other processes are at trials: the one that ends last tests.
        trials: all trials that ended on their own, by number.
        study: the `optuna.Study`, for its figures and its tables.
    """

    best: Trial
    config: Any
    metrics: dict[str, Any]
    trials: tuple[Trial, ...]
    study: Any


def study(
    make_trainer: Callable[[Any], TrainerModule],
    space: Space,
    config: Any,
    make_loaders: Callable[[Any], tuple[Any, Any, Any]],
    *,
    num_trials: int,
    num_epochs: int,
    steps_per_epoch: int | None = None,
    **options: Any,
) -> StudyResult:
    """Searches for the best values of some options.

    The config's own values are tried first, where the space holds them; the sampler chooses all
    others. A trial is an ordinary run in a directory of its own; trial `n` has the trainer's seed
    plus `n`. After each validation the trainer's monitored metric is reported, and a trial that
    the pruner gives up ends as any other run does, with the status `pruned`. One whose loss
    becomes NaN counts as failed. The best trial is tested at the end, once: no other sees the
    test set.

    Started again with the same storage and name, a study goes on: `num_trials` counts those it
    has. The values of a trial that was interrupted, killed, or ended by an error of the program
    are tried again; after three attempts they count as failed. Several processes may work at one
    study: on one machine, each takes over what another left when it was killed.

    Compiled programs are kept on disk for all trials: see `distaff.execution.compile_cache.enable`.

    Args:
        make_trainer: `(config) -> trainer`, a new trainer at each call.
        space: what varies, by dotted path in the config: `{"optimizer.learning_rate": Float(...)}`.
        config: a frozen dataclass, whose fields may be dataclasses such as `OptimizerConfig`, and
            mappings, whose present keys may be in the space.
        make_loaders: `(config) -> (train, val, test)`, new loaders at each call; `test` may be
            None.
        num_trials: trials of the whole study.
        num_epochs: epochs of each trial.
        steps_per_epoch: cuts epochs of this many steps; needed for loaders without length.
        **options: as `optuna.create_study` takes them: `sampler` (by default TPE with the
            trainer's seed; a grid is tried without the config's own values, and ends the study
            when it is exhausted), `pruner` (by default the median rule), `study_name` (by default
            `"study"`), and `storage`: an Optuna storage, a URL such as
            `"sqlite:///runs/study.db"`, or the path of a journal file, by default
            `<root>/<study_name>.journal`. A sampler's own seed counts where the study begins.

    Returns:
        The best trial, its test, all trials, and Optuna's own study.

    Raises:
        ConfigError: a path of the space is unknown, a bound is out of range, or the study was
            begun with another space, monitor or number of epochs.
        MetricError: the trainer's monitored metric is not among its validation metrics.
        MissingExtraError: Optuna is not installed.
        NonFiniteError: every trial failed.
        RunDirectoryError: the storage cannot be opened.
        StateError: no trial has come to an end that makes it the best.
    """
    optuna = optional.load("optuna", extra="tune")
    whole("num_trials", num_trials)
    check_space(config, space)
    compile_cache.enable()
    task = Task(
        make_trainer=make_trainer,
        make_loaders=make_loaders,
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
    )
    trainer = task.check(config)
    own = values_of(config, space)
    search: Search = optuna.OptunaSearch(
        space,
        _form(space, trainer.monitor, num_epochs, steps_per_epoch),
        first=own if all(contains(space[path], value) for path, value in own.items()) else None,
        seed=trainer.config.seed,
        root=trainer.config.root,
        options=options,
    )
    _check_config(search, config, space)
    with closing(make_display(trainer.config.enable_progress_bar)) as display:
        while (suggestion := search.ask(num_trials)) is not None:
            start = time.perf_counter()
            trial = _run(task, config, search, suggestion)
            place = f"trial {trial.number} ({len(search.trials())} of {num_trials})"
            seconds = time.perf_counter() - start
            display.print(f"{place}  {_described(trial, trainer.monitor)}  {seconds:.1f}s")
        if others := search.underway():
            display.print(f"under way in other processes: {', '.join(others)}")
        return _result(task, config, search, trainer.monitor)


def _form(space: Space, monitor: Monitor, num_epochs: int, steps_per_epoch: int | None) -> Any:
    """Returns what makes the trials of a study comparable."""
    return {
        "space": space_to_json(space),
        "monitor": monitor.name,
        "mode": monitor.mode,
        "num_epochs": num_epochs,
        "steps_per_epoch": steps_per_epoch,
    }


def _check_config(search: Search, config: Any, space: Space) -> None:
    """Warns where a study goes on with another config than it was begun with."""
    begun, now = search.recall("config"), to_json(config)
    if begun is None:
        search.remember("config", now)
        return
    changes = {path: change for path, change in diff(begun, now).items() if path not in space}
    if changes:
        warn(
            f"The study was begun with another config ({listed(changes)}). Its "
            "trials are compared with those to come all the same. If that is wrong, choose another "
            "study_name.",
            stacklevel=3,
        )


def _run(task: Task, config: Any, search: Search, suggestion: Suggestion) -> Trial:
    try:
        status, value = task.run(override(config, suggestion.values), suggestion)
    except BaseException as error:
        search.abandon(suggestion)
        error.add_note(
            f"This was trial {suggestion.number} of a study, with {suggestion.values}. Started "
            "again, the study goes on."
        )
        raise
    return search.tell(suggestion, status, value)


def _described(trial: Trial, monitor: Monitor) -> str:
    value = "" if trial.value is None else f"{monitor.name} {trial.value:.6g}  "
    values = "  ".join(f"{path}={_shown(value)}" for path, value in trial.values.items())
    return f"{value}{trial.status}  {values}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _result(task: Task, config: Any, search: Search, monitor: Monitor) -> StudyResult:
    trials, others = tuple(search.trials()), search.underway()
    best = _best(trials, monitor)
    best_config = override(config, best.values)
    metrics = search.recall(f"test_{best.number}")
    if metrics is None and not others:
        metrics = task.test(best_config, best)
        search.remember(f"test_{best.number}", metrics)
    return StudyResult(best, best_config, metrics or {}, trials, search.study)


def _best(trials: tuple[Trial, ...], monitor: Monitor) -> Trial:
    best, best_value = None, None
    for trial in trials:
        value = trial.value if trial.status in ("finished", "stopped") else None
        if value is not None and monitor.better(value, best_value):
            best, best_value = trial, value
    if best is not None:
        return best
    statuses = [f"{trial.number} {trial.status}" for trial in trials]
    if trials and all(trial.status == "failed" for trial in trials):
        raise NonFiniteError(
            f"The best of {len(trials)} trials is asked for, and each has failed: its loss became "
            f"NaN, or the process died of it ({', '.join(statuses)}). Narrow the space, such as by "
            "a lower learning rate."
        )
    raise StateError(
        "The best trial is asked for, and none has been trained to its end: "
        f"{', '.join(statuses) or 'none has ended'}. Try more trials, use a milder pruner, or "
        "wait for the other processes."
    )
