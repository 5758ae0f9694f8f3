"""What the loop asks of a store of checkpoints, and the store that keeps none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from distaff.core.typing import PyTree
from distaff.errors import CheckpointError


class Store(Protocol):
    """Keeps the checkpoints of one run, each under its step."""

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> Path | None:
        """Starts to write a checkpoint; returns where it will be, None where it is not kept."""
        ...

    def steps(self) -> tuple[int, ...]:
        """Returns the steps that have a whole checkpoint, ascending."""
        ...

    def latest(self) -> int | None:
        """Returns the newest step."""
        ...

    def best(self) -> int | None:
        """Returns the step of the best model."""
        ...

    def info(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the arrays."""
        ...

    def load(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the arrays that `abstract` describes."""
        ...

    def check_failure(self) -> None:
        """Raises CheckpointError for a save that failed in the background."""
        ...

    def wait(self) -> None:
        """Returns when nothing is being written."""
        ...

    def close(self) -> None:
        """Finishes what is being written."""
        ...


class NullStore:
    """A store that is switched off: saves nothing, knows no steps."""

    def save(self, step: int, tree: Mapping[str, PyTree], info: Mapping[str, Any]) -> None:
        """Keeps nothing."""

    def steps(self) -> tuple[int, ...]:
        """Returns `()`."""
        return ()

    def latest(self) -> int | None:
        """Returns None."""
        return None

    def best(self) -> int | None:
        """Returns None."""
        return None

    def info(self, step: int) -> dict[str, Any]:
        """Raises CheckpointError: there is none."""
        raise self._nothing(step)

    def load(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Raises CheckpointError: there is none."""
        raise self._nothing(step)

    def check_failure(self) -> None:
        """Returns at once."""

    def wait(self) -> None:
        """Returns at once."""

    def close(self) -> None:
        """Returns at once."""

    def _nothing(self, step: int) -> CheckpointError:
        return CheckpointError(
            f"This run keeps no checkpoints, so there is none of step {step}. "
            "Train with a CheckpointStore to have them."
        )
