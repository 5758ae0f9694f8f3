"""Checkpoints on disk: one folder per step, renamed to its final name when it is complete."""

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

    A folder gets its name only when it is complete. Each save keeps the last `keep_last`
    checkpoints, the best ones and the multiples of `keep_every`, and removes the others. The newest
    checkpoint names the best ones: `info["best_steps"]`, best first, or `info["best_step"]`.
    The first save creates the directory. Close the store, or use a `with` statement, to finish
    saves in the background.

    A failed save does not affect earlier checkpoints. The next call of `save`, `check_failure`,
    `wait` or `close` raises its error, or warns with `on_failed_save="warn"`.

    A checkpoint whose `info["provisional"]` is true is kept until the next one is complete, and
    does not count for `keep_last`. Saves are written one at a time; a waiting save that newer ones
    would remove is skipped, so that a fast loop does not wait for the disk.

    A checkpoint that `check`, `newest_valid` or `load` found damaged no longer counts, and is not
    removed; saving the same step renames it to `step_00001200.damaged`. Only one process may save
    into a directory: its first save removes the leftovers of killed processes.

    Args:
        directory: parent of the folders; need not exist.
        keep_last: number of newest checkpoints to keep, at least 1.
        keep_best: number of best checkpoints to keep, at least 1; None for all that are named.
        keep_every: also keep checkpoints whose step is a multiple of this, at least 1; None to
            disable.
        on_failed_save: whether a save that cannot be written raises or warns.
        reads_back: whether to read the first save back; False if another store of this process has
            read arrays of the same kind.

    Raises:
        ConfigError: a number is less than 1.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep_last: int = 2,
        keep_best: int | None = None,
        keep_every: int | None = None,
        on_failed_save: Literal["raise", "warn"] = "raise",
        reads_back: bool = True,
    ) -> None:
        self.directory = as_path(directory, "directory")
        self.retention = Retention(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        self._goes_on = on_failed_save == "warn"
        self._damaged: frozenset[int] = frozenset()
        self._provisional: frozenset[int] = frozenset()
        self._is_tidy, self._is_readable = False, not reads_back
        self._whole: set[tuple[str, int]] = set()
        self._own: frozenset[int] | None = None
        self._writer = Writer(self._write, goes_on=self._goes_on)
        self.failures = self._writer.failures
        arrays.import_early()

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> Path:
        """Starts to write a checkpoint in the background.

        Blocks while the arrays are copied from the device (on the CPU they are referenced, not
        copied), and until waiting saves hold at most 1 GiB. Afterwards the arrays may be donated
        and `info` changed. Saving the newest step again does nothing, unless it is damaged or has
        another `info`: then it is replaced.

        Args:
            step: the number of completed optimizer updates; at least the newest saved step.
            tree: the state: nested dicts, tuples and dataclasses with arrays or numbers as leaves.
                The keys of the outermost dict can be loaded separately.
            info: further data for a resume, as strict JSON: epoch, metrics, `best_steps`.

        Returns:
            The future folder of the checkpoint.

        Raises:
            CheckpointError: a leaf is not an array, `info` is not JSON, `step` is older than the
                newest, or this or a previous save failed.
        """
        step = operator.index(step)
        path = self._path(step)
        self.check_failure()
        strict_info = self._agreed(_as_json(info))
        newest = max((*self._undamaged(), *self._writer.steps()), default=None)
        if step == newest and self._is_saved(step, strict_info):
            return path
        if newest is not None and step < newest:
            raise CheckpointError(
                f"Checkpoints are saved in order; step {step} comes before step {newest}, which is "
                f"in {self.directory}. Save into a new directory, or remove newer checkpoints."
            )
        if path.exists() and step not in self._damaged and step != newest:
            self._report_failure(
                step, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            )
            return path
        leaves = jax.tree.map_with_path(arrays.as_array, dict(tree))
        if self._writer.held_bytes > _MAX_HELD_BYTES:
            self.wait()
        save = Save(step, self._snapshot(leaves), strict_info, num_bytes(leaves))
        self._provisional -= {step}
        if strict_info.get("provisional"):
            self._provisional |= {step}
        waiting = {*self._undamaged(), *self._writer.steps(), step}
        gone = self.retention.expired(waiting, strict_info, self._provisional)
        self._writer.put(save, kept=waiting.difference(gone))
        return path

    def steps(self) -> tuple[int, ...]:
        """Returns the steps of all checkpoints that look complete, ascending; reads none."""
        return folders.steps_in(self.directory, self._whole)

    def best(self) -> int | None:
        """Returns the best existing step that the newest readable checkpoint names, or None.

        Raises:
            CheckpointError: there are checkpoints, but none can be read.
        """
        return next(iter(named_best(self)[1]), None)

    def check(self, step: int) -> str | None:
        """Reads all files of a checkpoint, and returns what is wrong with it.

        The arrays of checkpoints without a manifest (format 0) are not read.

        Args:
            step: one of `steps()`.

        Returns:
            A clause, such as `"state/d/0ff8 has 120 bytes instead of 496"`; None if it is valid.
        """
        if step not in self.steps():
            return "it does not exist"
        problem = manifest.damage(self._path(step)) or arrays.damage(self._path(step))
        if problem is not None:
            self._damaged |= {step}
        return problem

    def newest_valid(self) -> tuple[int | None, list[str]]:
        """Returns the newest checkpoint that passes `check`, and what is wrong with newer ones.

        Returns:
            The step, None if none passes; and a sentence for each skipped one, newest first.
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
        """Returns the `info` of a checkpoint.

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
        """Returns the arrays of a checkpoint with the structure and placement of `abstract`.

        Compares all files with the manifest first. Loads only the keys in `abstract`:
        `{"params": ...}` skips the optimizer state.

        Args:
            step: one of `steps()`.
            abstract: a tree like the saved one, or some of its outermost keys, with
                `jax.ShapeDtypeStruct` or arrays as leaves. A leaf without a sharding goes to the
                first device of this process; a NumPy leaf stays on the host.

        Raises:
            CheckpointError: there is no such checkpoint, it cannot be read, or it does not match
                `abstract`; names the first leaf that differs.
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
        """Raises or warns once for each save that failed in the background.

        Costs nothing without a failure, so call it at each step. No save is written between a
        failure and its report.

        Raises:
            CheckpointError: a save failed.
        """
        while self.failures and (failure := self._writer.failure()):
            self._report_failure(*failure)

    def wait(self) -> None:
        """Waits for all saves.

        Raises:
            CheckpointError: a save failed.
        """
        self._writer.wait()
        self.check_failure()

    def close(self) -> None:
        """Waits for all saves, like `wait`. The store may be used again."""
        self.wait()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def list_again(self) -> None:
        """Lists the directory again before the next save, after it was changed elsewhere."""
        self._own = None

    def _is_saved(self, step: int, info: Mapping[str, Any]) -> bool:
        """Returns whether a checkpoint with this info is written or waiting."""
        waiting = self._writer.info(step)
        if waiting is None:
            with contextlib.suppress(CheckpointError):  # a damaged one is saved again
                waiting = self.info(step)
        return info == waiting

    def _undamaged(self) -> frozenset[int]:
        """Returns the undamaged steps; listed once, since no other process saves here."""
        if self._own is None:
            self._own = frozenset(self.steps())
        return self._own - self._damaged

    def _report_failure(self, step: int, error: BaseException) -> None:
        """Raises or warns of a failed save."""
        failed = not_written(self._path(step), error)
        if not (self._goes_on and is_of_storage(error)):
            raise failed from error
        warned(f"{failed} {going_on(self.latest())}")

    def _write(self, save: Save) -> None:
        """Writes a checkpoint in the background, then removes expired ones."""
        if jax.process_index() > 0:  # only the first process manages the directory
            self._write_arrays(self._unfinished(save.step), save)
            return
        folders.make(self.directory)
        self._is_tidy = self._is_tidy or folders.remove_leftovers(self.directory)
        path, unfinished = self._path(save.step), self._unfinished(save.step)
        # Private to the owner until `seal` has removed world-writable modes.
        unfinished.parent.mkdir(0o700)
        try:
            self._write_arrays(unfinished, save)
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

    def _write_arrays(self, folder: Path, save: Save) -> None:
        arrays.write(folder, save.arrays, _marked(save.info))
        if not self._is_readable and jax.process_count() == 1:
            arrays.check_readable(folder, save.arrays)

    def _snapshot(self, leaves: PyTree) -> PyTree:
        """Returns arrays that later donations do not change."""
        return taken(leaves)

    def _agreed(self, info: dict[str, Any]) -> dict[str, Any]:
        """Returns the info to save; the same in all processes."""
        return info

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
    """Returns a copy of `info` after a round trip through JSON."""
    copy, sizes = {}, {}
    for key, value in info.items():
        try:
            text = json.dumps(value, allow_nan=False)
            copy[key], sizes[key] = json.loads(text), len(text)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"The info of a checkpoint is strict JSON; {key!r} is {value!r} ({error}). "
                "Pass Python numbers, and None for NaN and infinity."
            ) from error
    if sum(sizes.values()) > manifest.MAX_JSON_BYTES // 2:  # the file has spaces, too
        raise CheckpointError(
            f"The info of a checkpoint is at most {manifest.MAX_JSON_BYTES // 2} bytes; got "
            f"{sum(sizes.values())}, most of them in {max(sizes, key=sizes.__getitem__)!r}. Save "
            "arrays in the tree; in a trainer, return smaller metrics from the training step, or "
            "log more often (log_every_n_steps)."
        )
    return copy


def _marked(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the info with `FORMAT_KEY`, which distinguishes a lost manifest from format 0."""
    return {**info, manifest.FORMAT_KEY: manifest.FORMAT}
