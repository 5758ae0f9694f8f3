"""The options of `distaff launch`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distaff.core.config.checks import whole
from distaff.core.config.durations import seconds_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Starts the processes of one training on this machine, and ends them together.

    TARGET is what `distaff fit` takes, such as `train.py:main` or `digits`, or a script such as
    `train.py`, which calls `distaff.distributed.initialize()` first. All further words are its
    arguments. Each process writes a log; that of process 0 is also printed. If a process fails,
    the others are ended, and the last lines of the first failure are printed.

    Exit status: 0, or that of the process that failed first; 124 if it was stalled, 130 after
    Ctrl-C, 143 after SIGTERM.

    Args:
        processes: number of processes.
        restarts: how often to start all again after a failure or a stall. A run of Distaff resumes.
        devices_per_process: CPU devices of each process. By default each uses one, or its share of
            the GPUs.
        logs: folder of the logs. A new one below runs/launch by default.
        start_timeout: time in which all processes must have joined.
        heartbeat: time without a sign of life of the others after which a process ends.
        grace: time that the others have to end after a failure, from SIGTERM to SIGKILL.
    """

    processes: int
    restarts: int = 0
    devices_per_process: int | None = None
    logs: Path | None = None
    start_timeout: str = "5m"
    heartbeat: str = "10s"
    grace: str = "5s"

    def __post_init__(self) -> None:
        whole("--processes", self.processes, 1)
        whole("--restarts", self.restarts, 0)
        if self.devices_per_process is not None:
            whole("--devices-per-process", self.devices_per_process, 1)
        for name in ("start_timeout", "heartbeat", "grace"):
            seconds_of(getattr(self, name), f"--{name.replace('_', '-')}")
