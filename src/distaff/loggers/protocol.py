"""The logger protocol: three required methods, and optional ones for media and resuming."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from distaff.core import optional
from distaff.core.config.overrides import check_override
from distaff.core.typing import Values
from distaff.errors import ConfigError, nearest

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""A value that strict JSON can hold."""

_METHODS = ("log_metrics", "log_config", "close")
_NAMES = ("console", "csv", "mlflow", "tensorboard", "trackio", "wandb")
_EXTRAS = ("mlflow", "tensorboard", "trackio", "wandb")


class Logger(Protocol):
    """Records the metrics and the configuration of a run."""

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records metrics.

        Args:
            metrics: values by name, such as `{"train/loss": 0.31, "val/loss": 0.35}`.
            step: completed optimizer updates.
            epoch: the epoch that the metrics belong to.
        """
        ...

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the resolved configuration of the run, once, before the first metrics."""
        ...

    def close(self, status: str) -> None:
        """Flushes and closes files and connections; a second call does nothing.

        Args:
            status: the status of the run: `"finished"`, `"stopped"`, `"pruned"`, `"interrupted"` or
                `"failed"`.
        """
        ...


class MediaLogger(Protocol):
    """Logs figures, images, histograms and texts if the backend supports them.

    A logger defines the methods that its backend supports. `trainer.last_run.logger` is a
    `ManyLoggers`, which has all four and passes each call to the loggers that define it.
    """

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a figure.

        Args:
            name: such as `val/confusion`.
            figure: a matplotlib Figure; it is neither changed nor closed.
            step: completed optimizer updates.
        """
        ...

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Records an image.

        Args:
            name: such as `val/reconstructions`.
            image: `[height, width]`, or `[height, width, channels]` with 1, 3 or 4 channels; uint8,
                or float in [0, 1].
            step: completed optimizer updates.
        """
        ...

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Records a histogram of the finite values.

        Args:
            name: such as `params/Dense_0/kernel`.
            values: numbers, of any shape.
            step: completed optimizer updates.
        """
        ...

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Records a text, such as a sample of a language model.

        Args:
            name: such as `val/sample`.
            text: the text, of any length.
            step: completed optimizer updates.
        """
        ...


class ResumingLogger(Protocol):
    """Drops the records after the last checkpoint when a run is resumed.

    A logger may define `resume` alone or both methods; both are optional. A step alone does not say
    which records a resumed run will log again: some metrics of a step are logged before its
    checkpoint and some after it. The position does.
    """

    def position(self) -> JSON:
        """Flushes the log and returns its current position, in a form that the logger chooses.

        A checkpoint saves it, and `resume` receives it.
        """
        ...

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops the records after a checkpoint; called before the first metrics.

        Args:
            step: completed optimizer updates at the checkpoint. Without a position, records of
                later steps are dropped and records of this step are kept.
            position: the return value of `position` at the checkpoint. It is not passed if the
                logger does not define `position`, or the checkpoint has none.
        """
        ...


class StatefulLogger(Protocol):
    """Continues its run at a service when the training run is resumed.

    Without these methods, each start creates another run there.
    """

    def get_state(self) -> JSON:
        """Returns the identity of the run at the service; None before the service has one."""
        ...

    def set_state(self, state: JSON) -> None:
        """Restores the return value of `get_state`; called first when a run is resumed."""
        ...


class GroupedLogger(Protocol):
    """Groups the trials of a study at a service. The method is optional."""

    def set_group(self, group: str) -> None:
        """Sets the group of the next run, unless the user has set one.

        Args:
            group: the name of the study.
        """
        ...


class NullLogger:
    """Records nothing."""

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Does nothing."""

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing."""

    def close(self, status: str) -> None:
        """Does nothing."""


def as_loggers(given: Any) -> tuple[Logger | str, ...]:
    """Returns a list of loggers, and of names of loggers, as a tuple; empty for None.

    Raises:
        ConfigError: `given` is not a list, an item is not a logger, or a name is unknown.
        MissingExtraError: the package of a named logger is not installed.
    """
    if given is None:
        return ()
    if isinstance(given, str | bytes | type) or is_logger(given):
        _check(given)
        form = repr(given) if isinstance(given, str) else f"{type(given).__name__}(...)"
        raise ConfigError(
            f"loggers is a list; got one {type(given).__name__}. Write loggers=[{form}]."
        )
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ConfigError(
            f'loggers is a list of loggers; got {given!r}. Write loggers=["csv"], or '
            "loggers=[loggers.CsvLogger()]."
        )
    loggers = tuple(given)
    for logger in loggers:
        _check(logger)
    names = [each for each in loggers if isinstance(each, str)]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"loggers has {twice[0]!r} more than once. Write it once.")
    return loggers


def is_logger(given: Any) -> bool:
    """Returns whether an object has the methods of a logger."""
    return all(callable(getattr(given, name, None)) for name in _METHODS)


def _check(logger: Any) -> None:
    if isinstance(logger, str):
        _check_name(logger)
        return
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


def _check_name(name: str) -> None:
    if name.lower() == "jsonl":
        raise ConfigError("Each run writes metrics.jsonl itself. Omit 'jsonl' from loggers.")
    if name not in _NAMES:
        raise ConfigError(f"{name!r} is not the name of a logger. {nearest(name.lower(), _NAMES)}")
    if name in _EXTRAS:
        optional.load(name, extra=name)
