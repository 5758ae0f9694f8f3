"""Checks of the `loggers` argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distaff.core.config.overrides import check_override
from distaff.errors import ConfigError
from distaff.loggers.protocol import Logger, NullLogger

_METHODS = ("log_metrics", "log_config", "close")
_NAMES = {
    "csv": "CsvLogger()",
    "console": "ConsoleLogger()",
    "jsonl": "nothing: each run writes metrics.jsonl",
    "tensorboard": "TensorBoardLogger()",
    "wandb": "WandbLogger(project=...)",
    "mlflow": "MlflowLogger()",
}


def as_loggers(given: Any) -> tuple[Logger, ...]:
    """Returns a list of loggers as a tuple; empty for None.

    Raises:
        ConfigError: `given` is not a list, or an item is not a logger.
    """
    if given is None:
        return ()
    if isinstance(given, str | bytes | type) or is_logger(given):
        _check(given)
        name = type(given).__name__
        raise ConfigError(f"loggers is a list; got one {name}. Write loggers=[{name}(...)].")
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ConfigError(
            f"loggers is a list of loggers; got {given!r}. Write loggers=[loggers.CsvLogger()]."
        )
    loggers = tuple(given)
    for logger in loggers:
        _check(logger)
    return loggers


def is_logger(given: Any) -> bool:
    """Returns whether an object has the methods of a logger."""
    return all(callable(getattr(given, name, None)) for name in _METHODS)


def _check(logger: Any) -> None:
    if isinstance(logger, str):
        form = _NAMES.get(logger.lower(), "CsvLogger()")
        form = form if form.startswith("nothing") else f"distaff.loggers.{form}"
        raise ConfigError(f"A logger is an object; got {logger!r}. Write {form}.")
    if isinstance(logger, type):
        name = logger.__name__
        raise ConfigError(
            f"A logger is an object; got the class {name}. Write loggers=[{name}(...)]."
        )
    missing = [name for name in _METHODS if not callable(getattr(logger, name, None))]
    if missing:
        raise ConfigError(
            f"A logger has the methods {', '.join(_METHODS)}; {logger!r} lacks {missing}. See "
            "distaff.loggers.Logger; loggers of other libraries have other methods."
        )
    for name in _METHODS:
        check_override(logger, name, getattr(NullLogger, name))
