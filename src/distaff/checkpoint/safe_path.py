"""A name for a folder that Orbax takes for nothing but a name."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

# Orbax looks for files by glob patterns made of the path, where [, ], * and ? mean something else;
# TensorStore wants UTF-8, and no control characters.
_OPEN_FILES = "/proc/self/fd"
_PLAIN = re.compile(r"[\w./ +=,@:-]*", re.ASCII)


@contextlib.contextmanager
def safe(folder: Path) -> Generator[Path]:
    """Gives the path of a folder as one without characters that Orbax would take for a pattern.

    Where the path has such characters, its parent is opened, and reached through that.

    Args:
        folder: an absolute path; its parent exists.

    Yields:
        A path of the same folder, to be used within the block.

    Raises:
        OSError: the parent cannot be opened.
    """
    if os.name != "posix" or _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    if not _PLAIN.fullmatch(folder.name):
        # Only a folder that was renamed by hand; it is reached by a link.
        with _linked(folder) as path:
            yield path
        return
    descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        through = Path(_OPEN_FILES, str(descriptor))
        if through.is_dir():
            yield through / folder.name
        else:
            with _linked(folder.parent) as parent:
                yield parent / folder.name
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _linked(folder: Path) -> Generator[Path]:
    """Makes a link to a folder in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="distaff-") as directory:
        link = Path(directory, "link")
        link.symlink_to(folder, target_is_directory=True)
        yield link
