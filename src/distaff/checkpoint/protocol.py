"""What the loop asks of a store of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distaff.core.typing import PyTree
from distaff.errors import CheckpointError


class Store:
    """Keeps the checkpoints of one run, each under its step; this one keeps none.

    Attributes:
        failures: saves that failed in the background, for `check_failure` to raise.
    """

    failures: Sequence[object] = ()

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> Path | None:
        """Starts to write a checkpoint; returns where it will be, None where it is not kept."""
        return None

    def steps(self) -> tuple[int, ...]:
        """Returns the steps that have a whole checkpoint, ascending."""
        return ()

    def latest(self) -> int | None:
        """Returns the newest step, None where there is no checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step of the best model."""
        return None

    def info(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the arrays.

        Raises:
            CheckpointError: the checkpoint does not exist.
        """
        raise CheckpointError(
            f"This run keeps no checkpoints, so there is none of step {step}. "
            "Train with a CheckpointStore to have them."
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
        """Returns when nothing is being written."""

    def close(self) -> None:
        """Finishes what is being written."""


class NullStore(Store):
    """A store that is switched off: saves nothing, knows no steps."""
