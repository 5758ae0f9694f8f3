"""Identifies a process, and checks whether an identified process is still alive."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ENDED = -1
_IS_POSIX = os.name == "posix"  # elsewhere os.kill(pid, 0) would be Ctrl-C


def this_process() -> dict[str, Any]:
    """Returns a description that identifies this process uniquely, as strict JSON."""
    pid = os.getpid()
    here = {"host": socket.gethostname(), "system": _system()}
    return {**here, "pid": pid, "started": _started(pid)}


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Returns whether a process is alive; None if that cannot be determined.

    It can be for processes on this machine and in this container, except on Windows.
    """
    pid, started = process["pid"], process["started"]
    here = (socket.gethostname(), _system())
    if not _IS_POSIX or (process["host"], process.get("system", here[1])) != here:
        return None
    now = _started(pid)
    if now is not None:
        return now == started  # the id may have been reused since
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # a process of another user
    return True


def _system() -> str:
    """Returns the boot id and the PID namespace of the machine, if known."""
    known = ["", ""]
    with contextlib.suppress(OSError):
        known[0] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        known[1] = os.readlink("/proc/self/ns/pid")
    return " ".join(known).strip()


def _started(pid: int) -> int | None:
    """Returns the start time of a process in clock ticks, or None if unknown.

    Zombies are still listed: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *others = line.rpartition(")")[2].split()  # the name may contain spaces and brackets
    return _ENDED if state in "ZX" else int(others[18])
