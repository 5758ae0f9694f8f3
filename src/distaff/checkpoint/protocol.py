"""The interface of checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distaff.core.typing import PyTree
from distaff.errors import CheckpointError


class Store:
    """Base class: keeps the checkpoints of one run by step. This one keeps none.

    Attributes:
        failures: saves that failed in the background, for `check_failure` to raise.
    """

    failures: Sequence[object] = ()

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> Path | None:
        """Starts to write a checkpoint; returns its future path, or None if it is not on disk."""
        return None

    def steps(self) -> tuple[int, ...]:
        """Returns the steps that have a complete checkpoint, ascending."""
        return ()

    def latest(self) -> int | None:
        """Returns the newest step; None without any checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step of the best model."""
        return None

    def info(self, step: int) -> dict[str, Any]:
        """Returns the JSON that was saved with the arrays.

        Raises:
            CheckpointError: the checkpoint does not exist.
        """
        raise CheckpointError(
            f"This run keeps no checkpoints, so step {step} has none. "
            "Train with a CheckpointStore to keep them."
        )

    def load(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the arrays that `abstract` describes.

        Raises:
            CheckpointError: the checkpoint does not exist, or cannot be read.
        """
        return self.info(step)

    def check_failure(self) -> None:
        """Raises CheckpointError for a save that failed in the background."""

    def wait(self) -> None:
        """Waits for all saves in progress."""

    def close(self) -> None:
        """Waits for all saves in progress, and closes the store."""


class NullStore(Store):
    """A store that saves nothing."""
