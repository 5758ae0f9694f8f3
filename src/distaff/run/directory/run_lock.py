"""One run at a time in a directory: a lock that ends with its process, however that ends.

The lock is `flock` on the file `run.lock`, which is there while a run is, and names it:

- On one machine two runs never share a directory: processes and threads, in containers too. The
  kernel lets go when the process dies, also by SIGKILL; a forked child does not keep the lock.
- On several machines the same holds where the file system passes `flock` on, as NFS does unless it
  is mounted with `local_lock` or `nolock`. It may take NFS two minutes to notice that a machine
  is gone; until then the directory is in use.
- Where `flock` does not reach the other machine, or is missing, the holder's pulse decides: it
  touches the file every ten seconds, and is believed dead once the file has rested for a minute. A
  holder that was stopped for so long, and then goes on, is not noticed. Without `flock`, a process
  killed in the very millisecond of taking the lock leaves `run.lock.claim`, to be removed by hand.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from distaff.core.config import encoding
from distaff.core.files import FILE_MODE
from distaff.errors import RunInUseError
from distaff.run.directory.run_directory import explained

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_log = logging.getLogger("distaff")

LOCK_FILE = "run.lock"

_PULSE = 10.0  # seconds between two touches of the file
_PATIENCE = 60.0  # seconds without a touch after which a holder elsewhere is dead
_MOST_BYTES = 4096
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

# Held while a descriptor is opened and noted, so that no fork comes between the two.
_forking = threading.RLock()
_descriptors: set[int] = set()


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, as its file tells.

    Attributes:
        process: the process id.
        host: the name of the machine.
        since: when the run began, in UTC.
        kernel: the machine's present boot, or its name where it does not number its boots.
        namespace: the process ids among which `process` counts.
        birth: when the process started, in the kernel's count; empty where that is unknown.
        token: different for each lock.
    """

    process: int
    host: str
    since: str
    kernel: str
    namespace: str
    birth: str
    token: str


@contextlib.contextmanager
def locked(directory: Path) -> Generator[None]:
    """Keeps other runs out of a run directory while in the block.

    What a dead process has left locked is taken over, which the log tells. Where only the pulse can
    tell whether a process of another machine is dead, this takes a minute.

    Args:
        directory: an existing run directory.

    Raises:
        RunInUseError: another process, or thread, holds it; it is named.
        RunDirectoryError: the lock's file cannot be written.
    """
    path = Path(directory).absolute() / LOCK_FILE
    me = _myself()
    with explained(path):
        descriptor = _take(path, me)
    rest = threading.Event()
    pulse = threading.Thread(
        target=_beat, args=(path, descriptor, rest), name="distaff-run-lock", daemon=True
    )
    pulse.start()
    try:
        yield
    finally:
        # A forked child may leave the block too; the lock is not its own.
        if os.getpid() == me.process:
            rest.set()
            pulse.join()
            _release(path, descriptor, me)


def is_held_elsewhere(directory: Path) -> bool:
    """Whether a run on another machine has locked a directory, as far as its lock's file tells."""
    holder = _read(Path(directory) / LOCK_FILE)
    return holder is not None and holder.kernel != _kernel()


def _take(path: Path, me: Holder) -> int:
    while True:
        descriptor = _open(path)
        try:
            taken = _try(path, descriptor, me)
        except BaseException:
            _close(descriptor)
            raise
        if taken:
            return descriptor
        _close(descriptor)


def _try(path: Path, descriptor: int, me: Holder) -> bool:
    """Takes the lock; False where its last holder has removed the file that was opened.

    Raises:
        RunInUseError: another holds it.
    """
    by_kernel = _flock(path, descriptor)
    with contextlib.nullcontext() if by_kernel else _alone(path):
        if not _is_at(path, descriptor):
            return False
        _check_ended(path, by_kernel=by_kernel)
        if not _is_at(path, descriptor):  # removed while we waited for a sign of life
            return False
        _write(descriptor, me)
        return True


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


