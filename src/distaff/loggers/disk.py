"""File access for loggers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from distaff.core import files
from distaff.core.files import FILE_MODE, write_whole
from distaff.core.paths import as_path
from distaff.errors import RunDirectoryError

explained = partial(
    files.explained, rule="The log of a run needs files that can be {}", other="path"
)
Location: TypeAlias = str | os.PathLike[str] | Callable[[], str | os.PathLike[str]]
"""A path or a function that returns it: a run directory gets its name once training starts."""


def locator(location: Location) -> Callable[[], str | os.PathLike[str]]:
    """Returns a function that returns the path.

    Raises:
        ConfigError: `location` is a path of another file system.
    """
    if isinstance(location, str | os.PathLike):
        path = as_path(location, "The path of a logger")
        return lambda: path
    return location


def open_private(name: str, flags: int) -> int:
    """Opens a file that is not world-writable, for `open(..., opener=)`."""
    return os.open(name, flags, FILE_MODE)


def is_file(path: Path) -> bool:
    """Returns whether a file to append to exists.

    Raises:
        RunDirectoryError: the path is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise RunDirectoryError(
            f"Loggers write regular files; {str(path)!r} is not one. "
            f"Move it away, or choose another path."
        )
    return path.exists()


def replace(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replaces a file atomically; creates its directory if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
