"""Supervisor: when a run is saved, when it ends before its time, and what watches its progress."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeVar

from distaff.run.events import Interrupted
from distaff.run.supervision.interruption import Interruption, SupervisionOptions
from distaff.run.supervision.watchdog import COMPILING, Watchdog

T = TypeVar("T")


class HasPath(Protocol):
    """What has a folder, or none."""

    @property
    def path(self) -> Path | None:
        """The folder."""
        ...


class Verdict(Enum):
    """What a run does after a chunk of steps."""

    GO_ON = "go on"
    SAVE = "save"
    STOP = "stop"
    """A callback wants the epoch to be the last one: its steps end here."""


class Supervisor:
    """Signals, the clock, the wishes of callbacks, and the watchdog of a run.

    Args:
        options: of the run.
        is_watched: whether a stall is reported; nobody is stuck in a debugger.
    """

    def __init__(self, options: SupervisionOptions, *, is_watched: bool) -> None:
        self._interruption = Interruption(max_time=options.max_time, save_every=options.save_every)
        self._stuck_after = options.stuck_after if is_watched else None
        self._watchdog = Watchdog(None)

    @contextmanager
    def listening(self) -> Generator[None]:
        """Listens to signals and to the clock."""
        with self._interruption:
            yield

    @contextmanager
    def watching(self, recording: HasPath) -> Generator[None]:
        """Watches the progress of the run.

        Args:
            recording: its path is that of the run directory, to whose `log.txt` a stall is written.
        """
        path = recording.path and recording.path.absolute() / "log.txt"
        with Watchdog(self._stuck_after, path=path) as self._watchdog:
            yield

    def beat(self, what: str, step: int, patience: float = 1.0) -> None:
        """Notes that something new begins; see `Watchdog.beat`."""
        self._watchdog.beat(what, step, patience)

    def saved(self) -> None:
        """Restarts the clock of `save_every`."""
        self._interruption.saved()

    def verdict(self, stop_reason: str | None) -> Verdict:
        """Returns what the run does after a chunk of steps, the same in all processes.

        Args:
            stop_reason: why a callback wants the run to end; None while none does.
        """
        if stop_reason is not None:
            return Verdict.STOP
        is_asked = self._interruption.agreed() is not None or self._interruption.is_save_due
        return Verdict.SAVE if is_asked else Verdict.GO_ON

    def raise_if_interrupted(self) -> None:
        """Raises what ends a run that has just been saved, if that was asked for.

        Raises:
            Interrupted: it was.
        """
        if self._interruption.ending:
            raise Interrupted(self._interruption.ending)

    def interruptible(
        self, items: Iterator[T], what: str, step: int, *, is_on: Callable[[], bool]
    ) -> Iterator[T]:
        """Yields items, such as the chunks of an evaluation, until the run is to end.

        Args:
            items: what is gone through.
            what: what is done with them.
            step: completed updates.
            is_on: whether the run can be saved as it was before the first of them.

        Raises:
            Interrupted: it is to end.
        """
        patience = COMPILING
        for item in items:
            if is_on() and self._interruption.agreed():
                self.raise_if_interrupted()
            self.beat(what, step, patience)
            patience = 1.0
            yield item

    @property
    def is_ending(self) -> bool:
        """Whether this process is asked to end the run; no other process is asked."""
        return self._interruption.reason is not None
