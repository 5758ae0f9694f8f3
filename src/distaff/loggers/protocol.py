"""What a logger is: the three calls a run makes on it, and eight that it may take besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from distaff.core.typing import Values

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
            status: how the run ended: `"finished"`, `"stopped"`, `"pruned"`, `"interrupted"` or
                `"failed"`.
        """
        ...


class MediaLogger(Protocol):
    """Receives what is no number, where the backend takes it.

    A logger has those of these methods that its backend can do; `ManyLoggers`, which is what
    `trainer.last_run.logger` is, has all four, and hands each on to the loggers that have it.
    """

    def log_figure(self, name: str, figure: Any, *, step: int) -> None:
        """Records a drawing.

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
        """Records how values are distributed; those that are not finite are left out.

        Args:
            name: such as `params/Dense_0/kernel`.
            values: numbers, of any shape.
            step: completed optimizer updates.
        """
        ...

    def log_text(self, name: str, text: str, *, step: int) -> None:
        """Records a text, such as a sample of a language model."""
        ...


class ResumingLogger(Protocol):
    """Continues the log of a run that died after its last checkpoint.

    A logger may have `resume` alone, or both; one without is left alone. A step is not enough to
    know what a resumed run will log again: of the metrics of one step, some are logged before the
    checkpoint and some after it. The position is.
    """

    def position(self) -> JSON:
        """Returns how far the log has come, in terms of the logger's own.

        A checkpoint keeps it, and `resume` gets it back. What came before has left the process.
        """
        ...

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops what was logged after a checkpoint; called before the first metrics.

        Args:
            step: completed optimizer updates at the checkpoint. Where no position is given, what
                was logged for greater steps is dropped, and what belongs to this step stays.
            position: what `position` returned at the checkpoint. It is not passed to a logger
                without that method, nor where the checkpoint has none.
        """
        ...


class StatefulLogger(Protocol):
    """Has a run of its own at a service, which a resumed run continues.

    Without these methods, each start is another run there.
    """

    def get_state(self) -> JSON:
        """Returns what identifies the run at the service; None where there is none yet."""
        ...

    def set_state(self, state: JSON) -> None:
        """Has the next call continue a run; called before any other call of a resumed run.

        Args:
            state: what `get_state` returned.
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
