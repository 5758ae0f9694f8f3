"""Reserves the version of a new run, and locks it before anything is written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from distaff.errors import RunInUseError
from distaff.run.directory.run_directory import RunDirectory, explained, is_left_over
from distaff.run.directory.run_lock import LOCK_FILE, is_held_elsewhere, locked


def reserve(directory: RunDirectory, lock: ExitStack) -> None:
    """Reserves a version for a new run, and locks it.

    Versions left empty by killed runs are reused. Runs that start at the same time get different
    versions.

    Raises:
        RunDirectoryError: no version can be created, or another run uses the one already created.
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
    """Locks a version. Returns False if another run uses it."""
    attempt = ExitStack()
    with attempt, explained(path):
        try:
            attempt.enter_context(locked(path))
        except RunInUseError:
            return False
        if not is_left_over(path):  # another run has used it meanwhile, and ended
            return False
        for left in path.iterdir():
            if left.name != LOCK_FILE:
                left.unlink(missing_ok=True)
        lock.push(attempt.pop_all())
    return True
