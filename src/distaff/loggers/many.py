"""Several loggers as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distaff.core.typing import Values
from distaff.loggers.protocol import JSON, Logger


class ManyLoggers:
    """Passes each call to every logger that supports it, in order.

    Args:
        *loggers: the loggers, if any.
    """

    def __init__(self, *loggers: Logger) -> None:
        self.loggers = loggers
        # By place and kind, so that none gets the position of another.
        self._named: list[tuple[str, Any]] = [
            (f"{place}:{_kind(logger)}", logger) for place, logger in enumerate(loggers)
        ]
        self._placed = [each for each in self._named if hasattr(each[1], "position")]

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Records the metrics in every logger."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step, epoch=epoch)

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Records the configuration in every logger."""
        for logger in self.loggers:
            logger.log_config(config)

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a matplotlib Figure in every logger that supports figures."""
        self._log_medium("log_figure", name, figure, step)

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Records an image in every logger that supports images; see `MediaLogger`."""
        self._log_medium("log_image", name, image, step)

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Records a histogram in every logger that supports histograms."""
        self._log_medium("log_histogram", name, values, step)

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Records a text in every logger that supports texts."""
        self._log_medium("log_text", name, text, step)

    def position(self) -> dict[str, JSON]:
        """Returns the position of every logger that has one; see `ResumingLogger`."""
        return {key: logger.position() for key, logger in self._placed}

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops later records in every logger that supports it; see `ResumingLogger`.

        A logger that is new, or at another index in the list, goes by the step.
        """
        known = position if isinstance(position, Mapping) else {}
        for key, logger in self._named:
            if not hasattr(logger, "resume"):
                continue
            if key in known and hasattr(logger, "position"):
                logger.resume(step, known[key])
            else:
                logger.resume(step)

    def get_state(self) -> dict[str, JSON]:
        """Returns the states of the loggers that have one; see `StatefulLogger`."""
        states = {key: each.get_state() for key, each in self._named if hasattr(each, "get_state")}
        return {key: state for key, state in states.items() if state is not None}

    def set_state(self, state: JSON) -> None:
        """Restores the state of each logger that is still at the same index in the list."""
        known = state if isinstance(state, Mapping) else {}
        for key, logger in self._named:
            if key in known and hasattr(logger, "set_state"):
                logger.set_state(known[key])

    def set_group(self, group: str) -> None:
        """Sets the group of the run in every logger that has groups; see `GroupedLogger`."""
        for _, logger in self._named:
            if hasattr(logger, "set_group"):
                logger.set_group(group)

    def close(self, status: str) -> None:
        """Closes every logger, then raises the first failure, if any."""
        failures: list[Exception] = []
        for logger in self.loggers:
            try:
                logger.close(status)
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    def _log_medium(self, method: str, name: str, medium: Any, step: int) -> None:
        for logger in self.loggers:
            if hasattr(logger, method):
                getattr(logger, method)(name, medium, step=step)


def _kind(logger: Any) -> str:
    return getattr(logger, "kind", None) or type(logger).__name__
