"""Compares optimizers on one task, each with its best learning rate, over several seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.monitoring
import numpy as np
import optax

import distaff.metrics as metrics_lib
from distaff.callbacks import Callback, StepInfo
from distaff.core.config.checks import whole
from distaff.core.warnings import warn
from distaff.data import as_loader, first_batch, num_batches
from distaff.errors import ConfigError, MetricError, NonFiniteError, nearest
from distaff.execution import compile_cache
from distaff.execution.processes import check_not_joined
from distaff.metrics.monitor import Monitor, as_monitor
from distaff.optim import OptimizerLike, build_optimizer, geometry, observed
from distaff.run.display import make_display
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import as_trial, path_of, watch
from distaff.tune.comparison import Comparison, OptimizerResult, OptimizerRun

Rate: TypeAlias = float | None
"""A learning rate; None for an optimizer without one."""

MakeOptimizer: TypeAlias = Callable[[Any], OptimizerLike]
"""A function from a learning rate to an optimizer."""


def compare(
    make_trainer: Callable[[OptimizerLike, int], TrainerModule],
    optimizers: Mapping[str, MakeOptimizer],
    grid: Mapping[str, Sequence[Rate]] | Sequence[Rate],
    make_loaders: Callable[[int], tuple[Any, Any, Any]],
    *,
    seeds: Sequence[int],
    num_epochs: int,
    target: float,
    monitor: Monitor = Monitor("val/loss"),  # noqa: B008 - a frozen value
) -> Comparison:
    """Trains one task with several optimizers, over several seeds.

    First, each optimizer is trained with every learning rate of its grid, on one seed and without
    the test set, and the rate with the best validation is chosen. Then it is trained with that rate
    on every seed, and the best model of each run is tested once. Every training is an ordinary run;
    if the loss becomes NaN, the run is recorded as diverged.

    To measure the time per step, the host waits for each step. The time includes fetching the
    batch, but not compilation, validation and checkpoints.

    Args:
        make_trainer: `(optimizer, seed) -> trainer`, a new trainer for each run. Pass the seed to
            the trainer, so that runs start from different parameters.
        optimizers: functions from a learning rate to an optimizer, by name.
        grid: learning rates to try, for all optimizers or by name. A grid of one rate needs no
            extra run; use `(None,)` for an optimizer without a learning rate.
        make_loaders: `(seed) -> (train, val, test)`, new loaders for each run; `test` may be None.
            The seed should determine the order of the training data.
        seeds: seeds of the compared runs. Learning rates are chosen with another seed,
            `max(seeds) + 1`, whose runs are not reported.
        num_epochs: epochs per run.
        target: a training loss; the steps and seconds to reach it are measured.
        monitor: the validation metric for choosing learning rates, by its best value in a run.

    Returns:
        Curves and a table.

    Raises:
        ConfigError: an argument is invalid, or an optimizer cannot be built. Raised before the
            first run.
        MetricError: the monitored metric is not a validation metric.
    """
    whole("num_epochs", num_epochs)
    rates = _rates(optimizers, grid)
    _check_seeds(seeds)
    check_not_joined("tune.compare")
    compile_cache.enable()
    contest = _Contest(make_trainer, make_loaders, num_epochs, as_monitor(monitor))
    total_steps = contest.check_loaders(seeds) * num_epochs
    for name, make_optimizer in optimizers.items():
        for rate in rates[name]:
            build_optimizer(make_optimizer(rate), total_steps)
    results = {
        name: contest.result(name, make_optimizer, rates[name], seeds)
        for name, make_optimizer in optimizers.items()
    }
    return Comparison(results=results, target=float(target))


@dataclasses.dataclass(frozen=True)
class _Observed:
    """An observed optimizer. As a dataclass it is recorded with its content."""

    optimizer: OptimizerLike

    def __call__(self, total_steps: int) -> optax.GradientTransformation:
        return observed(build_optimizer(self.optimizer, total_steps).tx)


@dataclasses.dataclass(frozen=True)
class _Contest:
    """What all runs of a comparison share."""

    make_trainer: Callable[[OptimizerLike, int], TrainerModule]
    make_loaders: Callable[[int], tuple[Any, Any, Any]]
    num_epochs: int
    monitor: Monitor

    def check_loaders(self, seeds: Sequence[int]) -> int:
        """Checks the loaders, and returns the number of steps per epoch."""
        train = as_loader(self.loaders(seeds[0])[0], name="train")
        steps_per_epoch = num_batches(train)
        if steps_per_epoch is None:
            raise ConfigError(
                "A comparison needs a known number of steps per epoch, but the train loader has "
                "no length. Write data.Stream(source, length=...)."
            )
        if steps_per_epoch > 1 and len(seeds) > 1:
            other = as_loader(self.loaders(seeds[1])[0], name="train")
            batches = [jax.tree.leaves(first_batch(loader)) for loader in (train, other)]
            if all(map(np.array_equal, *batches)):
                warn(
                    f"make_loaders gives the same first batch for seeds {seeds[0]} and {seeds[1]}, "
                    "so the runs differ only in their initial parameters. Shuffle, and pass the "
                    "seed: data.ArrayLoader(..., shuffle=True, seed=seed).",
                    stacklevel=3,
                )
        return steps_per_epoch

    def loaders(self, seed: int) -> tuple[Any, Any, Any]:
        loaders = self.make_loaders(seed) if callable(self.make_loaders) else None
        if not isinstance(loaders, tuple) or len(loaders) != 3 or loaders[1] is None:
            raise ConfigError(
                "make_loaders must be a function of the seed that returns new loaders (train, val, "
                "test). test may be None, but val may not: it selects the learning rate. "
                "Write lambda seed: data.digits(seed=seed)."
            )
        return loaders

    def result(
        self, name: str, make_optimizer: MakeOptimizer, rates: Sequence[Rate], seeds: Sequence[int]
    ) -> OptimizerResult:
        """Chooses a learning rate, and trains with it on every seed."""
        chosen, tried = rates[0], {}
        if len(rates) > 1:
            # Another seed: results must not be selected by the luck of a reported one.
            seed = max(seeds) + 1
            for rate in rates:
                _, tried[rate] = self.run(name, make_optimizer(rate), rate, seed, test=False)
                if self.monitor.better(tried[rate], tried[chosen]):
                    chosen = rate
            if np.isnan(tried[chosen]):
                return OptimizerResult(learning_rate=np.nan, grid=tried, runs=())
        runs = [self.run(name, make_optimizer(chosen), chosen, seed, test=True) for seed in seeds]
        return OptimizerResult(learning_rate=chosen, grid=tried, runs=tuple(run for run, _ in runs))

    def run(
        self, name: str, optimizer: OptimizerLike, rate: Rate, seed: int, *, test: bool
    ) -> tuple[OptimizerRun, float]:
        """Trains once. Returns the run and the best value of the monitored metric."""
        trainer = self.trainer(optimizer, seed)
        watcher = _Watcher(self.monitor)
        watch(trainer, [watcher])
        display = make_display(trainer.config.enable_progress_bar)
        train_loader, val_loader, test_loader = self.loaders(seed)
        metrics: dict[str, float] = {}
        start, diverged = time.perf_counter(), False
        try:
            with watcher.watching_compilations():
                result = trainer.train_model(
                    train_loader,
                    val_loader,
                    test_loader if test else None,
                    num_epochs=self.num_epochs,
                )
        except NonFiniteError:
            diverged = True
        else:
            if result.reason == "Ctrl-C":
                raise KeyboardInterrupt
            found = {n: v for n, v in result.metrics.items() if n.startswith(("val/", "test/"))}
            metrics = {n: float(v) for n, v in found.items() if np.ndim(v) == 0}
        value = np.nan if diverged else watcher.best
        display.print(
            f"{name}  learning_rate={rate}  seed={seed}  {self.monitor.name} {value:.6g}  "
            f"{'diverged  ' if diverged else ''}{time.perf_counter() - start:.1f}s"
        )
        losses, cosines, seconds = watcher.curves()
        run = OptimizerRun(
            seed=seed,
            learning_rate=rate,
            losses=losses,
            cosines=cosines,
            seconds=seconds,
            steps_per_epoch=watcher.steps_per_epoch,
            metrics=metrics,
            diverged=diverged,
            path=path_of(trainer),
        )
        return run, value

    def trainer(self, optimizer: OptimizerLike, seed: int) -> TrainerModule:
        """Returns a new trainer with an observed optimizer."""
        trainer = self.make_trainer(_Observed(optimizer), seed)
        if not isinstance(trainer, TrainerModule):
            raise ConfigError(f"make_trainer must return a TrainerModule; got {trainer!r}.")
        if trainer.config.seed != seed:
            raise ConfigError(
                f"make_trainer was called with seed {seed}, but its trainer has seed "
                f"{trainer.config.seed}, so all runs would start alike. Pass it on: "
                "Classifier(model, optimizer=optimizer, seed=seed)."
            )
        if not isinstance(trainer.optimizer, _Observed):
            raise ConfigError(
                "make_trainer was called with an optimizer, but its trainer has another one: "
                f"{trainer.optimizer!r}. Pass it on: Classifier(model, optimizer=optimizer, "
                "seed=seed)."
            )
        return as_trial(trainer, seed=seed)


def _rates(
    optimizers: Mapping[str, MakeOptimizer], grid: Mapping[str, Sequence[Rate]] | Sequence[Rate]
) -> dict[str, tuple[Rate, ...]]:
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise ConfigError(
            "optimizers must be a dict of functions, such as {'adam': lambda rate: "
            f"OptimizerConfig('adam', learning_rate=rate)}}; got {optimizers!r}."
        )
    by_name = grid if isinstance(grid, Mapping) else dict.fromkeys(optimizers, grid)
    for name in by_name:
        if name not in optimizers:
            raise ConfigError(f"No optimizer for grid entry {name!r}. {nearest(name, optimizers)}")
    rates = {name: tuple(by_name.get(name, ())) for name in optimizers}
    for name, found in rates.items():
        if not found or len(set(found)) < len(found):
            raise ConfigError(
                "The grid needs at least one learning rate per optimizer, without duplicates; for "
                f"{name!r} it has {list(found)}."
            )
    return rates


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be one or more different integers; got {list(seeds)}.")


class _Watcher(Callback):
    """Records loss, cosine and duration of each step, and the best validation of `monitor`."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.best = np.nan
        self.steps_per_epoch = 0
        self._steps: list[tuple[float, float, float]] = []
        self._start_timing()

    @contextlib.contextmanager
    def watching_compilations(self) -> Generator[None]:
        """Detects steps in which JAX compiles: the first, and those with a new shape or dtype."""
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def on_training_start(self, info: StepInfo) -> None:
        self._start_timing()

    def on_step_end(self, info: StepInfo) -> None:
        jax.block_until_ready(info.metrics)
        seconds = np.nan if self._has_compiled else time.perf_counter() - self._start
        metrics = metrics_lib.compute(metrics_lib.to_host(info.metrics))
        if "loss" not in metrics:
            raise MetricError(
                "Optimizers are compared by the training metric 'loss', which is not among "
                f"{sorted(metrics)}. Return it from train_step."
            )
        assert info.state is not None  # steps are not fused while a callback watches them
        cosine = float(geometry(info.state.opt_state).cosine)
        self._steps.append((metrics["loss"], cosine, seconds))
        self.steps_per_epoch += info.epoch == 1
        self._start_timing()

    def on_epoch_end(self, info: StepInfo) -> None:
        self._start_timing()

    def on_validation_end(self, info: StepInfo) -> None:
        value = self.monitor.value(info.metrics)
        value = value if np.isfinite(value) else np.nan
        if self.monitor.better(value, self.best):
            self.best = value

    def on_checkpoint(self, info: StepInfo) -> None:
        self._start_timing()

    def curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns losses, cosines and seconds, `[steps]` each."""
        losses, cosines, seconds = np.array(self._steps, float).reshape(-1, 3).T
        timed = seconds[~np.isnan(seconds)]
        usual = np.median(timed) if len(timed) else np.nan
        return losses, cosines, np.where(np.isnan(seconds), usual, seconds)

    def _start_timing(self) -> None:
        self._start, self._has_compiled = time.perf_counter(), False

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        self._has_compiled |= event.endswith("compile_duration")
