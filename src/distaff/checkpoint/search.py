"""Which checkpoint of a directory is meant, and what of the others is in the way."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from distaff.checkpoint import folders, manifest
from distaff.checkpoint.record import checked_record, read_record
from distaff.checkpoint.retention import named_best
from distaff.checkpoint.store import CheckpointStore
from distaff.core.config.encoding import load
from distaff.core.paths import as_path
from distaff.errors import CheckpointError

_log = logging.getLogger("distaff")


class _OneFolder(CheckpointStore):
    """Reads one checkpoint, whatever its folder is called.

    Args:
        folder: of the checkpoint.
        step: which it is of.
    """

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder.parent)
        self._folder, self._step = folder, step

    def steps(self) -> tuple[int, ...]:
        """Returns its step, as long as it is there."""
        return (self._step,) if folders.is_whole(self._folder) else ()

    def _path(self, step: int) -> Path:
        return self._folder if step == self._step else super()._path(step)


class Located(NamedTuple):
    """A checkpoint that a path leads to.

    Attributes:
        store: to read it with.
        step: which one of the store.
        folder: where it is.
    """

    store: CheckpointStore
    step: int
    folder: Path

    @property
    def origin(self) -> Path:
        """What errors on the record name."""
        file = self.folder.parent.parent / "config.json"
        return file if file.is_file() else self.folder

    def record(self) -> dict[str, Any]:
        """Returns what determines the run that has saved it.

        `config.json` of its run directory, where the checkpoint is in one; else, or where that file
        is damaged or missing, what the checkpoint itself holds, and the log says so.

        Raises:
            CheckpointError: neither can be read.
        """
        file = self.folder.parent.parent / "config.json"
        is_in_run = self.folder.parent.name == "checkpoints"
        try:
            if is_in_run:
                return read_record(file)
            return checked_record(self.own_record(), self.folder)
        except CheckpointError as error:
            if not is_in_run:
                return read_record(self.folder.parent / "config.json")
            try:
                record = checked_record(self.own_record(), self.folder)
            except CheckpointError:
                raise error from None
            _log.warning("%s The record in the checkpoint %s is used.", error, self.folder)
            return record

    def own_record(self) -> Any:
        """Returns the record that the checkpoint holds; None if it holds none."""
        return self.store.info(self.step).get("record")


def find(path: Path | str) -> tuple[Path, int]:
    """Returns the checkpoint that a user means by a path: the best of a run, else its newest.

    One that is damaged is passed over, and named in the log, unless `path` is its folder. To know
    that, all files of a checkpoint are read.

    Args:
        path: a run directory (`runs/digits/0001`), its `checkpoints` directory, or one checkpoint
            folder (`.../step_00000040`). Nothing in it is touched, and it may have been moved.

    Returns:
        The directory to make a `CheckpointStore` of, and the step to load from it. A checkpoint
        folder under another name is read by `located` alone.

    Raises:
        CheckpointError: there is no checkpoint at `path` that is whole and can be read.
    """
    found = located(path)
    return found.store.directory, found.step


def located(path: Path | str) -> Located:
    """Returns the checkpoint that a user means by a path, as `find` does, and what reads it.

    Args:
        path: as in `find`; or one checkpoint folder that was copied, renamed or linked.

    Raises:
        CheckpointError: there is no checkpoint at `path` that is whole and can be read.
    """
    path = _unlinked(as_path(path, "The path of a checkpoint"))
    step = folders.step_of(path)
    if step is not None:
        return Located(CheckpointStore(path.parent), step, path)
    if folders.is_whole(path):
        step = manifest.step_in(path) or 0
        return Located(_OneFolder(path, step), step, path)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    store = CheckpointStore(directory)
    if not store.steps():
        raise CheckpointError(
            f"There is no whole checkpoint in {directory}, which {folders.content(directory)}. "
            "Pass a run directory such as runs/digits/0001, its checkpoints directory, or one "
            "checkpoint folder such as step_00000040."
        )
    step = _readable(store)
    return Located(store, step, directory / folders.name_of(step))


def recorded(run: Path) -> dict[str, Any]:
    """Returns the record of a run: `config.json`, or what its newest readable checkpoint holds.

    Args:
        run: its directory.

    Returns:
        An empty record where neither can be read; the log says so.
    """
    try:
        record = load(run / "config.json")
        problem = "" if isinstance(record, dict) else "it holds no record"
    except (OSError, ValueError) as error:
        record, problem = None, str(error)
    if isinstance(record, dict):
        return record
    store = CheckpointStore(run / "checkpoints")
    for step in reversed(store.steps()):
        with contextlib.suppress(CheckpointError):
            record = store.info(step).get("record")
            break
    is_there = isinstance(record, dict)
    instead = "its newest checkpoint has the record" if is_there else "it cannot be continued"
    _log.warning("%s: config.json cannot be read (%s); %s", run, problem, instead)
    return record if isinstance(record, dict) else {}


def _unlinked(path: Path) -> Path:
    """Returns where a link to a checkpoint leads; other paths as they are."""
    with contextlib.suppress(OSError, RuntimeError):  # a circle of links
        if path.is_symlink() and folders.is_whole(path):
            return path.resolve()
    return path


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
    """Puts the checkpoints of later steps aside, so that a run can resume from this one.

    Args:
        store: of the run; nothing is being saved.
        step: one of `store.steps()`.

    Raises:
        CheckpointError: there is no checkpoint of this step.
    """
    store.info(step)
    folders.abandon_after(store.directory, step)
    store.list_again()
