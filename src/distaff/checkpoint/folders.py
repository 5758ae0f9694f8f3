"""Checkpoint folders: names, atomic replacement, and cleanup after killed processes."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import shutil
from pathlib import Path

NAME = "step_{:08d}"
SAVING, EXPIRED, REPLACED = ".saving", ".expired", ".replaced"
DAMAGED, ABANDONED = ".damaged", ".abandoned"
_WHOLE = re.compile(r"step_([0-9]{8,})")
_LEFT = re.compile(r"step_[0-9]{8,}\.(saving|expired|replaced|orbax-checkpoint-tmp.*)")
_COMMIT_MARKER = "commit_success.txt"
_log = logging.getLogger("distaff")
_DIRECTORY_MODE = 0o775  # never writable by everybody, whatever the umask


def name_of(step: int) -> str:
    """Returns the folder name of a checkpoint.

    >>> name_of(1200)
    'step_00001200'
    """
    return NAME.format(step)


def step_of(folder: Path) -> int | None:
    """Returns the step of a complete checkpoint; None for any other path."""
    name = _WHOLE.fullmatch(folder.name)
    is_named = name and name_of(int(name[1])) == folder.name and not folder.is_symlink()
    return int(name[1]) if name and is_named and is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Returns whether a path is a complete checkpoint, under any name."""
    return (folder / _COMMIT_MARKER).is_file()


def steps_in(directory: Path, known: set[tuple[str, int]] | None = None) -> tuple[int, ...]:
    """Returns the steps of the folders that look complete, ascending.

    Args:
        directory: a path that need not exist.
        known: a cache of complete folders by name and inode, which is updated.
    """
    known = set() if known is None else known
    try:
        with os.scandir(directory) as entries:
            named = [(each.name, each.inode()) for each in entries if _WHOLE.fullmatch(each.name)]
    except OSError:
        if directory.is_dir():
            raise
        return ()
    known &= set(named)
    known |= {each for each in set(named) - known if step_of(directory / each[0]) is not None}
    return tuple(sorted(int(name.removeprefix("step_")) for name, _ in known))


def make(directory: Path) -> None:
    """Creates a directory and its parents if they do not exist; raises OSError on failure."""
    for missing in reversed(
        [path for path in (directory, *directory.parents) if not path.exists()]
    ):
        missing.mkdir(_DIRECTORY_MODE, exist_ok=True)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


def remove_leftovers(directory: Path) -> bool:
    """Removes the leftovers of killed saves and removals; no other process may be writing here.

    Returns:
        Whether nothing is left. Failures are logged: they do not end a run.
    """
    left = [entry for entry in directory.iterdir() if _LEFT.fullmatch(entry.name)]
    ours = [entry for entry in left if entry.is_dir() and not entry.is_symlink()]
    remaining = [entry for entry in ours if not _is_removed(entry)]
    return not remaining


def remove(folder: Path) -> bool:
    """Removes a complete checkpoint; returns whether it is gone, and logs a failure.

    It is renamed first: a process killed during the removal must not leave a partial checkpoint
    under the name of a complete one.
    """
    try:
        folder = folder.rename(folder.with_suffix(EXPIRED))
    except FileNotFoundError:  # another process has removed it
        return True
    except OSError as error:
        _log.warning("cannot remove an expired checkpoint: %s", error)
        return False
    return _is_removed(folder)


def put_in_place(new: Path, folder: Path, *, is_damaged: bool) -> None:
    """Renames a complete checkpoint to its final name; raises OSError on failure.

    Args:
        new: the complete checkpoint, under another name.
        folder: its final name; a complete checkpoint of that name is replaced.
        is_damaged: whether an existing checkpoint of that name is damaged; it is then set aside.
    """
    if step_of(folder) is not None and not is_damaged:
        # One of the two is always on disk; see `restore_replaced`.
        old = folder.rename(folder.with_suffix(REPLACED))
        new.rename(folder)
        _is_removed(old)
        return
    if is_damaged and folder.exists():
        _log.warning("moved the damaged checkpoint %s to %s", folder, set_aside(folder))
    new.rename(folder)


def restore_replaced(directory: Path) -> None:
    """Restores checkpoints whose replacement was interrupted; the directory need not exist."""
    for old in directory.glob(f"step_*{REPLACED}"):
        folder = old.with_suffix("")
        if not old.is_symlink() and not folder.exists():
            _log.warning("restored the checkpoint %s: its replacement was interrupted", folder)
            old.rename(folder)


def set_aside(folder: Path, suffix: str = DAMAGED) -> Path:
    """Renames a checkpoint, so that its step can be saved again.

    Returns:
        The new path: the old one with `suffix`, and a number if that name exists.

    Raises:
        OSError: it cannot be renamed.
    """
    names = (folder.with_suffix(f"{suffix}{count or ''}") for count in itertools.count())
    return folder.rename(next(name for name in names if not name.exists()))


def abandon_after(directory: Path, step: int) -> None:
    """Sets the checkpoints of later steps aside."""
    for later in steps_in(directory):
        if later > step:
            path = set_aside(directory / name_of(later), ABANDONED)
            _log.warning("moved the checkpoint of step %d to %s", later, path)


def content(directory: Path) -> str:
    """Returns a clause, for an error, on the content of a directory without checkpoints."""
    if not directory.is_dir():
        return "is not a directory" if directory.exists() else "does not exist"
    names = sorted(entry.name for entry in directory.iterdir())
    return f"holds {', '.join(names[:10]) or 'nothing'}{', ...' if names[10:] else ''}"


def _is_removed(folder: Path) -> bool:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning("cannot remove the expired %s: %s", folder, error)
        return False
    return True
