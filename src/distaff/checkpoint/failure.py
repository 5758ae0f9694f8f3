"""What is said of a checkpoint that could not be written, or cannot be read."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from distaff.errors import CheckpointError

_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space",
    errno.EDQUOT: "The quota is used up: free some space",
    errno.EROFS: "The file system is read-only: make it writable, or choose another root",
    errno.EACCES: "Its directory does not permit it: change its permissions",
    errno.EPERM: "Its directory does not permit it: change its permissions",
    errno.ENOTDIR: "A file is where a directory should be: move it away",
}


def not_written(path: Path, error: BaseException) -> CheckpointError:
    """Returns the error that names a checkpoint, what went wrong, and the remedy.

    Args:
        path: the folder that the checkpoint was to have.
        error: what was raised while it was written, by the system or by Orbax.
    """
    return CheckpointError(
        f"The checkpoint {path} was not written: {error}. The ones before it are untouched. "
        f"{_remedy(error)}, and save again."
    )


def unreadable(path: Path, problem: Exception | str, steps: Sequence[int]) -> CheckpointError:
    """Returns the error that names a checkpoint, what is wrong with it, and those beside it.

    Args:
        path: its folder.
        problem: what is wrong.
        steps: of the checkpoints that are there.
    """
    return CheckpointError(
        f"The checkpoint {path} cannot be read: {problem}. Load another one. {known(steps)}"
    )


def known(steps: Sequence[int]) -> str:
    """Returns a sentence on the steps that have a checkpoint."""
    return f"Steps that are there: {', '.join(map(str, steps)) or 'none'}."


def _remedy(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else None
    for known, remedy in _REMEDIES.items():
        # Orbax and TensorStore pass on the words of the system, not its number.
        if number == known or (number is None and os.strerror(known) in str(error)):
            return remedy
    return "Make room, or make its directory writable"
