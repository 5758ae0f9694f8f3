"""Checkpoints that several processes write together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distaff.checkpoint import CheckpointStore
from distaff.checkpoint.arrays import check_readable
from distaff.checkpoint.writer import Save, Writer
from distaff.core.typing import PyTree
from distaff.execution.processes import barrier, is_first, told

_LONGEST = "1h"
"""Longest time that a process may take longer than another to write its parts, or the first one to
put them in place."""


class SharedStore(CheckpointStore):
    """The checkpoints of a run of several processes, in one directory that all can read.

    Every process makes the same calls. A save writes the parts of the arrays that are on its own
    devices, from these devices and before it returns, so that no copy is made and no other thread
    waits for other processes. The first process has the `info`, and manages the directory.

    Args:
        directory: see `CheckpointStore`.
        **options: see `CheckpointStore`.
    """

    def __init__(self, directory: Path | str, **options: Any) -> None:
        super().__init__(directory, **options)
        self._writer = _Now(self._write)
        self.failures = self._writer.failures

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> Path:
        """Writes a checkpoint; returns when it is complete. See `CheckpointStore.save`."""
        self.list_again()  # the first process may have changed it
        path = super().save(step, tree, info)
        self.check_failure()
        return path

    @property
    def damaged(self) -> list[int]:
        """The steps of the checkpoints that are known to be damaged."""
        return sorted(self._damaged)

    def note_damaged(self, steps: Sequence[int]) -> None:
        """Adds steps to the damaged checkpoints, as the first process has found."""
        self._damaged |= frozenset(steps)

    def _agreed(self, info: dict[str, Any]) -> dict[str, Any]:
        return told(info)

    def _snapshot(self, leaves: PyTree) -> PyTree:
        return jax.tree.map(_storable, leaves)

    def _write(self, save: Save) -> None:
        if is_first():
            super()._write(save)
        else:
            self._write_arrays(self._unfinished(save.step), save)
        barrier(f"checkpoint of step {save.step} in place", _LONGEST)

    def _write_arrays(self, folder: Path, save: Save) -> None:
        super()._write_arrays(folder, save)
        barrier(f"arrays of step {save.step} written", _LONGEST)
        if not self._is_readable:
            check_readable(folder, save.arrays)
            self._is_readable = True
            barrier(f"arrays of step {save.step} read back", _LONGEST)


class _Now(Writer):
    """Writes each save at once, in the thread of the caller."""

    def put(self, save: Save, kept: Set[int]) -> None:
        try:
            self._write(save)
        except Exception as error:
            self.failures.append((save.step, error))


def _storable(leaf: Any) -> Any:
    """Returns an array as Orbax takes it from several processes: global, or on the host."""
    is_local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return np.asarray(leaf) if is_local else leaf
