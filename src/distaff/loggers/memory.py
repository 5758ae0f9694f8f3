"""A logger that keeps everything in memory, for tests and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distaff.loggers.protocol import JSON
from distaff.typing import Values


@dataclass(frozen=True, kw_only=True)
class Record:
    """One call of `log_metrics`."""

    step: int
    epoch: int
    metrics: Values


class MemoryLogger:
    """Keeps what it is given.

    Attributes:
        records: one `Record` per call of `log_metrics`, in order.
        config: the configuration, `None` before `log_config`.
        status: how the run ended, `None` before `close`.

    >>> logger = MemoryLogger()
    >>> logger.log_metrics({"loss": 0.5}, step=10, epoch=1)
    >>> logger.records
    [Record(step=10, epoch=1, metrics={'loss': 0.5})]
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.config: Mapping[str, JSON] | None = None
        self.status: str | None = None

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Appends a record."""
        self.records.append(Record(step=step, epoch=epoch, metrics=dict(metrics)))

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Keeps the configuration."""
        self.config = dict(config)

    def close(self, status: str) -> None:
        """Keeps the status of the first call."""
        if self.status is None:
            self.status = status
