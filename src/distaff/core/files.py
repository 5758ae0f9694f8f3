"""Files that are, whatever happens, whole or as they were, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Generator, Iterable
from pathlib import Path

from distaff.errors import RunDirectoryError

FILE_MODE = 0o664
"""Permissions of a file, which the umask lessens: never writable by everybody."""


def write_whole(
    target: Path, content: str | bytes | Iterable[bytes], *, mode: int = FILE_MODE
) -> None:
    """Writes a file that is, whatever happens, whole or as it was.

    Args:
        target: the file.
        content: its new content; a text is written in UTF-8.
        mode: its permissions, which the umask lessens.

    Raises:
        OSError: it cannot be written.
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
    """Turns what the file system refuses in the block into an error with a remedy.

    Args:
        path: the file or directory in question.
        verb: what cannot be done with it.
        rule: what must be possible, such as `"A log can be {}"`, filled in with the verb.
        other: what else to choose, such as `"root"`.

    Raises:
        RunDirectoryError: there was an OSError.
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
