"""Checkpoints on disk: one Orbax folder for each step, renamed into place when it is whole."""

from __future__ import annotations

import json
import operator
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.checkpoint.compare import first_difference, leaf_forms
from distaff.checkpoint.retention import expired
from distaff.checkpoint.snapshot import num_bytes, taken
from distaff.checkpoint.writer import Save, Writer
from distaff.errors import CheckpointError, ConfigError, leaf_name
from distaff.typing import PyTree

_FOLDER = re.compile(r"step_(\d{8,})")
_COMMIT_MARKER = "commit_success.txt"
_MAX_HELD_BYTES = 2**30


class CheckpointStore:
    """The checkpoints of one run: `<directory>/step_00001200/`, one folder each.

    A folder appears under its name only when it is whole. After each save the last `keep_last`
    checkpoints and the best one are kept, the others removed; which one is best, the run says:
    `info["best_step"]` of the newest checkpoint. Nothing is written before the first save. Close
    the store, or use it in a `with` statement: Python may end before a save in the background does.

    Saves are written one after the other. One that would be removed before its turn comes, because
    newer ones wait behind it, is not written at all: a loop that saves faster than the disk writes
    does not wait for it.

    Args:
        directory: where the folders go. It need not exist.
        keep_last: how many of the newest checkpoints to keep, at least 1.

    Raises:
        ConfigError: `keep_last` is less than 1.
    """

    def __init__(self, directory: Path | str, *, keep_last: int = 1) -> None:
        if keep_last < 1:
            raise ConfigError(
                f"A run keeps at least its newest checkpoint, or it could not resume; "
                f"keep_last is {keep_last}. Pass 1 or more, or a NullStore to keep none."
            )
        self.directory = Path(directory).expanduser().absolute()
        self.keep_last = keep_last
        self._writer = Writer(self._write)
        if "orbax.checkpoint" not in sys.modules:
            threading.Thread(target=_orbax, name="import orbax").start()

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> Path:
        """Starts to write a checkpoint in the background.

        Blocks while the arrays are copied off the device; on the CPU they are held rather than
        copied. Where saves that wait already hold much memory, it also waits for them. The arrays
        may be donated, and `info` changed, as soon as it returns. Saving the newest step once more
        does nothing.

        Args:
            step: the number of completed optimizer updates. No smaller than the newest one saved.
            tree: the state: nested dicts, tuples and dataclasses with arrays or numbers as leaves.
                The keys of the outermost dict can be loaded one by one.
            info: what else a resume needs, as strict JSON: epoch, metrics, `best_step`.

        Returns:
            The folder that the checkpoint will have.

        Raises:
            CheckpointError: a leaf is no array, `info` is no JSON, `step` lies before the newest
                one, or this or a previous save failed.
        """
        step = operator.index(step)
        path = self._path(step)
        self._check_failure()
        newest = max((*self.steps(), *self._writer.steps()), default=None)
        if step == newest:
            return path
        if newest is not None and step < newest:
            raise CheckpointError(
                f"The checkpoints of a run go forward; step {step} comes before step {newest}, "
                f"which is in {self.directory}. Save into a new directory, or remove what is newer."
            )
        if path.exists():
            raise CheckpointError(
                f"A checkpoint never replaces what it did not write; {path} is there and is no "
                "whole checkpoint. Move it away and save again."
            )
        strict_info = _as_json(info)
        arrays = jax.tree.map_with_path(_as_array, dict(tree))
        if self._writer.held_bytes > _MAX_HELD_BYTES:
            self.wait()
        save = Save(step, taken(arrays), strict_info, num_bytes(arrays))
        self._writer.put(save, kept=self._kept(step, strict_info))
        return path

    def steps(self) -> tuple[int, ...]:
        """Returns the steps that have a whole checkpoint, ascending."""
        folders = self.directory.iterdir() if self.directory.is_dir() else ()
        return tuple(sorted(step for step in map(_step_of, folders) if step is not None))

    def latest(self) -> int | None:
        """Returns the newest step, None where there is no checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the `best_step` that the newest checkpoint names, None where it is not there."""
        newest = self.latest()
        best_step = None if newest is None else self.info(newest).get("best_step")
        return best_step if best_step in self.steps() else None

    def info(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the arrays.

        Raises:
            CheckpointError: there is no checkpoint of this step, or it cannot be read.
        """
        info: Any = self._metadata(step).custom_metadata
        return dict(info or {})

    def load(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the arrays of a checkpoint in the structure, and on the devices, of `abstract`.

        Reads only, and only the keys that `abstract` has: `{"params": ...}` leaves the optimizer
        state on disk.

        Args:
            step: one of `steps()`.
            abstract: a tree like the saved one, or some of its outermost keys, with
                `jax.ShapeDtypeStruct` or arrays as leaves. A leaf without a sharding goes to the
                first device of this process; a NumPy leaf stays on the host.

        Raises:
            CheckpointError: there is no such checkpoint, it cannot be read, or it is of another
                model; then the first leaf that differs is named.
        """
        path = self._path(step)
        stored = self._metadata(step).metadata
        target = jax.tree.map(_with_sharding, dict(abstract))
        asked = {key: stored[key] for key in target if key in stored}
        difference = first_difference(leaf_forms(asked), leaf_forms(target))
        if difference is not None:
            raise CheckpointError(
                f"The checkpoint {path} is of another model. {difference} "
                "Build the model and the optimizer with the options of the run that saved it, "
                "or load another checkpoint."
            )
        try:
            with _context():
                return _orbax().load(str(path), target)
        except Exception as error:
            raise self._unreadable(step, error) from error

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: a save failed.
        """
        self._writer.wait()
        self._check_failure()

    def close(self) -> None:
        """Finishes what is being written, as `wait` does. The store may be used again."""
        self.wait()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_failure(self) -> None:
        failure = self._writer.failure()
        if failure is not None:
            step, error = failure
            raise _not_written(self._path(step), error) from error

    def _kept(self, step: int, info: Mapping[str, Any]) -> set[int]:
        """Returns which steps are kept once this one is written."""
        steps = {*self.steps(), *self._writer.steps(), step}
        gone = expired(steps, keep_last=self.keep_last, best=info.get("best_step"))
        return steps.difference(gone)

    def _write(self, save: Save) -> None:
        """Writes a checkpoint, then removes those that are no longer needed. In the background."""
        with _context():
            _orbax().save(str(self._path(save.step)), save.arrays, custom_metadata=save.info)
        best = save.info.get("best_step")
        for step in expired(self.steps(), keep_last=self.keep_last, best=best):
            # Renamed first: a process killed while it removes files must not leave half a
            # checkpoint under the name of a whole one.
            folder = self._path(step)
            folder.rename(folder.with_suffix(".expired"))
        for folder in self.directory.glob("step_*.expired"):
            shutil.rmtree(folder)

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _metadata(self, step: int) -> Any:
        if step not in self.steps():
            raise CheckpointError(
                f"There is no checkpoint of step {step} in {self.directory}. {self._known()}"
            )
        try:
            return _orbax().metadata(str(self._path(step)))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {self._path(step)} cannot be read: {error}. "
            f"Load another one. {self._known()}"
        )

    def _known(self) -> str:
        return f"Steps that are there: {', '.join(map(str, self.steps())) or 'none'}."


def find(path: Path | str) -> tuple[Path, int]:
    """Returns the checkpoint that a user means by a path: the best of a run, else its newest.

    Args:
        path: a run directory (`runs/digits/0001`), its `checkpoints` directory, or one checkpoint
            folder (`.../step_00000040`). Nothing in it is touched, and it may have been moved.

    Returns:
        The directory to make a `CheckpointStore` of, and the step to load from it.

    Raises:
        CheckpointError: there is no whole checkpoint at `path`.
    """
    path = Path(path).expanduser().absolute()
    step = _step_of(path)
    if step is not None:
        return path.parent, step
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    store = CheckpointStore(directory)
    newest, best = store.latest(), store.best()
    if newest is None:
        raise CheckpointError(
            f"There is no whole checkpoint in {directory}, which {_content(directory)}. Pass a run "
            "directory such as runs/digits/0001, its checkpoints directory, or one checkpoint "
            "folder such as step_00000040."
        )
    return directory, newest if best is None else best


def _content(directory: Path) -> str:
    if not directory.is_dir():
        return "is no directory" if directory.exists() else "does not exist"
    names = sorted(entry.name for entry in directory.iterdir())
    return f"holds {', '.join(names[:10]) or 'nothing'}{', ...' if names[10:] else ''}"


def _step_of(folder: Path) -> int | None:
    """Returns the step of a whole checkpoint, None for any other folder or file."""
    name = _FOLDER.fullmatch(folder.name)
    return int(name[1]) if name and (folder / _COMMIT_MARKER).is_file() else None


def _as_array(path: tuple[Any, ...], leaf: Any) -> jax.Array | np.ndarray:
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return jnp.asarray(leaf)
    raise CheckpointError(
        f"Every leaf of a checkpoint is an array or a number; {leaf_name(path)!r} is a "
        f"{type(leaf).__name__}. Put it in `info`, as JSON, or leave it out."
    )


def _as_json(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `info` as JSON gives it back: a copy, which later changes do not reach."""
    copy = {}
    for key, value in info.items():
        try:
            copy[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"The info of a checkpoint is strict JSON; {key!r} is {value!r} ({error}). "
                "Pass Python numbers, and None for what is not finite."
            ) from error
    return copy


def _with_sharding(leaf: Any) -> Any:
    """Returns what Orbax needs to place a leaf, whatever devices it was saved from."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        leaf = jnp.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _orbax() -> Any:
    """Returns Orbax's API. Its import takes a third of that of JAX, and a run can begin without."""
    from orbax.checkpoint import v1

    return v1


def _context() -> Any:
    context = _orbax().Context()
    # The keys that `abstract` leaves out stay on disk. What is missing, we have named before.
    context.pytree.loading.partial_load = True
    # In the background, a folder that cannot be made leaves Orbax's other threads waiting for it.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _not_written(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} was not written: {error}. The ones before it are untouched. "
        "Make room, or make its directory writable, and save again."
    )
