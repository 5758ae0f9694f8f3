"""Paths without characters that Orbax would interpret."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

# Orbax builds glob patterns from the path, in which [, ], * and ? are special; TensorStore needs
# UTF-8 without control characters.
_OPEN_FILES = "/proc/self/fd"
_PLAIN = re.compile(r"[\w./ +=,@:-]*", re.ASCII)


@contextlib.contextmanager
def safe(folder: Path) -> Generator[Path]:
    """Yields an equivalent path of a folder without special characters, valid within the block.

    If the path has such characters, it goes through a descriptor of the opened parent.

    Args:
        folder: an absolute path; its parent exists.

    Raises:
        OSError: the parent cannot be opened.
    """
    if os.name != "posix" or _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    if not _PLAIN.fullmatch(folder.name):
        # Only a folder that was renamed by hand.
        with _link_to(folder) as path:
            yield path
        return
    descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        through = Path(_OPEN_FILES, str(descriptor))
        if through.is_dir():
            yield through / folder.name
        else:
            with _link_to(folder.parent) as parent:
                yield parent / folder.name
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _link_to(folder: Path) -> Generator[Path]:
    """Yields a link to a folder in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="distaff-") as directory:
        link = Path(directory, "link")
        link.symlink_to(folder, target_is_directory=True)
        yield link
