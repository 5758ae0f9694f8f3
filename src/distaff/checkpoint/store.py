"""Checkpoints on disk: one folder for each step, renamed into place when it is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from distaff.checkpoint import arrays, folders, manifest
from distaff.checkpoint.failure import (
    going_on,
    is_of_storage,
    known,
    not_written,
    unreadable,
    warned,
)
from distaff.checkpoint.protocol import Store
from distaff.checkpoint.retention import Retention, named_best
from distaff.checkpoint.snapshot import num_bytes, taken
from distaff.checkpoint.writer import Save, Writer
from distaff.core.paths import as_path
from distaff.core.typing import PyTree
from distaff.errors import CheckpointError

_MAX_HELD_BYTES = 2**30


class CheckpointStore(Store):
    """The checkpoints of one run: `<directory>/step_00001200/`, one folder each.

    A folder appears under its name only when it is whole. After each save the last `keep_last`
    checkpoints, the best ones and the multiples of `keep_every` are kept, the others removed. The
    newest checkpoint names the best ones: `info["best_steps"]`, best first, or `info["best_step"]`.
    Nothing is written before the first save. Close the store, or use a `with` statement, since
    Python may end before a save in the background does.

    A save that fails leaves the checkpoints before it as they are. The next call of `save`,
    `check_failure`, `wait` or `close` raises it, or warns with `on_failed_save="warn"`.

    A checkpoint whose `info["provisional"]` is true is kept until the next one is there, and does
    not count for `keep_last`. Saves are written one after the other; one that newer saves would
    remove before its turn comes is not written, so that a fast loop does not wait for the disk.

    What `check`, `newest_valid` or `load` found damaged is from then on neither counted nor
    removed; a save of the same step renames it to `step_00001200.damaged`. Only one process may
    save into a directory: its first save removes what killed ones have left there.

    Args:
        directory: where the folders go. It need not exist.
        keep_last: how many of the newest checkpoints to keep, at least 1.
        keep_best: how many of the best ones to keep, at least 1; None keeps all that are named.
        keep_every: keep also the checkpoints whose step is a multiple of it, at least 1.
        on_failed_save: what a save leads to that cannot be written.

    Raises:
        ConfigError: one of the numbers is less than 1.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep_last: int = 2,
        keep_best: int | None = None,
        keep_every: int | None = None,
        on_failed_save: Literal["raise", "warn"] = "raise",
    ) -> None:
        self.directory = as_path(directory, "directory")
        self.retention = Retention(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        self._goes_on = on_failed_save == "warn"
        self._damaged: frozenset[int] = frozenset()
        self._provisional: frozenset[int] = frozenset()
        self._is_tidy = self._is_readable = False
        self._whole: set[tuple[str, int]] = set()
        self._own: frozenset[int] | None = None
        self._writer = Writer(self._write, goes_on=self._goes_on)
        self.failures = self._writer.failures
        arrays.import_early()

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> Path:
        """Starts to write a checkpoint in the background.

        Blocks while the arrays are copied off the device; on the CPU they are held rather than
        copied. Where saves that wait already hold much memory, it also waits for them. The arrays
        may be donated, and `info` changed, as soon as it returns. Saving the newest step once more
        does nothing, unless it is damaged or `info` is another: then it is replaced.

        Args:
            step: the number of completed optimizer updates. No smaller than the newest one saved.
            tree: the state: nested dicts, tuples and dataclasses with arrays or numbers as leaves.
                The keys of the outermost dict can be loaded one by one.
            info: what else a resume needs, as strict JSON: epoch, metrics, `best_steps`.

        Returns:
            The folder that the checkpoint will have.

        Raises:
            CheckpointError: a leaf is no array, `info` is no JSON, `step` lies before the newest
                one, or this or a previous save failed.
        """
        step = operator.index(step)
        path = self._path(step)
        self.check_failure()
        strict_info = _as_json(info)
        newest = max((*self._undamaged(), *self._writer.steps()), default=None)
        if step == newest and self._is_saved(step, strict_info):
            return path
        if newest is not None and step < newest:
            raise CheckpointError(
                f"The checkpoints of a run go forward; step {step} comes before step {newest}, "
                f"which is in {self.directory}. Save into a new directory, or remove what is newer."
            )
        if path.exists() and step not in self._damaged and step != newest:
            self._tell(step, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)))
            return path
        leaves = jax.tree.map_with_path(arrays.as_array, dict(tree))
        if self._writer.held_bytes > _MAX_HELD_BYTES:
            self.wait()
        save = Save(step, taken(leaves), strict_info, num_bytes(leaves))
        self._provisional -= {step}
        if strict_info.get("provisional"):
            self._provisional |= {step}
        waiting = {*self._undamaged(), *self._writer.steps(), step}
        gone = self.retention.expired(waiting, strict_info, self._provisional)
        self._writer.put(save, kept=waiting.difference(gone))
        return path

    def steps(self) -> tuple[int, ...]:
        """Returns the steps that have a checkpoint which looks whole, ascending; reads none."""
        return folders.steps_in(self.directory, self._whole)

    def best(self) -> int | None:
        """Returns the best step there is that the newest readable checkpoint names.

        Returns:
            None where it names none that is there, or where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        return next(iter(named_best(self)[1]), None)

    def check(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint, None where nothing is; reads all of it.

        Of a checkpoint that was saved before there were manifests, the arrays are not read.

        Args:
            step: one of `steps()`.

        Returns:
            Half a sentence, such as `"state/d/0ff8 has 120 bytes instead of 496"`.
        """
        if step not in self.steps():
            return "it is not there"
        problem = manifest.damage(self._path(step)) or arrays.damage(self._path(step))
        if problem is not None:
            self._damaged |= {step}
        return problem

    def newest_valid(self) -> tuple[int | None, list[str]]:
        """Returns the newest checkpoint that passes `check`, and what is wrong with newer ones.

        Returns:
            The step, None where none passes; and a sentence for each one that was passed over,
            newest first. Nothing is removed.
        """
        folders.restore_replaced(self.directory)
        skipped = []
        for step in reversed(self.steps()):
            problem = self.check(step)
            if problem is None:
                self._provisional |= {step} if self.info(step).get("provisional") else set()
                return step, skipped
            skipped.append(f"The checkpoint {self._path(step)} cannot be read: {problem}.")
        return None, skipped

    def info(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the arrays.

        Args:
            step: one of `steps()`.

        Raises:
            CheckpointError: there is no checkpoint of this step, or it cannot be read.
        """
        self._verify(step, manifest.INFO_FILE)
        try:
            info = manifest.read_info(self._path(step))
        except (OSError, ValueError) as error:
            raise unreadable(self._path(step), error, self.steps()) from error
        return {key: value for key, value in info.items() if key != manifest.FORMAT_KEY}

    def load(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the arrays of a checkpoint in the structure, and on the devices, of `abstract`.

        All files are compared with the manifest first. Reads only, and only the keys that
        `abstract` has: `{"params": ...}` leaves the optimizer state on disk.

        Args:
            step: one of `steps()`.
            abstract: a tree like the saved one, or some of its outermost keys, with
                `jax.ShapeDtypeStruct` or arrays as leaves. A leaf without a sharding goes to the
                first device of this process; a NumPy leaf stays on the host.

        Raises:
            CheckpointError: there is no such checkpoint, it cannot be read, or it is of another
                model; then the first leaf that differs is named.
        """
        self._verify(step)
        try:
            return arrays.read(self._path(step), abstract)
        except arrays.OtherModelError as difference:
            raise CheckpointError(
                f"The checkpoint {self._path(step)} is of another model. {difference} "
                "Build the model and the optimizer with the options of the run that saved it, "
                "or load another checkpoint."
            ) from None
        except Exception as error:
            raise unreadable(self._path(step), error, self.steps()) from error

    def check_failure(self) -> None:
        """Tells of a save that failed in the background; costs nothing where none did.

        Ask at each step: a failure is told once, by whichever call comes first, and no save is
        written until then.

        Raises:
            CheckpointError: a save failed.
        """
        while self.failures and (failure := self._writer.failure()):
            self._tell(*failure)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: a save failed.
        """
        self._writer.wait()
        self.check_failure()

    def close(self) -> None:
        """Finishes what is being written, as `wait` does. The store may be used again."""
        self.wait()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def list_again(self) -> None:
        """Looks at the directory again before the next save, after something else changed it."""
        self._own = None

    def _is_saved(self, step: int, info: Mapping[str, Any]) -> bool:
        """Whether a checkpoint is written, or waits to be, with just this info."""
        waiting = self._writer.info(step)
        if waiting is None:
            with contextlib.suppress(CheckpointError):  # a damaged one is saved again
                waiting = self.info(step)
        return info == waiting

    def _undamaged(self) -> frozenset[int]:
        """Returns the steps that are there; listed once, since nobody else saves here."""
        if self._own is None:
            self._own = frozenset(self.steps())
        return self._own - self._damaged

    def _tell(self, step: int, error: BaseException) -> None:
        """Tells of a save that failed; all that do so come here."""
        failed = not_written(self._path(step), error)
        if not (self._goes_on and is_of_storage(error)):
            raise failed from error
        warned(f"{failed} {going_on(self.latest())}")

    def _write(self, save: Save) -> None:
        """Writes a checkpoint, then removes those that are no longer needed. In the background."""
        if jax.process_index() > 0:  # the first process does what is done once
            arrays.write(self._unfinished(save.step), save.arrays, _marked(save.info))
            return
        folders.make(self.directory)
        self._is_tidy = self._is_tidy or folders.remove_leftovers(self.directory)
        path, unfinished = self._path(save.step), self._unfinished(save.step)
        # Only the owner gets in, until nothing in it is writable by everybody.
        unfinished.parent.mkdir(0o700)
        try:
            arrays.write(unfinished, save.arrays, _marked(save.info))
            if not self._is_readable:
                arrays.check_readable(unfinished, save.arrays)
            manifest.seal(unfinished, save.step)
            folders.put_in_place(unfinished, path, is_damaged=save.step in self._damaged)
            self._is_readable = True
            self._damaged -= {save.step}
            self._own = self._undamaged() | {save.step}
            manifest.sync_directory(self.directory)
        finally:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            self._is_tidy &= not unfinished.parent.exists()
        self._remove_expired(save)

    def _remove_expired(self, save: Save) -> None:
        for step in self.retention.expired(self._undamaged(), save.info, self._provisional):
            is_gone = folders.remove(self._path(step))
            self._is_tidy &= is_gone
            self._own = self._undamaged() - {step} if is_gone else self._undamaged()

    def _path(self, step: int) -> Path:
        return self.directory / folders.NAME.format(step)

    def _unfinished(self, step: int) -> Path:
        path = self._path(step)
        return path.with_suffix(folders.SAVING) / path.name

    def _verify(self, step: int, *names: str) -> None:
        if step not in self.steps():
            raise CheckpointError(
                f"There is no checkpoint of step {step} in {self.directory}. {known(self.steps())}"
            )
        problem = manifest.damage(self._path(step), *names)
        if problem is not None:
            self._damaged |= {step}
            raise unreadable(self._path(step), problem, self.steps())


def _as_json(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `info` as JSON gives it back: a copy, which later changes do not reach."""
    copy, sizes = {}, {}
    for key, value in info.items():
        try:
            text = json.dumps(value, allow_nan=False)
            copy[key], sizes[key] = json.loads(text), len(text)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"The info of a checkpoint is strict JSON; {key!r} is {value!r} ({error}). "
                "Pass Python numbers, and None for what is not finite."
            ) from error
    if sum(sizes.values()) > manifest.MAX_JSON_BYTES // 2:  # it is written with spaces
        raise CheckpointError(
            f"The info of a checkpoint has at most {manifest.MAX_JSON_BYTES // 2} bytes; it has "
            f"{sum(sizes.values())}, most of them in {max(sizes, key=sizes.__getitem__)!r}. Save "
            "arrays in the tree; in a trainer, return smaller metrics from the training step, or "
            "log more often (log_every_n_steps)."
        )
    return copy


def _marked(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the info with the mark that tells a lost manifest from one that never was."""
    return {**info, manifest.FORMAT_KEY: manifest.FORMAT}
