"""What a logger is: the three calls a run makes on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from distaff.typing import Values

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""A value that strict JSON can hold."""


class Logger(Protocol):
    """Receives what a run measures. It never changes the run, and never reads from it."""

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
        """Writes what is held and lets go of files and connections; a second call does nothing.

        Args:
            status: how the run ended: `"finished"`, `"stopped"`, `"interrupted"` or `"failed"`.
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