@contextlib.contextmanager
def _alone(path: Path) -> Generator[None]:
    """Makes looking at the lock's file and writing it one act, where there is no flock."""
    claim = path.with_name(f"{path.name}.claim")
    deadline = time.monotonic() + 2
    while True:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))
            break
        except FileExistsError:
            if time.monotonic() > deadline:
                raise RunInUseError(
                    f"A run directory takes one run at a time; in {str(path.parent)!r} another is "
                    f"just starting. Wait until it ends, or remove {claim.name!r} if there is none."
                ) from None
        time.sleep(0.02)
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _check_ended(path: Path, *, by_kernel: bool) -> None:
    holder = _read(path)
    if holder is None:
        return
    if by_kernel and holder.kernel == _kernel():
        ended = True  # or its kernel, which is ours, would not have given us the lock
    elif (alive := _alive(holder)) is not None:
        ended = not alive
    else:
        _log.warning(
            "%s was locked by process %d on %s: waiting %.0f s for a sign of life",
            *(path.parent, holder.process, holder.host, _PATIENCE),
        )
        ended = _rests(path)
    if not ended:
        raise _in_use(path, holder)
    _log.warning(
        "%s: taken over from process %d on %s, which began at %s and is dead",
        *(path.parent, holder.process, holder.host, holder.since),
    )


def _rests(path: Path) -> bool:
    """Returns whether nobody touches the file for a while."""
    deadline = time.monotonic() + _PATIENCE
    first = _touched(path)
    while time.monotonic() < deadline:
        time.sleep(_PATIENCE / 60)
        if _touched(path) not in (first, None):
            return False
    return True


def _touched(path: Path) -> int | None:
    # NFS asks the server when a file is opened, and may answer from memory otherwise.
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _beat(path: Path, descriptor: int, rest: threading.Event) -> None:
    target = descriptor if os.utime in os.supports_fd else path
    while not rest.wait(_PULSE):
        with contextlib.suppress(OSError):  # the file system is away for a moment
            os.utime(target)


def _release(path: Path, descriptor: int, me: Holder) -> None:
    # Removed before it is unlocked. If it cannot be, the next run takes it over.
    with contextlib.suppress(OSError):
        if _read(path) == me:
            path.unlink()
    _close(descriptor)


def _open(path: Path) -> int:
    # A link in the place of the lock must not lead to the truncation of another file.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with _forking:
        descriptor = os.open(path, flags, FILE_MODE)
        _descriptors.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    with _forking:
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


def _write(descriptor: int, me: Holder) -> None:
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
    types = {name: int if name == "process" else str for name in Holder.__annotations__}
    known = all(type(getattr(holder, name)) is kind for name, kind in types.items())
    if not known or not (holder.host + holder.since).isprintable():
        return None
    return holder if 0 < holder.process < 2**31 else None


def _living_holder(path: Path) -> Holder | None:
    """Returns who holds a lock, which writes its name only after it has taken it."""
    deadline = time.monotonic() + 1
    while True:
        holder = _read(path)
        if (holder is not None and _alive(holder) is not False) or time.monotonic() > deadline:
            return holder
        time.sleep(0.01)


def _in_use(path: Path, holder: Holder | None) -> RunInUseError:
    who = "another process"
    if holder is not None:
        who = f"process {holder.process} on {holder.host!r} since {holder.since}"
    return RunInUseError(
        f"A run directory takes one run at a time; {str(path.parent)!r} is in use by {who}. "
        f"Wait until that ends, stop it, or choose another directory."
    )


def _myself() -> Holder:
    return Holder(
        process=os.getpid(),
        host=platform.node(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        kernel=_kernel(),
        namespace=_namespace(),
        birth=_birth(os.getpid()) or "",
        token=secrets.token_hex(8),
    )


def _kernel() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _birth(process: int) -> str | None:
    """Returns when a process started, empty where it is dead; None where the system hides it."""
    try:
        # proc(5): the name stands in parentheses, and may hold some; state and start come after.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _alive(holder: Holder) -> bool | None:
    """Returns whether a process lives; None where that cannot be known from here."""
    here = (_kernel(), _namespace())
    if os.name != "posix" or (holder.kernel, holder.namespace) != here:
        return None
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    birth = _birth(holder.process)
    return birth is None or birth == holder.birth
