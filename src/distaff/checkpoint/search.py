"""Finds the checkpoint to load for a path."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from distaff.checkpoint import folders, manifest
from distaff.checkpoint.record import checked_record, read_record
from distaff.checkpoint.retention import named_best
from distaff.checkpoint.store import CheckpointStore
from distaff.core.config.strict_json import load
from distaff.core.paths import as_path
from distaff.errors import CheckpointError

_log = logging.getLogger("distaff")


class _OneFolder(CheckpointStore):
    """Reads a single checkpoint from a folder of any name."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder.parent)
        self._folder, self._step = folder, step

    def steps(self) -> tuple[int, ...]:
        return (self._step,) if folders.is_whole(self._folder) else ()

    def _path(self, step: int) -> Path:
        return self._folder if step == self._step else super()._path(step)


class Located(NamedTuple):
    """A checkpoint: its store, step and folder."""

    store: CheckpointStore
    step: int
    folder: Path

    @property
    def origin(self) -> Path:
        """The path to name in errors about the record."""
        file = self.folder.parent.parent / "config.json"
        return file if file.is_file() else self.folder

    def record(self) -> dict[str, Any]:
        """Returns the record of the run that saved the checkpoint.

        It comes from `config.json` in the run directory. If that is missing or damaged, it comes
        from the checkpoint itself, and a warning is logged.

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
            _log.warning("%s The record in the checkpoint %s is used instead.", error, self.folder)
            return record

    def own_record(self) -> Any:
        """Returns the record inside the checkpoint; None without one."""
        return self.store.info(self.step).get("record")


def find(path: Path | str) -> tuple[Path, int]:
    """Returns the checkpoint to load for a path: the best of a run, else its newest.

    Damaged checkpoints are skipped with a warning, unless `path` is the checkpoint's folder. To
    detect damage, all files of a checkpoint are read.

    Args:
        path: a run directory (`runs/digits/0001`), its `checkpoints` directory, or a checkpoint
            folder (`.../step_00000040`). It is opened read-only, and may have been moved.

    Returns:
        The directory for a `CheckpointStore`, and the step to load. For a checkpoint folder under
        another name, use `located`.

    Raises:
        CheckpointError: there is no complete, readable checkpoint at `path`.
    """
    found = located(path)
    return found.store.directory, found.step


def located(path: Path | str) -> Located:
    """Returns the checkpoint to load for a path, with a store to read it.

    Args:
        path: see `find`; or a checkpoint folder that was copied, renamed or linked.

    Raises:
        CheckpointError: there is no complete, readable checkpoint at `path`.
    """
    path = _resolved(as_path(path, "The path of a checkpoint"))
    step = folders.step_of(path)
    if step is not None:
        return Located(CheckpointStore(path.parent), step, path)
    if folders.is_whole(path):
        step = manifest.step_in(path) or 0
        return Located(_OneFolder(path, step), step, path)
    if (path / "population.json").is_file():
        raise CheckpointError(
            f"{path} is a population, which has several members. Pass one of them, such as "
            f"{path / 'members' / '0000'}."
        )
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    store = CheckpointStore(directory)
    if not store.steps():
        raise CheckpointError(
            f"There is no whole checkpoint in {directory}, which {folders.content(directory)}. "
            "Pass a run directory such as runs/digits/0001, its checkpoints directory, or one "
            "checkpoint folder such as step_00000040."
        )
    step = _best_readable(store)
    return Located(store, step, directory / folders.name_of(step))


def recorded(run: Path) -> dict[str, Any]:
    """Returns the record of a run: `config.json`, or the one in its newest readable checkpoint.

    Logs a warning for a damaged `config.json`; returns an empty record if neither can be read.
    """
    try:
        record = load(run / "config.json")
        problem = "" if isinstance(record, dict) else "it does not hold a record"
    except (OSError, ValueError) as error:
        record, problem = None, str(error)
    if isinstance(record, dict):
        return record
    store = CheckpointStore(run / "checkpoints")
    for step in reversed(store.steps()):
        with contextlib.suppress(CheckpointError):
            record = store.info(step).get("record")
            break
    has_record = isinstance(record, dict)
    instead = "using the newest checkpoint's record" if has_record else "it cannot be resumed"
    _log.warning("%s: config.json cannot be read (%s); %s", run, problem, instead)
    return record if isinstance(record, dict) else {}


def _resolved(path: Path) -> Path:
    """Returns the target of a link to a checkpoint; other paths unchanged."""
    with contextlib.suppress(OSError, RuntimeError):  # a cycle of links
        if path.is_symlink() and folders.is_whole(path):
            return path.resolve()
    return path


def _best_readable(store: CheckpointStore) -> int:
    """Returns the step of the best readable checkpoint, else of the newest."""
    newest, best = named_best(store)
    steps, problems = store.steps()[::-1], []
    damaged = [step for step in steps if newest is not None and step > newest]
    for step in dict.fromkeys((*damaged, *best, *steps)):
        problem = store.check(step)
        if problem is None:
            for each in problems:
                _log.warning("%s Loading step %d instead.", each, step)
            return step
        folder = store.directory / folders.name_of(step)
        problems.append(f"The checkpoint {folder} cannot be read: {problem}.")
    raise CheckpointError(
        f"No checkpoint in {store.directory} can be read. {' '.join(problems)} Restore one of them "
        "from a copy, or train again."
    )


def tidy(store: CheckpointStore) -> None:
    """Removes the leftovers of killed saves and removals; no other process may be saving here."""
    if store.directory.is_dir():
        folders.remove_leftovers(store.directory)


def forget_after(store: CheckpointStore, step: int) -> None:
    """Sets the checkpoints of later steps aside, so that a run can resume from this step.

    Args:
        store: the store of the run, without a save in progress.
        step: one of `store.steps()`.

    Raises:
        CheckpointError: there is no checkpoint of this step.
    """
    store.info(step)
    folders.abandon_after(store.directory, step)
    store.list_again()
