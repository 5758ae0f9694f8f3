"""Job: the processes of one attempt, their logs, and the order in which they end."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_LINES = 30
"""Lines of a log to show after a failure."""

_MOST_BYTES = 64 * 1024
"""Bytes of a log to read for them."""


class End(NamedTuple):
    """The end of a process.

    Attributes:
        index: the index of the process.
        code: its exit status, or the negative number of the signal that killed it.
    """

    index: int
    code: int

    @property
    def status(self) -> int:
        """The exit status as shells give it: 128 and the number of a signal."""
        return self.code if self.code >= 0 else 128 - self.code

    def __str__(self) -> str:
        if self.code >= 0:
            return f"exit status {self.code}"
        return f"killed by {signal.Signals(-self.code).name}"


class Log:
    """A log that a process appends to; `copy` prints what is new.

    Args:
        path: the file. What it contains already is of an earlier attempt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._copied = path.stat().st_size if path.exists() else 0

    def copy(self) -> None:
        """Writes to standard output what the process has written since the last call."""
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(self._copied)
            new = file.read()
            self._copied += len(new)
            if new:
                sys.stdout.flush()
                stream = getattr(sys.stdout, "buffer", None)
                if stream is None:  # replaced by a stream of text
                    sys.stdout.write(new.decode(errors="replace"))
                else:
                    stream.write(new)
                sys.stdout.flush()

    def last_lines(self) -> list[str]:
        """Returns the last lines of this attempt."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._start, size - _MOST_BYTES))
                return file.read().decode(errors="replace").splitlines()[-_LINES:]
        except OSError as error:
            return [f"(its log cannot be read: {error})"]


class Job:
    """The processes of one attempt. Each has a session of its own, out of reach of Ctrl-C.

    Args:
        command: the command of all of them.
        environments: the environment of each.
        logs: the log of each, for both of its streams.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        logs: Sequence[Log],
    ) -> None:
        self._command = command
        self._environments = environments
        self._logs = logs
        self._processes: list[subprocess.Popen[bytes]] = []
        self._running: set[int] = set()
        self._ends: queue.SimpleQueue[End] = queue.SimpleQueue()

    @property
    def is_running(self) -> bool:
        """Whether a process has not ended yet."""
        return bool(self._running)

    def start(self) -> None:
        """Starts all processes."""
        for index, (environment, log) in enumerate(
            zip(self._environments, self._logs, strict=True)
        ):
            with log.path.open("ab") as file:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self._processes.append(process)
            self._running.add(index)
            threading.Thread(target=self._wait, args=(index, process), daemon=True).start()

    def next_end(self, seconds: float) -> End | None:
        """Returns the next process that has ended, in the order in which they do.

        Args:
            seconds: the longest time to wait for one; None is returned then.
        """
        try:
            end = self._ends.get(timeout=seconds)
        except queue.Empty:
            return None
        self._running.discard(end.index)
        return end

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the processes that run."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def end(self, grace: float) -> None:
        """Ends the processes that run: by SIGTERM, and after a grace by SIGKILL.

        Processes that they have started themselves get SIGKILL, too.
        """
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while self.is_running and (left := deadline - time.monotonic()) > 0:
            self.next_end(left)
        for process in self._processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        while self.is_running:
            self.next_end(1.0)

    def _wait(self, index: int, process: subprocess.Popen[bytes]) -> None:
        self._ends.put(End(index, process.wait()))
