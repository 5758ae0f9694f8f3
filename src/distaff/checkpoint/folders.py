"""The names that checkpoints have on disk, and what a save that was cut short leaves there."""

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
    """Returns the name of a checkpoint's folder.

    Args:
        step: completed optimizer updates.

    >>> name_of(1200)
    'step_00001200'
    """
    return NAME.format(step)


def step_of(folder: Path) -> int | None:
    """Returns the step of a whole checkpoint, None for any other folder or file.

    Args:
        folder: a path that need not exist.
    """
    name = _WHOLE.fullmatch(folder.name)
    is_named = name and name_of(int(name[1])) == folder.name and not folder.is_symlink()
    return int(name[1]) if name and is_named and is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Whether a folder, of any name, is a checkpoint that was written to its end.

    Args:
        folder: a path that need not exist.
    """
    return (folder / _COMMIT_MARKER).is_file()


def steps_in(directory: Path, known: set[tuple[str, int]] | None = None) -> tuple[int, ...]:
    """Returns the steps that have a folder which looks whole, ascending.

    Args:
        directory: a path that need not exist.
        known: name and inode of the folders that were found to be whole, which are not looked at
            again; what is found is added.
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
    """Makes a directory, and those above it, unless it is there.

    Args:
        directory: its path.

    Raises:
        OSError: it cannot be made.
    """
    for missing in reversed(
        [path for path in (directory, *directory.parents) if not path.exists()]
    ):
        missing.mkdir(_DIRECTORY_MODE, exist_ok=True)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


def remove_leftovers(directory: Path) -> bool:
    """Removes what killed saves and removals have left; no other process may be writing here.

    Args:
        directory: where the checkpoints are.

    Returns:
        Whether nothing is left. What cannot be removed is logged: it is no reason to end a run.
    """
    left = [entry for entry in directory.iterdir() if _LEFT.fullmatch(entry.name)]
    ours = [entry for entry in left if entry.is_dir() and not entry.is_symlink()]
    staying = [entry for entry in ours if not _is_removed(entry)]
    return not staying


def remove(folder: Path) -> bool:
    """Removes a checkpoint.

    Renamed first: a process killed while it removes files must not leave half a checkpoint under
    the name of a whole one.

    Args:
        folder: a whole checkpoint.

    Returns:
        Whether it is gone; else the reason is logged.
    """
    try:
        folder = folder.rename(folder.with_suffix(EXPIRED))
    except FileNotFoundError:  # somebody else has removed it
        return True
    except OSError as error:
        _log.warning("a checkpoint that is no longer needed stays: %s", error)
        return False
    return _is_removed(folder)


def put_in_place(new: Path, folder: Path, *, is_damaged: bool) -> None:
    """Gives a new checkpoint its name.

    Args:
        new: one that is whole, elsewhere.
        folder: its name. A whole checkpoint that has it is replaced: the new one has more to tell.
        is_damaged: whether the checkpoint that has it is damaged; it is then set aside.

    Raises:
        OSError: it cannot be renamed.
    """
    if step_of(folder) is not None and not is_damaged:
        replace(folder, new)
        return
    if is_damaged and folder.exists():
        _log.warning("the damaged checkpoint %s is %s", folder, set_aside(folder))
    new.rename(folder)


def replace(folder: Path, new: Path) -> None:
    """Puts a checkpoint in the place of another; one of the two is there whatever happens.

    Args:
        folder: a whole checkpoint.
        new: one that is whole, elsewhere.

    Raises:
        OSError: it cannot be renamed.
    """
    old = folder.rename(folder.with_suffix(REPLACED))
    new.rename(folder)
    _is_removed(old)


def restore_replaced(directory: Path) -> None:
    """Gives checkpoints their names back whose replacement was cut short.

    Args:
        directory: where the checkpoints are; it need not exist.
    """
    for old in directory.glob(f"step_*{REPLACED}"):
        folder = old.with_suffix("")
        if not old.is_symlink() and not folder.exists():
            _log.warning("the checkpoint %s is there again: its replacement was cut short", folder)
            old.rename(folder)


def set_aside(folder: Path, suffix: str = DAMAGED) -> Path:
    """Renames a checkpoint, so that its step can be saved again; nothing is removed.

    Args:
        folder: a checkpoint.
        suffix: what tells why.

    Returns:
        Where it is now.

    Raises:
        OSError: it cannot be renamed.
    """
    names = (folder.with_suffix(f"{suffix}{count or ''}") for count in itertools.count())
    return folder.rename(next(name for name in names if not name.exists()))


def abandon_after(directory: Path, step: int) -> None:
    """Puts the checkpoints of later steps aside.

    Args:
        directory: where the checkpoints are.
        step: completed optimizer updates.
    """
    for later in steps_in(directory):
        if later > step:
            path = set_aside(directory / name_of(later), ABANDONED)
            _log.warning("the checkpoint of step %d is now %s", later, path)


def content(directory: Path) -> str:
    """Returns half a sentence on what is there where a checkpoint was looked for.

    Args:
        directory: a path that need not exist.
    """
    if not directory.is_dir():
        return "is no directory" if directory.exists() else "does not exist"
    names = sorted(entry.name for entry in directory.iterdir())
    return f"holds {', '.join(names[:10]) or 'nothing'}{', ...' if names[10:] else ''}"


def _is_removed(folder: Path) -> bool:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning("%s is no longer needed, and cannot be removed: %s", folder, error)
        return False
    return True
