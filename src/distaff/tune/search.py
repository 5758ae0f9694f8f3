"""What a search is: it suggests values, hears how they fare, and remembers all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Trial(NamedTuple):
    """One run of a search.

    Attributes:
        number: counted from 0.
        status: `"finished"`, `"stopped"`, `"pruned"` or `"failed"`.
        value: the monitored metric of its best model; where pruned, the last one reported; None
            where it failed.
        values: what it was trained with, by dotted path.
        seed: of its model; None where it failed before it had one.
        path: its run directory; None where it failed before it had one.
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
        """Remembers facts about the trial, which must be strict JSON."""
        ...


class Search(Protocol):
    """Suggests values, and remembers every trial, in a storage that outlives the process."""

    study: Any

    def ask(self) -> Suggestion:
        """Begins a trial."""
        ...

    def tell(self, suggestion: Suggestion, status: str, value: float | None) -> None:
        """Ends a trial."""
        ...

    def abandon(self, suggestion: Suggestion) -> None:
        """Ends a trial that was interrupted: its values are tried again later."""
        ...

    def enqueue_first(self, values: dict[str, Any]) -> None:
        """Has these values tried first, in a study without trials."""
        ...

    def best(self) -> Trial | None:
        """Returns the best trial that was not pruned; None where there is none."""
        ...

    def remember(self, name: str, fact: Any) -> None:
        """Keeps strict JSON with the study."""
        ...

    def recall(self, name: str) -> Any:
        """Returns what was kept with the study, or None."""
        ...

    def trials(self) -> list[Trial]:
        """Returns all trials that came to an end of their own, by number."""
        ...

    def underway(self) -> int:
        """Returns how many trials other processes are at."""
        ...
