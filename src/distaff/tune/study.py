"""study: a search over the options of a run, by Optuna, that continues where it was left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from distaff import _optional, compile_cache
from distaff.config import override
from distaff.display import make_display
from distaff.errors import NonFiniteError
from distaff.metrics import as_json
from distaff.monitor import Monitor
from distaff.trainer import TrainerModule
from distaff.trainer_config import check_count
from distaff.tune.search import Search, Trial
from distaff.tune.space import Space, check_space, contains, values_of
from distaff.tune.trial import Task


class StudyResult(NamedTuple):
    """What a search found.

    Attributes:
        best: the best trial.
        config: the config it was trained with.
        metrics: of its best model on the test set, as `test/...`; empty without one.
        trials: all trials, by number.
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

    The first trial has the config's own values, where the space holds them; the sampler chooses
    all others. A trial is an ordinary run in a directory of its own; trial `n` has the trainer's
    seed plus `n`. After each validation the trainer's monitored metric is reported, and a trial
    that the pruner gives up ends as any other run does, with the status `pruned`. One whose loss
    becomes NaN counts as failed. The best trial is tested at the end, once: no other sees the
    test set.

    Started again with the same storage and name, a study goes on: `num_trials` counts those it
    has. A trial that was interrupted or killed is tried again with the same values. Several
    processes may work at one study.

    Args:
        make_trainer: `(config) -> trainer`.
        space: what varies, by dotted path in the config: `{"optimizer.learning_rate": Float(...)}`.
        config: a frozen dataclass, whose fields may be dataclasses such as `OptimizerConfig`.
        make_loaders: `(config) -> (train, val, test)`, new loaders for each trial; `test` may be
            None.
        num_trials: trials of the whole study.
        num_epochs: epochs of each trial.
        steps_per_epoch: cuts epochs of this many steps; needed for loaders without length.
        **options: as `optuna.create_study` takes them: `sampler` (by default TPE), `pruner` (by
            default the median rule), `study_name` (by default `"study"`), and `storage`: an Optuna
            storage, a URL such as `"sqlite:///runs/study.db"`, or the path of a journal file, by
            default `<root>/<study_name>.journal`.

    Returns:
        The best trial, its test, all trials, and Optuna's own study.

    Raises:
        ConfigError: a path of the space is unknown, a bound is out of range, or the study was
            begun with another space.
        MetricError: the trainer's monitored metric is not among its validation metrics.
        MissingExtraError: Optuna is not installed.
    """
    optuna = _optional.load("optuna", extra="tune")
    check_count("num_trials", num_trials)
    check_space(config, space)
    compile_cache.enable()
    task = Task(
        make_trainer=make_trainer,
        make_loaders=make_loaders,
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
    )
    trainer = task.check(config)
    search: Search = optuna.OptunaSearch(
        space, trainer.monitor.mode, root=trainer.config.root, **options
    )
    own = values_of(config, space)
    if all(contains(space[path], value) for path, value in own.items()):
        search.enqueue_first(own)
    display = make_display(trainer.config.enable_progress_bar)
    while len(search.trials()) + search.underway() < num_trials:
        start = time.perf_counter()
        trial = _run(task, config, search)
        line = _line(trial, num_trials, trainer.monitor, time.perf_counter() - start)
        display.print(line)
    return _result(task, config, search)


def _run(task: Task, config: Any, search: Search) -> Trial:
    suggestion = search.ask()
    try:
        trial = task.run(override(config, suggestion.values), suggestion)
    except BaseException:
        search.abandon(suggestion)
        raise
    search.tell(suggestion, trial.status, trial.value)
    return trial


def _line(trial: Trial, num_trials: int, monitor: Monitor, seconds: float) -> str:
    value = "" if trial.value is None else f"{monitor.name} {trial.value:.6g}  "
    values = "  ".join(f"{path}={_shown(value)}" for path, value in trial.values.items())
    place = f"trial {trial.number + 1}/{num_trials}"
    return f"{place}  {value}{trial.status}  {seconds:.1f}s  {values}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _result(task: Task, config: Any, search: Search) -> StudyResult:
    trials = search.trials()
    best = search.best()
    if best is None:
        raise NonFiniteError(
            f"The best of {len(trials)} trials is asked for, and none came to a number: "
            f"{[(trial.number, trial.status) for trial in trials]}. Narrow the space, such as by "
            "a lower learning rate."
        )
    best_config = override(config, best.values)
    metrics = search.recall(f"test_{best.number}")
    if metrics is None:
        metrics = task.test(best_config, best)
        search.remember(f"test_{best.number}", as_json(metrics))
    return StudyResult(best, best_config, metrics, tuple(trials), search.study)
