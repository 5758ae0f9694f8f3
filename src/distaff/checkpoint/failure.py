"""Errors and warnings for checkpoints that cannot be written or read."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from distaff.core.warnings import warn
from distaff.errors import CheckpointError

_log = logging.getLogger("distaff")

_IN_ITS_PLACE = (
    "A checkpoint never replaces files that Distaff did not write, and something else has its "
    "name: move that away"
)
_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space",
    errno.EDQUOT: "The disk quota is exceeded: free some space",
    errno.EROFS: "The file system is read-only: make it writable, or choose another root",
    errno.EACCES: "The directory is not writable: change its permissions",
    errno.EPERM: "The directory is not writable: change its permissions",
    errno.ENOTDIR: "A file has the name of a directory: move it away",
    errno.EEXIST: _IN_ITS_PLACE,
    errno.ENOTEMPTY: _IN_ITS_PLACE,
}


def not_written(path: Path, error: BaseException) -> CheckpointError:
    """Returns the error for a checkpoint that could not be written, with its cause and remedy."""
    return CheckpointError(
        f"The checkpoint {path} was not written: {error}. Earlier checkpoints are unchanged. "
        f"{_remedy(error)}, and save again."
    )


def is_of_storage(error: BaseException | None) -> bool:
    """Returns whether a save failed because of the storage, not because of the data."""
    # Orbax and TensorStore include the system's message in theirs.
    messages = ("os_error_code", *map(os.strerror, _REMEDIES))
    while error is not None:
        if isinstance(error, OSError) or any(message in str(error) for message in messages):
            return True
        error = error.__cause__
    return False


def going_on(newest: int | None) -> str:
    """Returns the end of a warning on a failed save, given the newest step with a checkpoint."""
    whole = "There is no whole checkpoint yet"
    whole = whole if newest is None else f"The newest whole checkpoint is of step {newest}"
    return f"{whole}. Training continues because of on_failed_save='warn'."


def warned(text: str) -> None:
    """Warns, and logs the warning."""
    _log.warning("%s", text)
    warn(text, stacklevel=3)


def unreadable(path: Path, problem: Exception | str, steps: Sequence[int]) -> CheckpointError:
    """Returns the error for a checkpoint that cannot be read; lists the steps to load instead."""
    return CheckpointError(
        f"The checkpoint {path} cannot be read: {problem}. Load another one. {known(steps)}"
    )


def known(steps: Sequence[int]) -> str:
    """Returns a sentence on the steps that have a checkpoint."""
    return f"Known steps: {', '.join(map(str, steps)) or 'none'}."


def _remedy(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else None
    for known, remedy in _REMEDIES.items():
        # Orbax and TensorStore include the system's message, not its number.
        if number == known or (number is None and os.strerror(known) in str(error)):
            return remedy
    return "Free some space, or make the directory writable"
