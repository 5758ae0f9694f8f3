"""Which checkpoint of a directory is meant, and what of the others is in the way."""

from __future__ import annotations

import logging
from pathlib import Path

from distaff.checkpoint import folders
from distaff.checkpoint.retention import named_best
from distaff.checkpoint.store import CheckpointStore
from distaff.errors import CheckpointError
from distaff.paths import as_path

_log = logging.getLogger("distaff")


def find(path: Path | str) -> tuple[Path, int]:
    """Returns the checkpoint that a user means by a path: the best of a run, else its newest.

    One that is damaged is passed over, and named in the log, unless `path` is its folder. To know
    that, all files of a checkpoint are read.

    Args:
        path: a run directory (`runs/digits/0001`), its `checkpoints` directory, or one checkpoint
            folder (`.../step_00000040`). Nothing in it is touched, and it may have been moved.

    Returns:
        The directory to make a `CheckpointStore` of, and the step to load from it.

    Raises:
        CheckpointError: there is no checkpoint at `path` that is whole and can be read.
    """
    path = as_path(path, "The path of a checkpoint")
    step = folders.step_of(path)
    if step is not None:
        return path.parent, step
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    store = CheckpointStore(directory)
    if not store.steps():
        raise CheckpointError(
            f"There is no whole checkpoint in {directory}, which {folders.content(directory)}. "
            "Pass a run directory such as runs/digits/0001, its checkpoints directory, or one "
            "checkpoint folder such as step_00000040."
        )
    return directory, _readable(store)


def _readable(store: CheckpointStore) -> int:
    """Returns the best checkpoint that can be read, else the newest."""
    newest, best = named_best(store)
    steps, problems = store.steps()[::-1], []
    damaged = [step for step in steps if newest is not None and step > newest]
    for step in dict.fromkeys((*damaged, *best, *steps)):
        problem = store.check(step)
        if problem is None:
            for each in problems:
                _log.warning("%s Step %d is taken instead.", each, step)
            return step
        folder = store.directory / folders.name_of(step)
        problems.append(f"The checkpoint {folder} cannot be read: {problem}.")
    raise CheckpointError(
        f"No checkpoint in {store.directory} can be read. {' '.join(problems)} Restore one of them "
        "from a copy, or train anew."
    )


def tidy(store: CheckpointStore) -> None:
    """Removes what killed saves and removals have left; no other process may be saving here.

    Args:
        store: of a run that goes on.
    """
    if store.directory.is_dir():
        folders.remove_leftovers(store.directory)


def forget_after(store: CheckpointStore, step: int) -> None:
    """Puts the checkpoints of later steps aside, so that a run can go on from this one.

    Args:
        store: of the run.
        step: one of `store.steps()`.

    Raises:
        CheckpointError: there is no checkpoint of this step.
    """
    store.info(step)
    folders.abandon_after(store.directory, step)
