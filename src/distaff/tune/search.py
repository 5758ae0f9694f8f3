"""The interface of a search, which suggests values and records the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distaff.errors import ConfigError, nearest


class Trial(NamedTuple):
    """One run of a search.

    Attributes:
        number: number of the trial, from 0, without interrupted trials.
        status: `"finished"`, `"stopped"`, `"pruned"` or `"failed"`.
        value: monitored metric of the best model, or the last one reported if pruned; None if
            failed.
        values: values of the searched options, by dotted path.
        seed: seed of the model; None if the trial failed before it had one.
        path: absolute path of the run directory; None if the trial failed before it had one.
        objectives: metrics of the best model that the study optimizes, by name; None if it has one
            objective, the monitored metric, or if the trial failed.
        epoch: epochs up to its last validation; None before the first.
    """

    number: int
    status: str
    value: float | None
    values: dict[str, Any]
    seed: int | None = None
    path: Path | None = None
    objectives: dict[str, float] | None = None
    epoch: int | None = None


class Draw(NamedTuple):
    """What a space that is a function returned for one trial.

    Attributes:
        values: values by dotted path.
        parameters: whether a value can be suggested, by name of the parameter.
    """

    values: dict[str, Any]
    parameters: dict[str, Callable[[Any], bool]]


class Suggestion(Protocol):
    """The values to try next, with methods to report their results."""

    number: int
    values: dict[str, Any]
    origin: int
    """Number of the first attempt with these values, which decides the seed."""
    study: str
    """Name of the study."""
    key: str
    """Name of its run within the study."""
    left: Path | None
    """Run directory of an interrupted attempt, to resume."""
    objectives: tuple[str, ...]
    """Metrics of its best model to note as `objectives`, by name; empty with one objective."""

    def report(self, value: float, epoch: int) -> None:
        """Reports the monitored metric after a validation, unless it is reported already."""

    def should_prune(self) -> bool:
        """Whether to prune the trial, given the reports so far."""

    def note(self, **facts: Any) -> None:
        """Records facts about the trial as strict JSON: `seed`, `path`, `reason`, `objectives`.

        A trial that `waits` has not begun, so its end is not an attempt.

        A path is stored relative to the root of all runs, which may be moved.
        """

    def beat(self) -> None:
        """Records that the process of the trial is alive, for processes on other machines."""


class Search(Protocol):
    """Suggests values, and records every trial in a storage that outlives the process."""

    study: Any
    on_change: Callable[[], object]
    """Called after each start and report of a trial of this process."""

    def ask(self, num_trials: int) -> Suggestion | None:
        """Starts a trial, first those left by processes that died.

        Returns:
            The values to try; None if `num_trials` trials have ended or are running, or if the
            sampler is exhausted.
        """

    def tell(self, suggestion: Suggestion, status: str, value: float | None) -> Trial:
        """Ends a trial, and returns it as recorded."""

    def abandon(self, suggestion: Suggestion, *, resumes: bool = True) -> None:
        """Ends an interrupted trial, whose values the next `ask` returns again.

        Values interrupted three times without progress count as a failed trial, since they may
        crash the process. With `resumes`, the next attempt resumes the run of this one.
        """

    def trials(self) -> list[Trial]:
        """Returns all trials that were not interrupted, by number."""

    def table(self) -> list[Trial]:
        """Returns `trials` and the running ones, whose status is `"running"`, by number."""

    def front(self) -> list[Trial]:
        """Returns the trials of the Pareto front, by number.

        No other trial is at least as good in all objectives and better in one.
        """

    def underway(self) -> list[str]:
        """Returns the trials of other processes, such as `"trial 3 (process 71 on node2)"`."""

    def remember(self, name: str, fact: Any) -> None:
        """Stores strict JSON with the study."""

    def recall(self, name: str) -> Any:
        """Returns what was stored with the study, or None."""


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Formats a result of `distaff.core.config.encoding.diff` for an error."""
    shown = {
        path: ["absent" if value is MISSING else repr(value) for value in change]
        for path, change in changes.items()
    }
    return "; ".join(f"{path}: {old}, now {new}" for path, (old, new) in shown.items())


def described(number: int, owner: Mapping[str, Any] | None) -> str:
    """Returns a running trial as text, with the process that runs it."""
    owner = owner or {"pid": "unknown", "host": "unknown"}
    return f"trial {number} (process {owner['pid']} on {owner['host']})"


def checked_options(
    options: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]
) -> dict[str, Any]:
    """Returns the options that are not None, checked for names and types.

    Raises:
        ConfigError: an option is unknown or of another type.
    """
    for name in options:
        if name not in kinds:
            raise ConfigError(f"A study has no option {name!r}. {nearest(name, kinds)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, kinds[name]) or value == "":
            listed_kinds = " or ".join(kind.__name__ for kind in kinds[name])
            raise ConfigError(f"The option {name!r} of a study is a {listed_kinds}; got {value!r}.")
    return given
