"""A wrapper for loggers that may fail: a failed call is lost, and the run continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from distaff.core.typing import Values
from distaff.core.warnings import warn
from distaff.errors import RunDirectoryError
from distaff.loggers.protocol import JSON

_log = logging.getLogger("distaff")


def is_of_storage(error: BaseException) -> bool:
    """Returns whether a file could not be written because of the disk, not its content."""
    cause = error.__cause__ if isinstance(error, RunDirectoryError) else error
    return isinstance(cause, OSError)


class TolerantLogger:
    """Passes each call to a logger, and turns its errors into warnings.

    Only the first of consecutive failures is a warning; after the next successful call, the log
    says how many are missing. A configuration that failed is retried before the next metrics.

    Args:
        logger: any logger.
        option: the option that makes failures errors, such as `"on_failed_log"`.
        catches: returns whether an error becomes a warning; all others are raised.
    """

    def __init__(
        self,
        logger: Any,
        option: str,
        catches: Callable[[BaseException], bool] = lambda _: True,
    ) -> None:
        self.logger, self.kind = logger, type(logger).__name__
        self._option, self._catches = option, catches
        self._num_lost = 0
        self._config: Mapping[str, JSON] | None = None

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records metrics."""
        if self._config is not None:
            self.log_config(self._config)
        self._call("log_metrics", metrics, step=step, epoch=epoch)

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the configuration, now or before the next metrics."""
        self._config = config
        self._call("log_config", config)
        if not self._num_lost:
            self._config = None

    def close(self, status: str) -> None:
        """Closes the logger, and logs how many calls are missing in it."""
        num_lost = self._num_lost
        self._call("close", status)
        if num_lost and self._num_lost:
            _log.warning("%s: the last %d calls failed", self.kind, self._num_lost)
        self._num_lost = 0

    def __getattr__(self, name: str) -> Any:
        """Returns a further method of the logger, such as `log_figure`, if it has one."""
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self.logger, name)
        return partial(self._call, name) if callable(method) else method

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        try:
            result = getattr(self.logger, name)(*arguments, **options)
        except Exception as error:
            if not self._catches(error):
                raise
            self._num_lost += 1
            text = f"{self.kind}.{name} failed: {type(error).__name__}: {error}"
            if self._num_lost > 1:
                _log.info("%s", text)
                return None
            text = (
                f"{text.rstrip('.')}. The run continues, and calls the logger again; "
                f"{self._option}='raise' makes this an error."
            )
            _log.warning("%s", text)
            warn(text)
            return None
        if self._num_lost and name != "close":
            _log.info("%s works again; %d calls are missing in it", self.kind, self._num_lost)
            self._num_lost = 0
        return result
