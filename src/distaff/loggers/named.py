"""Builds loggers that are given by name, such as "csv", inside the run directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distaff.core import optional
from distaff.errors import ConfigError
from distaff.loggers.console import ConsoleLogger
from distaff.loggers.csv import CsvLogger
from distaff.loggers.protocol import Logger


def build_loggers(
    given: Sequence[Logger | str],
    directory: Callable[[], Path] | None,
    name: str,
    *,
    is_trial: bool = False,
) -> list[Logger]:
    """Replaces each name by a logger with default arguments, in order.

    Args:
        given: loggers, and names that `as_loggers` has checked.
        directory: returns the run directory, called when a file is created; None without one.
        name: the name of the run, which becomes the project in Weights & Biases and trackio.
        is_trial: whether to leave out names that need a directory if the run has no directory.

    Raises:
        ConfigError: a logger needs a directory, but the run has no directory.
        MissingExtraError: the package of a logger is not installed.
    """
    if directory is None and is_trial:
        given = [each for each in given if not isinstance(each, str) or each == "console"]
    return [_build(each, directory, name) if isinstance(each, str) else each for each in given]


def _build(kind: str, directory: Callable[[], Path] | None, name: str) -> Any:
    if kind == "console":
        return ConsoleLogger()
    if kind == "trackio":
        return _load(kind).TrackioLogger(name)
    if directory is None:
        raise ConfigError(
            f"The logger {kind!r} writes into the run directory, and this run has none "
            "(root=None). Set root, or pass a logger object with its own directory."
        )
    match kind:
        case "csv":
            return CsvLogger(lambda: directory() / "metrics.csv")
        case "wandb":
            return _load(kind).WandbLogger(name, directory=directory)
        case "mlflow":
            return _load(kind).MlflowLogger(lambda: directory() / "mlruns")
        case _:
            return _load(kind).TensorBoardLogger(lambda: directory() / "tensorboard")


def _load(kind: str) -> Any:
    return optional.load(kind, extra=kind)
