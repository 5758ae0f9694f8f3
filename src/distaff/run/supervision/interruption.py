"""Interruption: saves a run on request, and stops it on SIGTERM, Ctrl-C or a time limit.

See `docs/decisions/0013-interruption.md`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from distaff.core.config.cadence import Cadence, Every
from distaff.core.config.durations import Duration, seconds_of
from distaff.core.config.options import Options, option, or_none
from distaff.core.config.options import time as checked_time
from distaff.execution.processes import Agreement

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_SAVE_SIGNAL = getattr(signal, "SIGUSR1", None)
"""Missing on Windows."""

_SAVE_FILE_SECONDS = 1.0
"""Time between two looks for the file that asks for a checkpoint."""

_SAVE, _MAX_TIME, _CTRL_C, _SIGTERM, _STOP = 1, 2, 3, 4, 5
_CODES: dict[int, int] = {signal.SIGTERM: _SIGTERM, signal.SIGINT: _CTRL_C}

_ENDING: dict[int, bytes] = {
    signal.SIGTERM: b"\nSIGTERM: the run is saved at the end of this step.\n",
    signal.SIGINT: b"\nCtrl-C: the run is saved at the end of this step. "
    b"A second Ctrl-C ends it at once, unsaved.\n",
}

_SAVING = b"\nSIGUSR1: the run is saved at the end of this step, and continues.\n"

_UNDELETED = (
    "\n{path} cannot be deleted ({reason}). The run is saved once; delete it yourself before you "
    "request another save.\n"
)

_SAVE_EVERY = Cadence(("seconds", "steps", "epochs", "examples", "tokens"), number="seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisionOptions(Options):
    """When a run is saved, stopped, and considered stuck."""

    save_every: str | float | None = option(
        "10m",
        """Time between two checkpoints within an epoch, in addition to validations: the
        most work lost if a machine fails. Approximate for a time ("10m", or seconds); exact for
        "500 steps", "50000 examples" or "1e8 tokens"; "2 epochs" saves at the ends of epochs. None
        to disable.""",
        check=or_none(_SAVE_EVERY.check),
        resume="same run",
    )
    max_time: str | float | None = option(
        None,
        """Longest duration of a run, such as "3h30m", a number of seconds, or a `timedelta`. The
        run is then saved, and ends as interrupted.""",
        check=or_none(checked_time),
        resume="ignored",
    )
    stuck_after: str | float | None = option(
        "10m",
        """Longest time without progress before the stacks of all threads are logged. None to
        disable. Starting and compiling may take six times as long, a checkpoint three times.""",
        check=or_none(checked_time),
        resume="same run",
    )

    @property
    def saving(self) -> Every | None:
        """How often to save, in addition to validations; None if never."""
        every = self.save_every
        return None if every is None else _SAVE_EVERY.parse("save_every", every)

    @property
    def seconds_between_saves(self) -> float | None:
        """Seconds between two saves; None if saves are not timed."""
        every = self.saving
        return every.count if every is not None and every.unit == "seconds" else None


class Interruption:
    """Context that handles requests to stop a run: SIGTERM, Ctrl-C, and a time limit.

    A signal only sets `reason`; poll it to stop the run. A second Ctrl-C runs the previous handler,
    which by default raises `KeyboardInterrupt`. On exit the previous handlers are restored, and a
    SIGTERM that was received is sent again, so that the process ends as usual, only later. It is
    not sent again if an exception propagates.

    Only the main thread can set handlers; other threads check the time limit alone. A signal that
    the process ignores stays ignored. Nested contexts forward signals to the outer one.

    SIGUSR1, or a file that appears at `save_file`, requests a checkpoint without a stop. A handler
    of SIGUSR1 that other code has set stays in place.

    >>> with Interruption(max_time="3h30m") as interruption:
    ...     while interruption.reason is None:
    ...         step()

    Args:
        max_time: longest duration; None for no limit. See `seconds_of`.
        save_every: time between two saves; None to disable.
        clock: returns seconds, as `time.monotonic` does.

    Raises:
        ConfigError: `max_time` or `save_every` is not a duration.

    Attributes:
        ending: the reason agreed on last, or None.
        is_save_due: whether all processes have agreed to save the run and continue.
        is_stop_due: whether all have agreed to stop because of a callback of one of them.
        is_alone: whether there is only one process.
        due_at: before this time of `clock`, `agreed` returns None and need not be called.
        is_save_requested: whether a signal or a file has requested a checkpoint in this process.
        save_file: path whose appearance requests a checkpoint; the file, or an empty folder, is
            then deleted.
    """

    save_file: Path | None = None
    is_stop_due = False

    def __init__(
        self,
        *,
        max_time: Duration | None = None,
        save_every: Duration | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limit = "max_time" if max_time is None else f"max_time={max_time}"
        self._reasons = (None, None, limit, "Ctrl-C", "SIGTERM", None)  # by increasing urgency
        self.ending: str | None = None
        self._code = 0
        self.is_alone = jax.process_count() == 1  # may start the backend: before the timers
        self.due_at, self.clock = -math.inf, clock
        self._deadline = clock() + _seconds(max_time, "max_time")
        self._save_seconds = _seconds(save_every, "save_every")
        self._next_look = -math.inf
        self._save_file_stays = False
        self.saved()
        self._previous: dict[int, Any] = {}
        self._num_interrupts = 0
        self._process = os.getpid()
        self._agreement = Agreement(preempted=_SIGTERM)

    @property
    def reason(self) -> str | None:
        """Reason of this process to stop: `"SIGTERM"`, `"Ctrl-C"`, `"max_time=3h30m"` or None.

        It is cheap enough for every step.
        """
        if not self._code and self.clock() >= self._deadline:
            self._code = _MAX_TIME
        return self._reasons[self._code]

    def agreed(self, *, is_stopped: bool = False) -> str | None:
        """Returns the reason to stop the run, the same in all processes at the same call.

        With one process this is `reason`. With several, each must call it equally often and at the
        same points of the run, such as after every chunk of steps. The reason of one process then
        reaches all of them, within seconds if the calls are frequent.

        Args:
            is_stopped: whether a callback of this process stops the run; see `is_stop_due`.

        Returns:
            The reason; None to continue.
        """
        now = self.clock()
        if now >= self._next_look:
            self._next_look = now + _SAVE_FILE_SECONDS
            self.is_save_requested |= self._takes_save_file()
        own = (
            self._code
            if self.reason
            else _SAVE * (self.is_save_requested or now >= self._next_save)
        )
        agreed = own if self.is_alone else self._agreement(_STOP if is_stopped else own)
        self.is_save_due, self.ending = agreed == _SAVE, self._reasons[agreed]
        self.is_stop_due = agreed == _STOP
        if self.ending:
            self._code = max(self._code, agreed)
        self._schedule()
        return self.ending

    def saved(self) -> None:
        """Restarts the timer of `save_every`. Earlier requests for a checkpoint are met."""
        self.is_save_due = self.is_save_requested = False
        self._next_save = self.clock() + self._save_seconds
        self._schedule()

    def _takes_save_file(self) -> bool:
        """Deletes the save file, or an empty folder of its name; returns whether it is a request.

        One that cannot be deleted is a request once, and a line on standard error says so.
        """
        path, stays = self.save_file, self._save_file_stays
        self._save_file_stays = False
        if path is None or not os.path.lexists(path):
            return False
        try:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            self._save_file_stays = os.path.lexists(path)  # else another process was faster
            if self._save_file_stays and not stays:
                reason = error.strerror or type(error).__name__
                with suppress(OSError):
                    os.write(2, _UNDELETED.format(path=path, reason=reason).encode())
            return self._save_file_stays and not stays
        return True

    def _schedule(self) -> None:
        """Sets the time at which to ask next."""
        look = math.inf if self.save_file is None else self._next_look
        self.due_at = min(self._deadline, self._next_save, look)
        if self._code or self.is_save_requested or not self.is_alone:  # last: signals may arrive
            self.due_at = -math.inf

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None is a handler not set by Python, which could not be restored.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._handle)
            if _SAVE_SIGNAL and signal.getsignal(_SAVE_SIGNAL) == signal.SIG_DFL:
                self._previous[_SAVE_SIGNAL] = signal.signal(_SAVE_SIGNAL, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            if signal.getsignal(number) in (self._handle, self._request):  # not by other code
                signal.signal(number, handler)
        if self._code == _SIGTERM and signal.SIGTERM in previous and kind is None:
            _send_again(signal.SIGTERM)

    def _request(self, number: int, frame: FrameType | None) -> None:
        """Requests a checkpoint."""
        if os.getpid() != self._process:
            _act_as(self._previous.get(number, signal.SIG_DFL), number, frame)
            return
        with suppress(OSError):
            os.write(2, _SAVING)
        self.is_save_requested = True
        self.due_at = -math.inf

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number, signal.SIG_DFL)
        if os.getpid() != self._process:  # a fork, in which no run polls
            _act_as(previous, number, frame)
            return
        self._num_interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._num_interrupts > 1:
            _act_as(previous, number, frame)
            return
        outer = getattr(previous, "__self__", None)
        if isinstance(outer, Interruption):
            outer._handle(number, frame)  # prints the message
        elif self._code < _CODES[number]:
            with suppress(OSError):  # not print: a handler may interrupt a print
                os.write(2, _ENDING[number])
        self._code = max(self._code, _CODES[number])
        self.due_at = -math.inf


def _seconds(duration: Duration | None, name: str) -> float:
    return math.inf if duration is None else seconds_of(duration, name)


def _act_as(handler: Any, number: int, frame: FrameType | None) -> None:
    """Runs another handler of a signal."""
    if callable(handler):
        handler(number, frame)
    else:
        signal.signal(number, handler)
        signal.raise_signal(number)


def _send_again(number: signal.Signals) -> None:
    """Sends a signal to this process, which ends it unless other code has set a handler."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # missing or closed
            stream.flush()
    is_fatal = signal.getsignal(number) == signal.SIG_DFL
    if is_fatal and jax.distributed.is_initialized():
        jax.distributed.shutdown()  # waits for the other processes, which would abort otherwise
    signal.raise_signal(number)
    if is_fatal:  # the kernel does not deliver it to the first process of a container
        os._exit(128 + number)
