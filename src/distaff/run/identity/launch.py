"""Launch: the runs that one process makes, so that a program which died takes them up again.

A launch is a file below the root, `.launches/<id>.json`, locked while its process lives. A process
that ends in order removes it, unless a run is left to be resumed. One that is there, and locked by
nobody, is *open*: the process died. Started again, a program finds its runs in it: the n-th run of
a name is the n-th run of that name. Where the file system has no locks, there are no launches.
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

from distaff.core.files import FILE_MODE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FOLDER = ".launches"
_MOST, _TRIES = 32, 50
_lock = threading.RLock()
_launches: dict[Path, Launch] = {}

Standing = Literal["open", "alive", "closed"]


class Seat(NamedTuple):
    """The place of a run in a program.

    Attributes:
        launch: of the process.
        name: of the run.
        position: how many runs of that name the process has made before.
        key: that the user has given it; None without.
    """

    launch: Launch
    name: str
    position: int
    key: str | None = None

    def marks(self) -> dict[str, Any]:
        """Returns what the status of a new run says of its place."""
        found = {"id": self.launch.id, "position": self.position} if self.launch.id else None
        return {"launch": found, "key": self.key}

    def standing(self, status: Mapping[str, Any]) -> Standing:
        """Returns how the launch of an earlier run stands."""
        launch = status.get("launch")
        name = launch.get("id") if isinstance(launch, Mapping) else None
        return self.launch.standing(name) if isinstance(name, str) else "closed"

    def is_of(self, status: Mapping[str, Any]) -> bool:
        """Whether an earlier run has this place in its program."""
        launch = status.get("launch")
        return isinstance(launch, Mapping) and launch.get("position") == self.position

    def adopt(self, status: Mapping[str, Any]) -> bool:
        """Takes the launch of an earlier run for the own one; False where it is not open."""
        launch = status.get("launch")
        return isinstance(launch, Mapping) and self.launch.adopt(str(launch.get("id")))


class Launch:
    """The runs of this process below one root.

    Args:
        root: the folder of all runs, absolute.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / _FOLDER
        self._held: dict[str, int] = {}
        self._begun = ""
        self._counts: Counter[str] = Counter()
        self._unfinished: set[Path] = set()

    @property
    def id(self) -> str | None:
        """The name of the launch; None before `begin`, and where there are no locks."""
        return next(iter(self._held), None)

    def seat(self, name: str, key: str | None = None) -> Seat:
        """Returns the place of the next run of a name."""
        with _lock:
            position = self._counts[name]
            self._counts[name] += key is None
        return Seat(self, name, position, key)

    def begin(self) -> None:
        """Makes the file of the launch, once there is a run in it."""
        if self._held:
            return
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        about = {"process": os.getpid(), "host": platform.node(), "command": sys.argv}
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            if self._take(name, os.O_CREAT | os.O_EXCL):
                self._begun = name
                os.write(self._held[name], json.dumps(about).encode() + b"\n")

    def standing(self, name: str) -> Standing:
        """Returns whether a launch is open, of a process that lives, or closed."""
        if name in self._held:
            return "open"
        if fcntl is None or not self._path(name).is_file():
            return "closed"
        try:
            descriptor = os.open(self._path(name), os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            return "closed"
        try:
            # Shared: processes that look at the same time do not take each other for its holder.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return "alive"
        finally:
            os.close(descriptor)
        return "open" if self._path(name).is_file() else "closed"

    def inherits(self, status: Mapping[str, Any]) -> bool:
        """Whether an earlier run is of an open launch that another process has begun."""
        launch = status.get("launch")
        name = launch.get("id") if isinstance(launch, Mapping) else None
        return isinstance(name, str) and name != self._begun and self.standing(name) == "open"

    def adopt(self, name: str) -> bool:
        """Takes an open launch for the own one; False where another process was quicker."""
        for _ in range(_TRIES):
            if name in self._held or self._take(name):
                return True
            if self.standing(name) != "open":
                return False
            time.sleep(0.01)  # somebody has just looked at it
        return False

    def opened(self, run: Path) -> None:
        """Notes that a run has begun."""
        self._unfinished.add(run)

    def ended(self, run: Path) -> None:
        """Notes that a run has ended, so that nothing of it is left to be resumed."""
        self._unfinished.discard(run)

    def close(self) -> None:
        """Ends the launch of a program that ends in order; one with runs to resume stays open."""
        for name in list(self._held):
            if not self._unfinished:
                with contextlib.suppress(OSError):
                    self._path(name).unlink(missing_ok=True)
            self._release(name)

    @property
    def is_idle(self) -> bool:
        """Whether no run of it is under way, or left to be resumed."""
        return not self._unfinished

    def _path(self, name: str) -> Path:
        return self._folder / f"{Path(name).name}.json"

    def _take(self, name: str, flags: int = 0) -> bool:
        if fcntl is None:
            return False
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | flags, FILE_MODE)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it meanwhile.
            is_there = os.path.samestat(os.stat(path), os.fstat(descriptor))
        except OSError:
            is_there = False
        if not is_there:
            os.close(descriptor)
            return False
        self._held[name] = descriptor
        return True

    def _release(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.close(self._held.pop(name))


def launch_of(root: Path) -> Launch:
    """Returns the launch of this process below a root.

    Args:
        root: absolute.
    """
    with _lock:
        if root not in _launches and len(_launches) >= _MOST:
            idle = next((each for each, launch in _launches.items() if launch.is_idle), None)
            if idle is not None:
                _launches.pop(idle).close()
        return _launches.setdefault(root, Launch(root))


@atexit.register
def close_all() -> None:
    """Ends the launches of this process; a program that Ctrl-C has ended leaves them open."""
    is_broken_off = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
    if is_broken_off and not hasattr(sys, "ps1") and "IPython" not in sys.modules:
        return
    for launch in _launches.values():
        launch.close()
    _launches.clear()


def _forget() -> None:
    """Lets go in a forked child of what its parent holds."""
    global _lock
    for launch in _launches.values():
        for descriptor in launch._held.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
    _launches.clear()
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
