"""Launcher: starts a job, passes signals on, and starts it again after a failure."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distaff.cli.launch.job import End, Job, Log
from distaff.cli.launch.options import LaunchOptions
from distaff.core import launched
from distaff.core.config.durations import seconds_of
from distaff.errors import RunDirectoryError

_POLL_SECONDS = 0.1
"""Time between two looks at the log of process 0."""

_REQUESTS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Signals that ask the job to stop, and the exit status after each."""

_MOST_REQUESTS = 2
"""Requests to pass on; another one ends the processes, saved or not."""

_WRONG_COMMAND = 2
"""Exit status of a wrong command or option, which another start does not mend."""


class Launcher:
    """Runs several processes of one job until all have ended.

    Args:
        options: the options of the command.
        words: the target and its arguments.
    """

    def __init__(self, options: LaunchOptions, words: Sequence[str]) -> None:
        self._options = options
        child = [sys.executable, "-P", "-m", "distaff.cli.launch.child", str(os.getpid())]
        self._command = [*child, *words]
        self._folder = options.logs or Path("runs", "launch", time.strftime("%Y-%m-%dT%H-%M-%S"))
        self._job = Job((), (), ())
        self._requested = self._num_requests = 0

    def run(self) -> int:
        """Starts the job, again after a failure if `--restarts` allows it; returns the exit status.

        Raises:
            RunDirectoryError: the folder of the logs cannot be made.
        """
        self._make_folder()
        with self._signals():
            for restart in range(1, self._options.restarts + 2):
                failure = self._attempt()
                if failure is None or self._requested:
                    return self._requested if failure is None else failure.status
                if failure.status in (_WRONG_COMMAND, *_REQUESTS.values()):
                    break
                if restart <= self._options.restarts:
                    number = f"restart {restart} of {self._options.restarts}"
                    _say(f"starting all processes again: {number}")
        return failure.status

    def _attempt(self) -> End | None:
        """Runs all processes until they have ended; returns the first failure, or None."""
        count = self._options.processes
        logs = [Log(self._folder / f"process-{index}.log") for index in range(count)]
        job = Job(self._command, self._environments(), logs)
        self._job = job
        if self._requested:
            return None
        job.start()
        if self._requested:  # while they were started
            job.send(signal.SIGTERM)
        failure = None
        while job.is_running and failure is None:
            end = job.next_end(_POLL_SECONDS)
            logs[0].copy()
            failure = end if end is not None and self._has_failed(end) else None
            if self._num_requests > _MOST_REQUESTS:
                break
        if failure is not None or job.is_running:
            job.end(seconds_of(self._options.grace))
        logs[0].copy()
        if failure is not None:
            self._report(failure, logs[failure.index])
        return failure

    def _has_failed(self, end: End) -> bool:
        """Whether a process has failed; one that was asked to stop has not."""
        return end.status not in (0, self._requested) and not (
            self._requested and end.status in _REQUESTS.values()
        )

    def _report(self, failure: End, log: Log) -> None:
        who = f"process {failure.index} of {self._options.processes}"
        if failure.status in _REQUESTS.values():
            _say(f"{who} was stopped ({failure}); all have ended")
            return
        reason = "stalled" if failure.status == launched.STALLED else "failed"
        lines = "".join(f"  {line}\n" for line in log.last_lines())
        _say(f"{who} {reason} first ({failure}). The last lines of {log.path}:\n{lines}".rstrip())

    def _environments(self) -> list[dict[str, str]]:
        """Returns the environment of each process, with an address that was free a moment ago."""
        options = self._options
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            launched.COORDINATOR: f"127.0.0.1:{port}",
            launched.COUNT: str(options.processes),
            launched.LOCAL_COUNT: str(options.processes),
            launched.HEARTBEAT: str(seconds_of(options.heartbeat)),
            launched.START_TIMEOUT: str(seconds_of(options.start_timeout)),
            launched.END_STALLED: "1",
        }
        devices = options.devices_per_process
        if devices is not None:
            shared |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            # With fewer threads, collectives of simulated devices can wait for each other for ever.
            shared.setdefault("NPROC", str(max(2 * devices, os.cpu_count() or 1)))
        return [{**shared, launched.INDEX: str(each)} for each in range(options.processes)]

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(
                f"The folder of the logs, {str(self._folder)!r}, cannot be made: {error}. Pass "
                "another one as --logs."
            ) from error
        _say(f"{self._options.processes} processes, logs in {self._folder}")

    @contextmanager
    def _signals(self) -> Generator[None]:
        """Passes signals on to the processes inside the block."""
        handlers = {signal.SIGINT: self._request, signal.SIGTERM: self._request}
        handlers |= {signal.SIGHUP: self._request, signal.SIGUSR1: self._pass_on}
        previous = {}
        for number, handler in handlers.items():
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                previous[number] = signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        """Asks the processes to stop; they save first, and may take their time."""
        sent = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        self._requested = self._requested or _REQUESTS[sent]
        self._num_requests += 1
        self._job.send(sent)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._job.send(signal.Signals(number))


def _say(text: str) -> None:
    print(f"distaff launch: {text}", file=sys.stderr, flush=True)
