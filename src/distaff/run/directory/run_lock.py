"""Locks a run directory with `flock` on `run.lock`, a file that names the run.

The kernel releases the lock when the process ends, even by SIGKILL. Forked children do not keep it.

- On one machine, processes, threads and containers never share a run directory.
- On several machines the same holds if the file system supports `flock`, as NFS does unless it is
  mounted with `local_lock` or `nolock`. NFS may take two minutes to notice that a machine is gone;
  until then the directory is in use.
- Without `flock` (some cluster file systems, Windows), a second run raises an error only if the
  file names a live process of this machine. Two runs that start at the same time, or on two
  machines, are not detected; a warning says so.
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

from distaff.core.config import strict_json
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

# Held while a lock is taken or released, to exclude forks and other threads.
_forking = threading.RLock()
_descriptors: set[int] = set()


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that a lock file names, as described by `this_process`.

    Attributes:
        pid: process id.
        host: name of the machine.
        system: boot id and PID namespace of the machine.
        started: start time of the process in clock ticks; None if unknown.
        since: start time of the run, in UTC.
    """

    pid: int
    host: str
    system: str
    started: int | None
    since: str

    @property
    def is_alive(self) -> bool | None:
        """Whether the process is alive; None if that cannot be determined."""
        return is_alive(asdict(self))


@contextlib.contextmanager
def locked(directory: Path) -> Generator[None]:
    """Locks a run directory while in the block.

    Takes over the lock of a killed process, with a warning.

    Raises:
        RunInUseError: another process or thread holds the lock; the message names it.
        RunDirectoryError: the lock file cannot be written.
    """
    path, process = Path(directory).absolute() / LOCK_FILE, os.getpid()
    with explained(path), _forking:
        descriptor = _take(path)
    try:
        yield
    finally:
        # A forked child may leave the block, too, but does not own the lock.
        if os.getpid() == process:
            _release(path, descriptor)


def is_held_elsewhere(directory: Path) -> bool:
    """Whether the lock file names a run on another machine."""
    holder = _read(Path(directory) / LOCK_FILE)
    return holder is not None and holder.system != this_process()["system"]


def is_running(directory: Path) -> bool | None:
    """Whether a process runs in a run directory; None if that cannot be determined.

    A process on this machine is looked up by its id. Only for others the lock is tried.
    """
    path = Path(directory) / LOCK_FILE
    holder = _read(path)
    if holder is None or holder.is_alive is not None:
        return holder is not None and holder.is_alive
    return is_locked(path) or None


def try_lock(path: Path, flags: int = 0) -> int | None:
    """Locks a file without waiting. Returns its descriptor, or None on failure."""
    if fcntl is None:
        return None
    with _forking:
        try:
            descriptor = _open(path, flags)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        unlock(descriptor)
        return None


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock of a file; None without a file or locks."""
    if fcntl is None or not path.is_file():
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        # Shared, so that two processes that call this at the same time do not block each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False if path.is_file() else None


def unlock(descriptor: int) -> None:
    """Closes a locked file, unless this process is a fork that has done so."""
    if descriptor in _descriptors:
        _descriptors.remove(descriptor)
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = _open(path, os.O_CREAT)
        try:
            has_lock = _flock(path, descriptor)
            if _is_at(path, descriptor):
                _check_ended(path, has_lock=has_lock)
                _write(descriptor)
                return descriptor
        except BaseException:
            unlock(descriptor)
            raise
        unlock(descriptor)  # the last holder has removed the file


def _flock(path: Path, descriptor: int) -> bool:
    """Locks a file. Returns False if the file system has no locks.

    Raises:
        RunInUseError: another process or thread holds it.
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


def _check_ended(path: Path, *, has_lock: bool) -> None:
    """Checks that the run named by the lock file has ended.

    Raises:
        RunInUseError: the file system has no locks, and its process is alive.
    """
    holder = _read(path)
    if not has_lock:
        if holder is not None and holder.is_alive:
            raise _in_use(path, holder)
        _log.warning(
            "%s: the file system has no locks, so runs that start at the same time or on two "
            "machines are not detected. Start one at a time.",
            path.parent,
        )
    if holder is not None:
        _log.warning(
            "%s: taken over from process %d on %s, which started at %s and %s",
            *(path.parent, holder.pid, holder.host, holder.since),
            "is dead" if holder.is_alive is False else "holds no lock visible to this machine",
        )


def _release(path: Path, descriptor: int) -> None:
    # Removed before it is unlocked. If that fails, the next run takes it over.
    with _forking:
        with contextlib.suppress(OSError):
            if _is_at(path, descriptor):
                path.unlink()
        unlock(descriptor)


def _open(path: Path, flags: int) -> int:
    # Following a link would truncate another file.
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | flags, FILE_MODE)
    _descriptors.add(descriptor)
    return descriptor


def _let_go() -> None:
    """Closes the parent's locks in a forked child, which would otherwise keep them."""
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
    """Returns the process named in a lock file, or None."""
    try:
        with path.open("rb") as file:
            holder = Holder(**strict_json.loads(file.read(_MOST_BYTES)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    texts = (holder.host, holder.system, holder.since)
    known = type(holder.pid) is int and type(holder.started) in (int, type(None))
    if not known or not all(type(text) is str and text.isprintable() for text in texts):
        return None
    return holder if 0 < holder.pid < 2**31 else None


def _living_holder(path: Path) -> Holder | None:
    """Returns the holder of a lock, which writes its name shortly after locking."""
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
        f"The run directory {str(path.parent)!r} is in use by {who}. "
        f"Wait until it ends, stop it, or choose another directory."
    )
