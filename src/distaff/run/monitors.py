"""Monitors: whether what a run is judged by will be there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distaff.callbacks import EarlyStopping
from distaff.errors import ConfigError
from distaff.metrics.monitor import Monitor, as_monitor


def check(trainer: Any, base: type, validations: Mapping[str, Iterable[str]]) -> None:
    """Checks the metrics that a trainer and its callbacks look at, before a run begins.

    Args:
        trainer: whose `monitor` the callbacks take that have none of their own.
        base: its class, without overrides: an override may add metrics, or ignore them.
        validations: the names of the metrics of each validation, without `val/`, by its name.

    Raises:
        MetricError: there is no such metric.
        ConfigError: two monitors contradict each other, or there is no validation to stop by.
    """

    def is_own(*names: str) -> bool:
        return any(getattr(type(trainer), n) is not getattr(base, n) for n in names)

    of_validation = [f"{name}/{each}" for name, found in validations.items() for each in found]
    callbacks = trainer.callbacks
    trainer.monitor = as_monitor(trainer.monitor)
    callbacks.judge_by(trainer.monitor)
    if not of_validation:
        _check_stops([each for each in callbacks.callbacks if isinstance(each, EarlyStopping)])
    monitors: list[Monitor] = [trainer.monitor, *callbacks.monitors]
    if is_own("is_new_model_better"):
        monitors = []
    of_training = [f"train/{name}" for name in trainer._steps.names]
    for each in monitors:
        if each.is_of_training and not is_own("on_training_epoch_end", "train_epoch"):
            each.check(of_training)
        elif not each.is_of_training and not is_own("on_validation_epoch_end", "eval_model"):
            each.check(of_validation or [each.name])


def _check_stops(callbacks: list[EarlyStopping]) -> None:
    """Checks that callbacks that stop a run look at something where there is no validation."""
    for callback in callbacks:
        monitor = callback.monitor
        if monitor is not None and not monitor.is_of_training:
            raise ConfigError(
                f"EarlyStopping looks at {monitor.name!r} after each validation, and this run has "
                "none. Pass a val_loader to train_model, or monitor a metric of training: "
                "EarlyStopping('train/loss')."
            )
