"""What is said of a checkpoint that could not be written, or cannot be read."""

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
    "A checkpoint never replaces what it did not write, and something else is in its place: move "
    "that away"
)
_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space",
    errno.EDQUOT: "The quota is used up: free some space",
    errno.EROFS: "The file system is read-only: make it writable, or choose another root",
    errno.EACCES: "Its directory does not permit it: change its permissions",
    errno.EPERM: "Its directory does not permit it: change its permissions",
    errno.ENOTDIR: "A file is where a directory should be: move it away",
    errno.EEXIST: _IN_ITS_PLACE,
    errno.ENOTEMPTY: _IN_ITS_PLACE,
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


def is_of_storage(error: BaseException | None) -> bool:
    """Whether a save has failed because of where it was to be written, and not of what it was.

    Args:
        error: what was raised while it was written.
    """
    while error is not None:
        if isinstance(error, OSError) or any(word in str(error) for word in _words_of_storage()):
            return True
        error = error.__cause__
    return False


def going_on(newest: int | None) -> str:
    """Returns two sentences on what a failed save means that ends nothing.

    Args:
        newest: the newest step that has a whole checkpoint.
    """
    whole = "There is no whole checkpoint yet"
    whole = whole if newest is None else f"The newest whole checkpoint is of step {newest}"
    return f"{whole}. Training goes on, as on_failed_save='warn' asks for."


def warned(text: str) -> None:
    """Says on the main thread, and in the log, what is wrong and ends nothing.

    Args:
        text: whole sentences.
    """
    _log.warning("%s", text)
    warn(text, stacklevel=3)


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


def _words_of_storage() -> list[str]:
    """Returns what Orbax and TensorStore say where the system has refused them something."""
    return ["os_error_code", *map(os.strerror, _REMEDIES)]


def _remedy(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else None
    for known, remedy in _REMEDIES.items():
        # Orbax and TensorStore pass on the words of the system, not its number.
        if number == known or (number is None and os.strerror(known) in str(error)):
            return remedy
    return "Make room, or make its directory writable"
