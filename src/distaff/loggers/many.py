"""Several loggers as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distaff.core.typing import Values
from distaff.loggers.protocol import JSON, Logger


class ManyLoggers:
    """Hands each call to every logger, in the order given, and each medium to those that take it.

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

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a matplotlib Figure in every logger that takes figures."""
        self._hand_on("log_figure", name, figure, step)

    def log_image(self, name: str, image: Any, *, step: int) -> None:
        """Records an image in every logger that takes images; see `MediaLogger`."""
        self._hand_on("log_image", name, image, step)

    def log_histogram(self, name: str, values: Any, *, step: int) -> None:
        """Records the distribution of values in every logger that takes histograms."""
        self._hand_on("log_histogram", name, values, step)

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Records a text in every logger that takes texts."""
        self._hand_on("log_text", name, text, step)

    def position(self) -> dict[str, JSON]:
        """Returns the position of every logger that has one; see `ResumingLogger`."""
        return {
            key: logger.position() for key, logger in self._named() if hasattr(logger, "position")
        }

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops what every logger that can do so has logged after a checkpoint.

        Args:
            step: completed optimizer updates at the checkpoint.
            position: what `position` returned then. A logger that stood in another place, or was
                not there, goes by the step.
        """
        known = position if isinstance(position, Mapping) else {}
        for key, logger in self._named():
            if not hasattr(logger, "resume"):
                continue
            if key in known and hasattr(logger, "position"):
                logger.resume(step, known[key])
            else:
                logger.resume(step)

    def get_state(self) -> dict[str, JSON]:
        """Returns the states of the loggers that have one; see `StatefulLogger`."""
        states = {
            key: each.get_state() for key, each in self._named() if hasattr(each, "get_state")
        }
        return {key: state for key, state in states.items() if state is not None}

    def set_state(self, state: JSON) -> None:
        """Gives the loggers their states back, each to the one in the same place."""
        known = state if isinstance(state, Mapping) else {}
        for key, logger in self._named():
            if key in known and hasattr(logger, "set_state"):
                logger.set_state(known[key])

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

    def _named(self) -> list[tuple[str, Any]]:
        """Returns the loggers by place and kind, so that none gets the position of another."""
        return [(f"{i}:{_kind(logger)}", logger) for i, logger in enumerate(self.loggers)]

    def _hand_on(self, method: str, name: str, medium: Any, step: int) -> None:
        for logger in self.loggers:
            if hasattr(logger, method):
                getattr(logger, method)(name, medium, step=step)


def _kind(logger: Any) -> str:
    return getattr(logger, "kind", None) or type(logger).__name__
