"""Files that are, whatever happens, whole or as they were."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

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
