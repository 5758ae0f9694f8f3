"""Watchdog: reports the stacks of all threads if a run makes no progress."""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import jax

from distaff.core.config.durations import Duration, seconds_of
from distaff.core.files import FILE_MODE
from distaff.core.launched import END_STALLED, STALLED
from distaff.errors import BarrierError
from distaff.execution.processes import barrier

STUCK_AFTER = "10m"
"""Time without progress that counts as a stall, the timeout of collectives on GPUs. A false alarm
costs a page of log; an unnoticed hang costs a night."""

COMPILING = 6.0
"""Factor for compiling: large models compile for half an hour."""

SAVING = 3.0
"""Factor for saving and restoring: checkpoints are large, and file systems are shared."""

_MAX_WAIT = 60.0


class Watchdog:
    """Context that watches the progress of a run, and writes the stacks of all threads on a stall.

    It writes once per stall: host, process, step, the current activity, and the stacks. With
    several processes it then names those at another place, for which the others wait. It does not
    stop the run, except under `distaff launch`: there the process ends with status 124. Its thread
    does not keep the process alive. It cannot detect a stall in native code that holds the GIL.

    >>> with Watchdog(path=log) as watchdog:
    ...     for step, batch in enumerate(batches):
    ...         watchdog.beat("a step", step)

    Args:
        stuck_after: time without a beat that counts as a stall; None to disable. See `seconds_of`.
        path: file to append to; standard error then gets only a line. None to write everything to
            standard error.

    Raises:
        ConfigError: `stuck_after` is not a duration.

    Attributes:
        latest: the arguments of the last `beat`.
    """

    def __init__(
        self, stuck_after: Duration | None = STUCK_AFTER, *, path: Path | None = None
    ) -> None:
        self._seconds = None if stuck_after is None else seconds_of(stuck_after, "stuck_after")
        self._path = path
        self.latest: tuple[str, int, float] = ("the start", 0, COMPILING)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, what: str, step: int, patience: float = 1.0) -> None:
        """Records progress. Costs almost nothing.

        Args:
            what: the activity that starts, such as `"a step"` or `"evaluation"`; the same in all
                processes.
            step: completed optimizer updates.
            patience: factor for `stuck_after` during this activity, such as `COMPILING`.
        """
        self.latest = (what, step, patience)

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            # Read now: a thread that hangs while it starts the backend would hold the lock.
            self._num_processes = jax.process_count()
            self._who = f"Process {jax.process_index()} ({os.getpid()} on {socket.gethostname()})"
            self._stop.clear()
            self._thread = threading.Thread(
                target=self._watch, args=(self._seconds,), name="distaff-watchdog", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)  # it may be waiting for other processes
            self._thread = None

    def _watch(self, seconds: float) -> None:
        """Checks for a new beat ten times in `seconds`; beats have no times."""
        beat, since, is_reported = self.latest, time.monotonic(), False
        while not self._stop.wait(min(seconds / 10, 10.0)):
            latest, now = self.latest, time.monotonic()
            if latest is not beat:
                if is_reported:
                    self._write(f"{self._who} continues, after {now - since:.0f} s.\n")
                beat, since, is_reported = latest, now, False
            elif not is_reported and now - since >= seconds * beat[2]:
                is_reported = True
                self._report(beat, now - since, seconds)

    def _report(self, beat: tuple[str, int, float], waited: float, seconds: float) -> None:
        what, step, _ = beat
        is_ending = os.environ.get(END_STALLED) == "1"
        then = f"the process ends with status {STALLED}" if is_ending else "the run is not stopped"
        self._write(
            f"{self._who} seems stuck: at step {step}, {what} has taken {waited:.0f} s so far. The "
            f"stacks of its threads follow; {then}.\n",
            stacks=True,
        )
        if self._num_processes > 1:
            try:
                barrier(f"stuck at step {step}: {what}", min(seconds, _MAX_WAIT))
                self._write(f"All {self._num_processes} processes are stuck at this place.\n")
            except BarrierError as error:
                self._write(f"Not all processes are stuck at this place. {error}\n")
        if is_ending:
            os._exit(STALLED)

    def _write(self, text: str, stacks: bool = False) -> None:
        """Writes without Python's logging, because the stall may be at its lock."""
        with suppress(OSError):
            os.write(2, text.encode())
        if self._path is None:
            if stacks:
                faulthandler.dump_traceback(2, all_threads=True)
            return
        with suppress(OSError):
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, FILE_MODE)
            try:
                os.write(file, text.encode())
                if stacks:
                    faulthandler.dump_traceback(file, all_threads=True)
            finally:
                os.close(file)
