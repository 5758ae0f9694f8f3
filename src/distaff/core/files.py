"""Writes files atomically, and explains file system errors."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Generator, Iterable
from pathlib import Path

from distaff.errors import RunDirectoryError

FILE_MODE = 0o664
"""Default permissions of a file, before the umask; never writable by everybody."""


def write_whole(
    target: Path, content: str | bytes | Iterable[bytes], *, mode: int = FILE_MODE
) -> None:
    """Writes a file atomically: after a crash it has either its old or its new content.

    A str is written in UTF-8. `mode` has the permissions before the umask.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        with open(descriptor, "wb") as file:
            content = content.encode() if isinstance(content, str) else content
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: Path, verb: str = "written", *, rule: str, other: str) -> Generator[None]:
    """Turns an OSError in the block into an error with a remedy.

    Args:
        path: the file or directory.
        verb: what failed, as a past participle.
        rule: what must be possible, such as `"A log can be {}"`, formatted with the verb.
        other: what to change instead, such as `"root"`.

    Raises:
        RunDirectoryError: the block raised an OSError.
    """
    try:
        yield
    except RunDirectoryError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Choose another {}, or change its permissions.")
        raise RunDirectoryError(
            f"{rule.format(verb)}; {str(path)!r} cannot be {verb}: {error.strerror or error}. "
            f"{remedy.format(other)}"
        ) from error


_REMEDIES = {
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "Move that file away, or choose another {}."),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or choose another disk."),
    errno.ENOENT: "Check the path.",
    errno.ENAMETOOLONG: "Choose a shorter name, or a {} with a shorter path.",
}


def drop_partial_line(path: Path) -> None:
    """Removes an incomplete last line, left by a full disk or a crash."""
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
