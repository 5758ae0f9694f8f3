"""Searches for the best options of a run with Optuna, and resumes interrupted searches."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

from distaff.core import optional
from distaff.core.config.checks import whole
from distaff.core.config.encoding import diff, override, to_json
from distaff.core.warnings import warn
from distaff.errors import ConfigError, NonFiniteError, StateError
from distaff.execution import compile_cache
from distaff.execution.processes import check_not_joined
from distaff.metrics.monitor import Monitor, as_monitor
from distaff.run.display import best_of, make_trials_display
from distaff.run.identity.ending import ending
from distaff.trainer.module import TrainerModule
from distaff.tune import trial as trial_lib
from distaff.tune.batches.group import check as check_batches
from distaff.tune.batches.loop import Batches
from distaff.tune.objectives import as_objectives
from distaff.tune.search import Draw, Search, Suggestion, Trial, listed
from distaff.tune.space import Space, SpaceFn, check_space, own_values, space_to_json, value_at
from distaff.tune.trial import FactoryTask, Task


class StudyResult(NamedTuple):
    """The result of a search.

    Attributes:
        best: the best trial by the trainer's monitor that was not pruned.
        config: the config of the best trial.
        metrics: test metrics of its best model as `test/...`; empty without a test loader, or while
            other processes are running trials (the last one to end tests).
        trials: all trials that were not interrupted, by number.
        study: the `optuna.Study`, with its plots and tables.
        front: with several objectives, the trials of the Pareto front: no other one is at least as
            good in all objectives and better in one. They are not tested, except for `best`. Else
            the best trial alone.
    """

    best: Trial
    config: Any
    metrics: dict[str, Any]
    trials: tuple[Trial, ...]
    study: Any
    front: tuple[Trial, ...] = ()


def study(
    make_trainer: Callable[[Any], TrainerModule],
    space: Space | SpaceFn,
    config: Any,
    make_loaders: Callable[[Any], tuple[Any, Any, Any]],
    *,
    num_trials: int,
    num_epochs: int,
    steps_per_epoch: int | None = None,
    batch: int = 1,
    **options: Any,
) -> StudyResult:
    """Searches for the best values of some options.

    The first trial uses the config's own values if they lie within the space; the sampler chooses
    all others. A trial is an ordinary run with its own directory; trial `n` has the trainer's seed
    plus `n`. The monitored metric is reported after each validation. A pruned trial ends normally,
    with the status `pruned`; one whose loss becomes NaN, or that runs out of memory, counts as
    failed. At the end, the best
    trial is tested once; no other trial uses the test set.

    To resume a study, call this again with the same storage and name: `num_trials` includes the
    existing trials. A trial that was interrupted or killed resumes from its last checkpoint. The
    values of one that was ended by an error in your code are tried again. After three attempts
    without progress, a trial counts as failed. With one process and a sampler by name, an
    interrupted study gets the values and results of an uninterrupted one: the values of a trial
    depend on the seed, the number of trials before it, and their results. Several processes can
    work on one study. Each takes over the trials of killed ones: at once on the same machine, else
    after five minutes.

    To optimize several metrics at once, name them as `objectives`. The values of a trial are those
    of one model, its best by the trainer's monitor. Such trials are not pruned.

    Compiled programs are cached on disk for all trials: see
    `distaff.execution.compile_cache.enable`.

    Args:
        make_trainer: `(config) -> trainer`, a new trainer for each call.
        space: ranges by dotted path in the config: `{"optimizer.learning_rate": Float(...)}`; or
            a function from an Optuna trial to values by dotted path, for any other dependence.
        config: a frozen dataclass. Fields may be dataclasses, such as `OptimizerConfig`, and
            mappings, whose existing keys can be searched.
        make_loaders: `(config) -> (train, val, test)`, new loaders for each call; `test` may be
            None.
        num_trials: number of trials of the whole study.
        num_epochs: epochs per trial.
        steps_per_epoch: steps per epoch; required for loaders without a length.
        batch: trials to ask for at once. Those that differ in traced values only, such as the
            learning rate, are trained as one population, as by `tune.train_population`, and are
            members in its directory.
        **options: options of `optuna.create_study`: `sampler` (`"tpe"`, the default, `"random"` or
            `"nsgaii"`, with the trainer's seed; or an Optuna sampler: a grid does not try the
            config's own values, and ends the study when exhausted),
            `objectives` (validation metrics, such as `("val/loss", "val/accuracy")`, or their
            directions by name, `{"val/cost": "min", ...}`; by default the trainer's monitor),
            `pruner` (defaults to the median rule), `study_name` (defaults to `"study"`), and
            `storage`: an Optuna storage, a URL such as `"sqlite:///runs/study.db"`, or the path of
            a journal file (defaults to `<root>/<study_name>.journal`). The seed of your own sampler
            object only has an effect when the study is created.

    Returns:
        The best trial, its test metrics, all trials, and Optuna's study.

    Raises:
        ConfigError: a path of the space is unknown, a bound is out of range, several objectives
            have a pruner, or the study was created with another space, monitor, objectives or
            number of epochs.
        MetricError: the monitored metric or an objective is not a validation metric.
        MissingExtraError: Optuna is not installed.
        NonFiniteError: every trial failed.
        RunDirectoryError: the storage cannot be opened.
        StateError: no trial has finished.
    """
    task = FactoryTask(
        make_trainer=make_trainer,
        make_loaders=make_loaders,
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
    )
    return run_study(task, space, config, num_trials=num_trials, batch=batch, options=options)


def run_study(
    task: Task,
    space: Space | SpaceFn,
    config: Any,
    *,
    num_trials: int,
    batch: int = 1,
    options: Mapping[str, Any],
    begun: Callable[[TrainerModule], None] = lambda trainer: None,
    busy: Callable[[], bool] = lambda: False,
) -> StudyResult:
    """Runs a study of any task; see `study`.

    Args:
        task: what turns a config into a training.
        space: ranges by path, or a function of the trial.
        config: the config.
        num_trials: number of trials of the whole study.
        batch: trials per batch; see `study`.
        options: options of the search.
        begun: called when the storage has the study, before its first trial.
        busy: whether to wait, after the last trial of this process, while others train.

    Raises:
        DistaffError: an input is invalid, or no trial has finished (the subclass says which).
    """
    optuna = optional.load("optuna", extra="tune")
    whole("num_trials", num_trials)
    whole("batch", batch)
    objectives = as_objectives(options.get("objectives"))
    options = {name: option for name, option in options.items() if name != "objectives"}
    check_not_joined("tune.study")
    if callable(space):
        own = _own_of_function(optional.load("studies.methods", extra="tune").probe(space), config)
    else:
        check_space(config, space)
        own = own_values(config, space)
    compile_cache.enable()
    call = trial_lib.check(task, config, objectives)
    if batch > 1:
        check_batches(call)
    trainer, monitor = call.trainer, as_monitor(call.trainer.monitor)
    search: Search = optuna.OptunaSearch(
        space,
        _signature(space, monitor, objectives, call.lengths),
        first=own,
        seed=trainer.config.seed,
        root=trainer.config.root,
        options=options,
    )
    _check_config(search, config, () if callable(space) else space)
    begun(trainer)
    shows = trainer.config.enable_progress_bar
    with closing(make_trials_display(shows, search.table, monitor, num_trials)) as display:
        search.on_change = display.refresh

        def ended(trial: Trial, taken: str = "") -> None:
            place = f"trial {trial.number} ({len(search.trials())} of {num_trials})"
            display.ended(f"{place}  {_described(trial, monitor)}{taken}")

        if batch > 1:
            batches = Batches(task, config, search, monitor, display.print)
            batches.train(batch, num_trials, ended)
            display.print(batches.summary())
        while (suggestion := search.ask(num_trials)) is not None:
            start = time.perf_counter()
            trial = _run(task, config, search, suggestion)
            ended(trial, f"  {time.perf_counter() - start:.1f}s")
        while busy():
            display.refresh()
            time.sleep(0.2)
        if others := search.underway():
            display.print(f"running in other processes: {', '.join(others)}")
        return _result(task, config, search, monitor)


def _own_of_function(draws: Sequence[Draw], config: Any) -> dict[str, Any] | None:
    """Returns the config's own values of the parameters of a space that is a function.

    Raises:
        ConfigError: the config does not accept what the function returns.
    """
    parameters: dict[str, Callable[[Any], bool]] = {}
    for draw in draws:
        try:
            override(config, draw.values)
        except ConfigError as error:
            raise ConfigError(
                f"The space returned {draw.values!r}, which cannot be searched: {error}"
            ) from error
        parameters.update(draw.parameters)
    own: dict[str, Any] = {}
    for name, accepts in parameters.items():
        with suppress(AttributeError, KeyError, TypeError):
            value = value_at(config, name)
            if not accepts(value):
                return None
            own[name] = value
    return own or None


def _signature(
    space: Space | SpaceFn,
    monitor: Monitor,
    objectives: Sequence[Monitor],
    lengths: Mapping[str, Any],
) -> Any:
    """Returns what must be equal for all trials of a study."""
    several = {"objectives": {each.name: each.mode for each in objectives}} if objectives else {}
    return {
        **several,
        "space": to_json(space) if callable(space) else space_to_json(space),
        "monitor": monitor.name,
        "mode": monitor.mode,
        "num_epochs": lengths["num_epochs"],
        "steps_per_epoch": lengths["steps_per_epoch"],
    }


def _check_config(search: Search, config: Any, space: Collection[str]) -> None:
    """Logs a warning if a study is resumed with another config."""
    begun, now = search.recall("config"), to_json(config)
    if begun is None:
        search.remember("config", now)
        return
    changes = {path: change for path, change in diff(begun, now).items() if path not in space}
    if changes:
        warn(
            f"The study was created with another config ({listed(changes)}). Its existing trials "
            "are compared with new ones nevertheless. To start over, choose another study_name.",
            stacklevel=3,
        )


def _run(task: Task, config: Any, search: Search, suggestion: Suggestion) -> Trial:
    try:
        status, value = trial_lib.run(task, override(config, suggestion.values), suggestion)
    except BaseException as error:
        is_cut = not isinstance(error, Exception) or ending(error)["resumable"]
        search.abandon(suggestion, resumes=is_cut)
        error.add_note(
            f"This was trial {suggestion.number} of a study, with {suggestion.values}. Run the "
            "same program again to resume the study."
        )
        raise
    return search.tell(suggestion, status, value)


def _described(trial: Trial, monitor: Monitor) -> str:
    values = {} if trial.value is None else {monitor.name: trial.value}
    values.update(trial.objectives or {})
    value = "".join(f"{name} {number:.6g}  " for name, number in values.items())
    shown = {n: f"{x:.4g}" if isinstance(x, float) else x for n, x in trial.values.items()}
    return f"{value}{trial.status}  " + "  ".join(f"{path}={x}" for path, x in shown.items())


def _result(task: Task, config: Any, search: Search, monitor: Monitor) -> StudyResult:
    trials, others = tuple(search.trials()), search.underway()
    best = _best(trials, monitor)
    best_config = override(config, best.values)
    metrics = search.recall(f"test_{best.number}")
    if metrics is None and not others:
        metrics = trial_lib.test(task, best_config, best)
        search.remember(f"test_{best.number}", metrics)
    front = (best,) if best.objectives is None else tuple(search.front())
    return StudyResult(best, best_config, metrics or {}, trials, search.study, front)


def _best(trials: tuple[Trial, ...], monitor: Monitor) -> Trial:
    best = best_of(trials, monitor)
    if best is not None:
        return best
    statuses = [f"{trial.number} {trial.status}" for trial in trials]
    if trials and all(trial.status == "failed" for trial in trials):
        raise NonFiniteError(
            f"All {len(trials)} trials failed, because the loss became NaN or the process died "
            f"({', '.join(statuses)}). Narrow the space, for example to lower learning rates."
        )
    raise StateError(
        f"No trial has finished: {', '.join(statuses) or 'none has ended'}. Run more trials, use "
        "a milder pruner, or wait for the other processes."
    )
