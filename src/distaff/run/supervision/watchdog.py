"""Watchdog: says where a run hangs, while it hangs."""

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
from distaff.errors import BarrierError
from distaff.execution.barrier import barrier

STUCK_AFTER = "10m"
"""How long no progress is a stall: what collectives on GPUs wait before they give up. A false alarm
costs a page of log, a hang that nobody sees costs a night."""

COMPILING = 6.0
"""How many times longer compiling may take: large models compile for half an hour."""

_MAX_WAIT = 60.0


class Watchdog:
    """Watches a run that tells it of progress; of a stall it writes where every thread stands.

    It writes once per stall: host, process, step, what went on, and the stacks of all threads. With
    several processes it then names those that stand elsewhere: they are who the others wait for.
    It ends nothing, and its thread keeps no process alive. It sees no stall in native code that
    holds the interpreter's lock.

    >>> with Watchdog(path=log) as watchdog:
    ...     for step, batch in enumerate(batches):
    ...         watchdog.beat("a step", step)

    Args:
        stuck_after: how long no beat is a stall; None to watch nothing. See `seconds_of`.
        path: the file to append to, beside a line to standard error; None for all of it there.

    Raises:
        ConfigError: `stuck_after` is not a duration.

    Attributes:
        latest: what began last, the step, and how many times longer than `stuck_after` it may take;
            `beat` sets it.
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
        """Tells of progress: something new begins. It costs next to nothing.

        Args:
            what: what begins, such as `"a step"` or `"evaluation"`; processes that are in step
                must call it the same.
            step: completed optimizer updates.
            patience: how many times longer than `stuck_after` it may take, such as `COMPILING`.
        """
        self.latest = (what, step, patience)

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            # Asked now: a thread that starts the backend and hangs there would hold its lock.
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
        """Looks ten times in `seconds`; the beats' own times are not known."""
        beat, since, is_told = self.latest, time.monotonic(), False
        while not self._stop.wait(min(seconds / 10, 10.0)):
            latest, now = self.latest, time.monotonic()
            if latest is not beat:
                if is_told:
                    self._write(f"{self._who} goes on, after {now - since:.0f} s.\n")
                beat, since, is_told = latest, now, False
            elif not is_told and now - since >= seconds * beat[2]:
                is_told = True
                self._tell(beat, now - since, seconds)

    def _tell(self, beat: tuple[str, int, float], waited: float, seconds: float) -> None:
        what, step, _ = beat
        self._write(
            f"{self._who} seems stuck: at step {step}, {what} has taken {waited:.0f} s so far. The "
            "stacks of its threads follow; nothing is ended.\n",
            stacks=True,
        )
        if self._num_processes > 1:
            try:
                barrier(f"stuck at step {step}: {what}", min(seconds, _MAX_WAIT))
                self._write(f"All {self._num_processes} processes are stuck at this place.\n")
            except BarrierError as error:
                self._write(f"Not all processes are stuck at this place. {error}\n")

    def _write(self, text: str, stacks: bool = False) -> None:
        """Writes without Python's logging, whose lock may be what is stuck."""
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
