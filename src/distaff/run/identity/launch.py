"""Launches: the runs of one process, so that a program that died resumes them when run again.

A launch is a file `.launches/<id>.json` below the root, locked while its process lives. A process
that exits normally removes it, unless a run is left to resume. A file that nobody locks is *open*:
its process died. When the program runs again, its n-th run of a name resumes the n-th run of that
name. On file systems without locks there are no launches.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distaff.run.directory.run_lock import is_locked, try_lock, unlock

_FOLDER = ".launches"
_MAX_LAUNCHES, _TRIES = 32, 50
_lock = threading.RLock()
_launches: dict[Path, Launch] = {}

Standing = Literal["open", "alive", "closed"]


class Seat(NamedTuple):
    """The position of a run in a program.

    Attributes:
        launch: the launch of the process.
        name: name of the run.
        position: number of earlier runs with that name in the process.
        key: the key passed to `train_model`; None without.
    """

    launch: Launch
    name: str
    position: int
    key: str | None = None

    def marks(self) -> dict[str, Any]:
        """Returns the entries for the `status.json` of a new run."""
        found = {"id": self.launch.id, "position": self.position} if self.launch.id else None
        return {"launch": found, "key": self.key}

    def standing(self, status: Mapping[str, Any]) -> Standing:
        """Returns the standing of the launch of an earlier run."""
        launch = status.get("launch")
        name = launch.get("id") if isinstance(launch, Mapping) else None
        return self.launch.standing(name) if isinstance(name, str) else "closed"

    def is_of(self, status: Mapping[str, Any]) -> bool:
        """Whether an earlier run has the same position in its program."""
        launch = status.get("launch")
        return isinstance(launch, Mapping) and launch.get("position") == self.position

    def place_in(self, status: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the marks of this position in the launch of an earlier run; None without one."""
        launch = status.get("launch")
        return {**launch, "position": self.position} if isinstance(launch, Mapping) else None

    def adopt(self, status: Mapping[str, Any]) -> bool:
        """Adopts the launch of an earlier run. Returns False if it is not open."""
        launch = status.get("launch")
        return isinstance(launch, Mapping) and self.launch.adopt(str(launch.get("id")))


class Launch:
    """The runs of this process below one root.

    Attributes:
        unfinished: directories of runs that are active or left to resume.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / _FOLDER
        self._held: dict[str, int] = {}
        self._own_id = ""
        self._counts: Counter[str] = Counter()
        self.unfinished: set[Path] = set()

    @property
    def id(self) -> str | None:
        """The name of the launch; None before `begin`, or without file locks."""
        return next(iter(self._held), None)

    def seat(self, name: str, key: str | None = None) -> Seat:
        """Returns the position of the next run of a name."""
        with _lock:
            position = self._counts[name]
            self._counts[name] += key is None
        return Seat(self, name, position, key)

    def begin(self) -> None:
        """Creates the file of the launch, for its first run."""
        if self._held:
            return
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        about = {"process": os.getpid(), "host": platform.node(), "command": sys.argv}
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            if self._take(name, os.O_CREAT | os.O_EXCL):
                self._own_id = name
                os.write(self._held[name], json.dumps(about).encode() + b"\n")

    def standing(self, name: str) -> Standing:
        """Returns "open", "alive" (its process is running) or "closed"."""
        if name in self._held:
            return "open"
        locked = is_locked(self._path(name))
        if locked is None:
            return "closed"
        return "alive" if locked else "open"

    def inherits(self, status: Mapping[str, Any]) -> bool:
        """Whether an earlier run belongs to an open launch of another process."""
        launch = status.get("launch")
        name = launch.get("id") if isinstance(launch, Mapping) else None
        return isinstance(name, str) and name != self._own_id and self.standing(name) == "open"

    def adopt(self, name: str) -> bool:
        """Adopts an open launch. Returns False if another process was faster."""
        for _ in range(_TRIES):
            if name in self._held or self._take(name):
                return True
            if self.standing(name) != "open":
                return False
            time.sleep(0.01)  # another process is calling `standing`
        return False

    def close(self) -> None:
        """Ends the launch at a normal exit. It stays open if a run is left to resume."""
        for name in list(self._held):
            if not self.unfinished:
                with contextlib.suppress(OSError):
                    self._path(name).unlink(missing_ok=True)
            unlock(self._held.pop(name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{Path(name).name}.json"

    def _take(self, name: str, flags: int = 0) -> bool:
        descriptor = try_lock(self._path(name), flags)
        if descriptor is None:
            return False
        self._held[name] = descriptor
        return True


def launch_of(root: Path) -> Launch:
    """Returns the launch of this process below an absolute root."""
    with _lock:
        if root not in _launches and len(_launches) >= _MAX_LAUNCHES:
            idle = next((each for each, launch in _launches.items() if not launch.unfinished), None)
            if idle is not None:
                _launches.pop(idle).close()
        return _launches.setdefault(root, Launch(root))


@atexit.register
def close_all() -> None:
    """Ends the launches of this process, unless Ctrl-C ended the program."""
    is_interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
    if is_interrupted and not hasattr(sys, "ps1") and "IPython" not in sys.modules:
        return
    for launch in _launches.values():
        launch.close()
    _launches.clear()


def _forget() -> None:  # in a forked child
    global _lock
    for launch in _launches.values():
        for descriptor in launch._held.values():
            unlock(descriptor)
    _launches.clear()
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
