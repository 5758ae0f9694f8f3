"""The version that a new run takes: one that nobody uses, locked before anything is in it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from distaff.errors import RunInUseError
from distaff.run.directory.run_directory import RunDirectory, explained, is_left_over
from distaff.run.directory.run_lock import LOCK_FILE, is_held_elsewhere, locked


def reserve(directory: RunDirectory, lock: ExitStack) -> None:
    """Takes a version for a new run, and locks it.

    A version that a run left empty, because it was killed at once, is used again. Of several runs
    that start at the same time, each gets a version of its own.

    Args:
        directory: of the run; its `path` is known afterwards.
        lock: what keeps the lock until it is closed.

    Raises:
        RunDirectoryError: no version can be made, or another run is in the one created already.
    """
    if directory.created:
        lock.enter_context(locked(directory.path))
        return
    for path in directory.left_over():
        if not is_held_elsewhere(path) and _is_ours(path, lock):
            directory.take(path)
            return
    while not _is_ours(directory.create(), lock):
        directory.take(None)


def _is_ours(path: Path, lock: ExitStack) -> bool:
    """Locks a version, unless another run has been quicker."""
    attempt = ExitStack()
    with attempt, explained(path):
        try:
            attempt.enter_context(locked(path))
        except RunInUseError:
            return False
        if not is_left_over(path):  # another run has been here, and has ended
            return False
        for left in path.iterdir():
            if left.name != LOCK_FILE:
                left.unlink(missing_ok=True)
        lock.push(attempt.pop_all())
    return True
