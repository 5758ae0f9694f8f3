"""Which process is at a trial, and whether it is still there."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ENDED = -1


def this_process() -> dict[str, Any]:
    """Returns what tells this process from all others, as strict JSON."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def is_gone(process: Mapping[str, Any]) -> bool:
    """Tells whether a process has ended; of one on another machine that cannot be known.

    Args:
        process: as `this_process` returned it there.
    """
    host, pid, started = (process[name] for name in ("host", "pid", "started"))
    if host != socket.gethostname():
        return False
    now = _started(pid)
    if now is not None:
        return now != started  # another process may have been given the number since
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


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
