"""One run at a time in a directory: `flock` on `run.lock`, a file that names the run.

The kernel releases the lock when the process ends, also by SIGKILL; no forked child keeps it.

- On one machine two runs never share a directory: processes and threads, in containers too.
- On several machines the same holds where the file system passes `flock` on, as NFS does unless it
  is mounted with `local_lock` or `nolock`. It may take NFS two minutes to notice that a machine
  is gone; until then the directory is in use.
- Without `flock` (some cluster file systems, Windows), a second run is stopped only if the file
  names a process of this machine that is alive: two that start at once, or on two machines, are not
  kept apart, which the log says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from distaff.core.config import encoding
from distaff.core.files import FILE_MODE
from distaff.errors import RunInUseError
from distaff.run.directory.process import is_alive, this_process
from distaff.run.directory.run_directory import explained

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_log = logging.getLogger("distaff")

LOCK_FILE = "run.lock"

_MOST_BYTES = 4096
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

# Held while a lock is taken or released, so that neither a fork nor another thread comes between.
_forking = threading.RLock()
_descriptors: set[int] = set()


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, as its file says: a process as `this_process` names it.

    Attributes:
        pid: the process id.
        host: the name of the machine.
        system: its present boot, and the process ids among which `pid` counts.
        started: when the process started; None where the system does not tell.
        since: when the run began, in UTC.
    """

    pid: int
    host: str
    system: str
    started: int | None
    since: str

    @property
    def is_alive(self) -> bool | None:
        """Whether the process is alive; None where that cannot be known from here."""
        return is_alive(asdict(self))


@contextlib.contextmanager
def locked(directory: Path) -> Generator[None]:
    """Keeps other runs out of a run directory while in the block.

    The lock of a process that was killed is taken over, and the log says so.

    Args:
        directory: an existing run directory.

    Raises:
        RunInUseError: another process, or thread, holds it; it is named.
        RunDirectoryError: the lock's file cannot be written.
    """
    path, process = Path(directory).absolute() / LOCK_FILE, os.getpid()
    with explained(path), _forking:
        descriptor = _take(path)
    try:
        yield
    finally:
        # A forked child may leave the block too; the lock is not its own.
        if os.getpid() == process:
            _release(path, descriptor)


def is_held_elsewhere(directory: Path) -> bool:
    """Returns whether the lock's file names a run on another machine."""
    holder = _read(Path(directory) / LOCK_FILE)
    return holder is not None and holder.system != this_process()["system"]


def _take(path: Path) -> int:
    while True:
        descriptor = _open(path)
        try:
            is_locked = _flock(path, descriptor)
            if _is_at(path, descriptor):
                _check_ended(path, is_locked=is_locked)
                _write(descriptor)
                return descriptor
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)  # its last holder has removed the file


def _flock(path: Path, descriptor: int) -> bool:
    """Locks a file; False where there are no such locks.

    Raises:
        RunInUseError: another holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, _living_holder(path)) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _check_ended(path: Path, *, is_locked: bool) -> None:
    """Looks at the run that the lock's file names, if any.

    Raises:
        RunInUseError: there is no lock, and its process is alive.
    """
    holder = _read(path)
    if not is_locked:
        if holder is not None and holder.is_alive:
            raise _in_use(path, holder)
        _log.warning(
            "%s: there are no file locks here, and nothing keeps two runs apart that start at "
            "once or on two machines: start one at a time",
            path.parent,
        )
    if holder is not None:
        _log.warning(
            "%s: taken over from process %d on %s, which began at %s and %s",
            *(path.parent, holder.pid, holder.host, holder.since),
            "is dead" if holder.is_alive is False else "holds no lock that is seen from here",
        )


def _release(path: Path, descriptor: int) -> None:
    # Removed before it is unlocked. If it cannot be, the next run takes it over.
    with _forking:
        with contextlib.suppress(OSError):
            if _is_at(path, descriptor):
                path.unlink()
        _close(descriptor)


def _open(path: Path) -> int:
    # A link in the place of the lock must not lead to the truncation of another file.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, FILE_MODE)
    _descriptors.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    if descriptor in _descriptors:
        _descriptors.remove(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """Closes the locks of the parent in a forked child, in which they would outlive it."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_let_go
    )


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int) -> None:
    me = Holder(**this_process(), since=datetime.now(UTC).isoformat(timespec="seconds"))
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(asdict(me)).encode() + b"\n")


def _read(path: Path) -> Holder | None:
    """Returns who is named in a lock's file; None where it names nobody."""
    try:
        with path.open("rb") as file:
            holder = Holder(**encoding.loads(file.read(_MOST_BYTES)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    texts = (holder.host, holder.system, holder.since)
    known = type(holder.pid) is int and type(holder.started) in (int, type(None))
    if not known or not all(type(text) is str and text.isprintable() for text in texts):
        return None
    return holder if 0 < holder.pid < 2**31 else None


def _living_holder(path: Path) -> Holder | None:
    """Returns who holds a lock, which writes its name only after it has taken it."""
    deadline = time.monotonic() + 1
    while True:
        holder = _read(path)
        if (holder is not None and holder.is_alive is not False) or time.monotonic() > deadline:
            return holder
        time.sleep(0.01)


def _in_use(path: Path, holder: Holder | None) -> RunInUseError:
    who = "another process"
    if holder is not None:
        who = f"process {holder.pid} on {holder.host!r} since {holder.since}"
    return RunInUseError(
        f"A run directory takes one run at a time; {str(path.parent)!r} is in use by {who}. "
        f"Wait until that ends, stop it, or choose another directory."
    )
