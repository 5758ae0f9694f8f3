"""What a search is: it suggests values, hears how they fare, and remembers all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Trial(NamedTuple):
    """One run of a search.

    Attributes:
        number: counted from 0. Those of trials that were interrupted are left out.
        status: `"finished"`, `"stopped"`, `"pruned"` or `"failed"`.
        value: the monitored metric of its best model; where pruned, the last one reported; None
            where it failed.
        values: what it was trained with, by dotted path.
        seed: of its model; None where it failed before it had one.
        path: its run directory, an absolute path; None where it failed before it had
            one.
    """

    number: int
    status: str
    value: float | None
    values: dict[str, Any]
    seed: int | None = None
    path: Path | None = None


class Suggestion(Protocol):
    """The values to try next, and the channel back while they are tried."""

    number: int
    values: dict[str, Any]

    def report(self, value: float, epoch: int) -> None:
        """Hears the monitored metric after a validation."""
        ...

    def should_prune(self) -> bool:
        """Tells whether to give up, by what was reported so far."""
        ...

    def note(self, **facts: Any) -> None:
        """Remembers facts about the trial, which must be strict JSON: `seed`, `path`, `reason`.

        A path is kept relative to the root of all runs, which may be moved.
        """
        ...


class Search(Protocol):
    """Suggests values, and remembers every trial, in a storage that outlives the process."""

    study: Any

    def ask(self, num_trials: int) -> Suggestion | None:
        """Begins a trial; first those that a process which is gone has left.

        Returns:
            What to try; None where so many trials have ended or are under way, or where the
            sampler has nothing left to try.
        """
        ...

    def tell(self, suggestion: Suggestion, status: str, value: float | None) -> Trial:
        """Ends a trial, and returns it as it is remembered."""
        ...

    def abandon(self, suggestion: Suggestion) -> None:
        """Ends a trial that was interrupted: its values are tried again by the next `ask`.

        Values that were interrupted three times count as a failed trial instead: they may be what
        the process dies of.
        """
        ...

    def trials(self) -> list[Trial]:
        """Returns all trials that came to an end of their own, by number."""
        ...

    def underway(self) -> list[str]:
        """Returns what other processes are at, such as `"trial 3 (process 71 on node2)"`."""
        ...

    def remember(self, name: str, fact: Any) -> None:
        """Keeps strict JSON with the study."""
        ...

    def recall(self, name: str) -> Any:
        """Returns what was kept with the study, or None."""
        ...


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns what `distaff.core.config.encoding.diff` found, as an error says it."""
    shown = {
        path: ["absent" if value is MISSING else repr(value) for value in change]
        for path, change in changes.items()
    }
    return "; ".join(f"{path}: {old}, now {new}" for path, (old, new) in shown.items())
