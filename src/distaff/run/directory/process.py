"""Names a process, and finds out whether one that was named is still alive."""

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
    """Returns what distinguishes this process from all others, as strict JSON."""
    pid = os.getpid()
    here = {"host": socket.gethostname(), "system": _system()}
    return {**here, "pid": pid, "started": _started(pid)}


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Returns whether a process is alive; None where that cannot be known from here.

    It can be of a process on this machine and in this container, unless the machine is Windows.

    Args:
        process: as `this_process` returned it there.
    """
    pid, started = process["pid"], process["started"]
    here = (socket.gethostname(), _system())
    if not _IS_POSIX or (process["host"], process.get("system", here[1])) != here:
        return None
    now = _started(pid)
    if now is not None:
        return now == started  # another process may have been given the number since
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True


def _system() -> str:
    """Returns the machine's present boot, and the process ids that count there, where known."""
    known = ["", ""]
    with contextlib.suppress(OSError):
        known[0] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        known[1] = os.readlink("/proc/self/ns/pid")
    return " ".join(known).strip()


def _started(pid: int) -> int | None:
    """Returns when a process began, in clock ticks; None where the system does not tell.

    One that has ended, and whose parent has not asked how, is still listed: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *others = line.rpartition(")")[2].split()  # the name before it may hold anything
    return _ENDED if state in "ZX" else int(others[18])
