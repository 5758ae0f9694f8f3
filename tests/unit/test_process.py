"""Process: whether one that was named is still alive."""

from __future__ import annotations

import os
import subprocess

from distaff.run.directory import process
from distaff.run.directory.process import is_alive, this_process


def test_process_is_dead_when_it_has_ended(monkeypatch):
    assert is_alive(this_process())
    assert is_alive({**this_process(), "started": 1}) is False  # its number is another's by now
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        child = {**this_process(), "pid": other.pid, "started": process._started(other.pid)}
        assert is_alive(child)
        other.stdin.close()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert is_alive(child) is False  # though its parent has not asked yet
    assert is_alive(child) is False
    # Where there is no /proc, such as on macOS.
    monkeypatch.setattr(process, "_started", lambda pid: None)
    assert is_alive({**child, "started": None}) is False
    assert is_alive({**this_process(), "started": None})


def test_process_of_another_machine_container_or_system_is_not_known(monkeypatch):
    here = this_process()
    assert is_alive({**here, "host": "elsewhere", "started": 1}) is None
    assert is_alive({**here, "system": "another container", "started": 1}) is None
    del here["system"]  # as an earlier version wrote it
    assert is_alive(here)
    assert is_alive({**here, "started": 1}) is False
    monkeypatch.setattr(process, "_IS_POSIX", False)
    assert is_alive(here) is None
