"""Several loggers as one."""

from __future__ import annotations

from collections.abc import Mapping

from distaff.loggers.protocol import JSON, Logger
from distaff.typing import Values


class ManyLoggers:
    """Hands each call to every logger, in the order given.

    Args:
        loggers: the loggers; none at all is allowed.
    """

    def __init__(self, *loggers: Logger) -> None:
        self.loggers = loggers

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records the metrics in every logger."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step, epoch=epoch)

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the configuration in every logger."""
        for logger in self.loggers:
            logger.log_config(config)

    def close(self, status: str) -> None:
        """Closes every logger, also after one has failed, and then raises the first failure."""
        failures: list[Exception] = []
        for logger in self.loggers:
            try:
                logger.close(status)
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
