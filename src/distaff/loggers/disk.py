"""How loggers write files: where the caller says, whole or absent, with errors that help."""

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
    files.explained, rule="What a run logs is kept in files that can be {}", other="path"
)
Location: TypeAlias = str | os.PathLike[str] | Callable[[], str | os.PathLike[str]]
"""A path, or a function that gives it: a run's directory has its name only once training starts."""


def locator(location: Location) -> Callable[[], str | os.PathLike[str]]:
    """Returns a function that gives the path; a path that is given is taken as it is now.

    Raises:
        ConfigError: it is a path of another file system.
    """
    if isinstance(location, str | os.PathLike):
        path = as_path(location, "The path of a logger")
        return lambda: path
    return location


def open_private(name: str, flags: int) -> int:
    """Opens a file as `open(..., opener=)` asks for it, never writable by everybody."""
    return os.open(name, flags, FILE_MODE)


def is_file(path: Path) -> bool:
    """Returns whether there is a file to continue.

    Raises:
        RunDirectoryError: something else is in its place.
    """
    if path.exists() and not path.is_file():
        raise RunDirectoryError(
            f"What a run logs is kept in regular files; {str(path)!r} is none. "
            f"Move it away, or choose another path."
        )
    return path.exists()


def replace(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file that is, whatever happens, as it was or whole; a missing directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
