"""Supervisor: decides when a run saves and stops, and reports stalls."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from distaff.callbacks.callbacks import Callbacks
from distaff.execution.processes import gathered
from distaff.run.events import Interrupted
from distaff.run.supervision.interruption import Interruption, SupervisionOptions
from distaff.run.supervision.watchdog import COMPILING, Watchdog

T = TypeVar("T")


class HasBoundary(Protocol):
    """Has a state of the run that can be saved, or None."""

    boundary: Any


class Verdict(Enum):
    """What to do after a chunk of steps."""

    CONTINUE = "continue"
    SAVE = "save"
    STOP = "stop"
    """A callback stops the run: this epoch ends here and is the last one."""


class Supervisor:
    """Decides when a run saves and stops, from signals, timers and callbacks; reports stalls.

    Args:
        options: options of the run.
        callbacks: callbacks, which may stop the run.
        is_watched: whether to report stalls; disabled in a debugger.
    """

    def __init__(
        self, options: SupervisionOptions, callbacks: Callbacks, *, is_watched: bool
    ) -> None:
        self._callbacks = callbacks
        self._interruption = Interruption(
            max_time=options.max_time, save_every=options.seconds_between_saves
        )
        self._stuck_after = options.stuck_after if is_watched else None
        self._watchdog = Watchdog(None)

    def listening(self) -> AbstractContextManager[object]:
        """Handles signals inside the block."""
        return self._interruption

    @property
    def reason(self) -> str | None:
        """Reason to stop that this process was given last, even if the run has ended since."""
        return self._interruption.reason

    @contextmanager
    def watching(self, directory: Path | None) -> Generator[None]:
        """Watches the progress of the run, and requests for a checkpoint.

        Args:
            directory: the run directory; stalls are written to its `log.txt`, and a file
                `save-now` in it requests a checkpoint.
        """
        path = directory and directory.absolute() / "log.txt"
        self._interruption.save_file = directory and directory.absolute() / "save-now"
        self._interruption.saved()
        with Watchdog(self._stuck_after, path=path) as self._watchdog:
            yield

    def beat(self, what: str, step: int, patience: float = 1.0) -> None:
        """Records progress; see `Watchdog.beat`."""
        self._watchdog.latest = (what, step, patience)

    @contextmanager
    def patience(self, what: str, step: int, factor: float) -> Generator[None]:
        """Watches the block as an activity of its own; the earlier one then starts again.

        Args:
            what: see `Watchdog.beat`.
            step: see `Watchdog.beat`.
            factor: factor for `stuck_after` inside the block.
        """
        earlier = self._watchdog.latest
        self.beat(what, step, factor)
        try:
            yield
        finally:
            self.beat(*earlier)

    def saved(self) -> None:
        """Restarts the timer of `save_every`."""
        self._interruption.saved()

    def verdict(self) -> Verdict:
        """Returns what to do after a chunk of steps, the same in all processes."""
        interruption, is_stopped = self._interruption, self._callbacks.stop_reason is not None
        if is_stopped and interruption.is_alone:
            return Verdict.STOP
        if interruption.clock() < interruption.due_at:
            return Verdict.CONTINUE
        is_due = interruption.agreed(is_stopped=is_stopped) is not None or interruption.is_save_due
        if interruption.is_stop_due:
            self.agree_on_stop()
            return Verdict.STOP
        return Verdict.SAVE if is_due else Verdict.CONTINUE

    def agree_on_stop(self) -> None:
        """Stops the run in all processes if a callback of one of them has stopped it.

        With several processes, each calls this after the same events.
        """
        callbacks = self._callbacks
        if self._interruption.is_alone:
            return
        found = gathered([callbacks.stop_reason, callbacks.stop_status])
        for reason, status in found:
            if reason is not None:
                callbacks.stop_reason, callbacks.stop_status = reason, status
                return

    def raise_if_interrupted(self) -> None:
        """Stops a run that was just saved, if all processes agreed to stop.

        Raises:
            Interrupted: they did.
        """
        if self._interruption.ending:
            raise Interrupted(self._interruption.ending)

    def interruptible(self, checkpoints: HasBoundary, items: Iterator[T]) -> Iterator[T]:
        """Yields the chunks of an evaluation until the run is to stop.

        Args:
            checkpoints: has the state to save if the evaluation is interrupted.
            items: the chunks.

        Raises:
            Interrupted: all processes agreed to stop the run.
        """
        patience, interruption = COMPILING, self._interruption
        for item in items:
            is_due = interruption.clock() >= interruption.due_at
            if is_due and checkpoints.boundary is not None and interruption.agreed():
                self.raise_if_interrupted()
            self.beat("an evaluation", self._watchdog.latest[1], patience)
            patience = 1.0
            yield item

    @property
    def is_save_requested(self) -> bool:
        """Whether a signal or the file `save-now` requests a checkpoint in this process."""
        return self._interruption.is_save_requested

    @property
    def is_ending(self) -> bool:
        """Whether this process has a reason to stop; does not consult other processes."""
        return self._interruption.reason is not None
