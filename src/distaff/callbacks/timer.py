"""Timer: the seconds of each epoch and validation, as metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from distaff.callbacks.callback import Callback, StepInfo
from distaff.callbacks.chunk_scope import ChunkScope


class Timer(Callback):
    """Logs the seconds of each epoch as `time/epoch`, of each validation as `time/validation`.

    Both are wall time on the host. An epoch includes compiling and waiting for data, and leaves out
    validations and checkpoints within it. A validation within an epoch includes the rest of the
    program before it. A resumed epoch counts from where it was resumed. Steps stay fused. The
    metrics of two equal runs differ in these values.

    Args:
        clock: returns seconds; it never goes backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = self._epoch = 0.0

    def on_training_start(self, info: StepInfo) -> None:
        """Starts the first epoch."""
        self._since, self._epoch = self._clock(), 0.0

    def on_epoch_end(self, info: StepInfo) -> None:
        """Logs the seconds of the epoch."""
        self._count()
        seconds, self._epoch = self._epoch, 0.0
        self._log("time/epoch", seconds, info)

    def on_validation_end(self, info: StepInfo) -> None:
        """Logs the seconds of the validation."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        self._log("time/validation", seconds, info)

    def on_checkpoint(self, info: StepInfo) -> None:
        """Leaves out the time to save."""
        self._since = self._clock()

    @contextmanager
    def around_epoch(self, directory: Path | None) -> Generator[ChunkScope]:
        """Counts the programs of an epoch."""
        yield self._around_chunk

    @contextmanager
    def _around_chunk(self, steps: range) -> Generator[None]:
        yield
        self._count()

    def _count(self) -> None:
        now = self._clock()
        self._epoch, self._since = self._epoch + now - self._since, now

    def _log(self, name: str, seconds: float, info: StepInfo) -> None:
        if info.logger is not None:
            info.logger.log_metrics({name: seconds}, step=info.step, epoch=info.epoch)
