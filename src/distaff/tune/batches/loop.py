"""Asks for the trials of a study in batches, trains each batch, and records its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from distaff.core.config.encoding import override
from distaff.execution.device_memory import is_out_of_memory
from distaff.metrics.monitor import Monitor
from distaff.run.identity.ending import ending
from distaff.tune import trial as trial_lib
from distaff.tune.batches.group import (
    BatchTrial,
    Outcome,
    TrialGroup,
    UntraceableError,
    outcome_left,
)
from distaff.tune.batches.grouping import Kind, TrialGrouping
from distaff.tune.search import Search, Suggestion, Trial
from distaff.tune.trial import Task

_MOST_GROUPS = 8
"""Static configurations whose programs are kept. Older ones compile again."""


class Batches:
    """Trains the trials of a study in batches.

    Args:
        task: turns a config into a training.
        config: the config of the study.
        search: suggests and records trials.
        monitor: the metric that ranks trials.
        show: shows a line.
    """

    def __init__(
        self,
        task: Task,
        config: Any,
        search: Search,
        monitor: Monitor,
        show: Callable[[str], None],
    ) -> None:
        self._task, self._config, self._search = task, config, search
        self._monitor, self._show = monitor, show
        self._grouping = TrialGrouping(task, config)
        self._groups: dict[str, TrialGroup] = {}
        self._seen: set[str] = set()
        self._num_trials = self._num_batches = self._num_dropped = 0

    def train(self, size: int, num_trials: int, ended: Callable[[Trial], None]) -> None:
        """Trains batches until the study has all its trials.

        Args:
            size: trials per batch.
            num_trials: number of trials of the whole study.
            ended: called with each trial that has ended.
        """
        while batch := self._asked(size, num_trials):
            self._num_batches += 1
            self._num_trials += len(batch)
            self._train(batch, ended)

    def summary(self) -> str:
        """Returns a line on the trials, their static configurations, and the programs for them."""
        num_programs = sum(group.num_programs for group in self._groups.values())
        return (
            f"{_count(self._num_trials, 'trial')} in {_count(self._num_batches, 'batch', 'es')}, "
            f"{_count(len(self._seen), 'static group')}, "
            f"{_count(num_programs + self._num_dropped, 'program')} compiled"
        )

    def _asked(self, size: int, num_trials: int) -> list[Suggestion]:
        """Returns the trials of the next batch; none if the study is complete."""
        found: list[Suggestion] = []
        try:
            while len(found) < size and (each := self._search.ask(num_trials)) is not None:
                found.append(each)
        except BaseException:
            for each in found:
                self._search.abandon(each)
            raise
        return found

    def _train(self, batch: Sequence[Suggestion], ended: Callable[[Trial], None]) -> None:
        """Trains a batch, and then records all results.

        If it is interrupted, the next batch has the same trials.
        """
        outcomes: dict[int, Outcome] = {}
        waiting = {each.number: each for each in batch}
        try:
            for some, found in self._outcomes(batch):
                outcomes.update(zip([each.number for each in some], found, strict=True))
            for each in batch:
                ended(self._search.tell(each, *outcomes[each.number]))
                del waiting[each.number]
        except BaseException as error:
            is_cut = not isinstance(error, Exception) or ending(error)["resumable"]
            for each in waiting.values():
                self._search.abandon(each, resumes=is_cut)
            error.add_note(
                f"These were the trials {', '.join(map(str, waiting))} of a study. Run the same "
                "program again to resume the study."
            )
            raise

    def _outcomes(
        self, batch: Sequence[Suggestion]
    ) -> Iterator[tuple[Sequence[Suggestion], Sequence[Outcome]]]:
        """Trains the groups of a batch one after the other, and yields their outcomes."""
        units: dict[str, tuple[Kind, list[BatchTrial]]] = {}
        for each in batch:
            if each.left is not None and not is_member(each.left):
                yield [each], [self._alone(each)]  # the run that an earlier call has begun
                continue
            done = outcome_left(each, self._monitor)
            if done is not None:
                yield [each], [done]
                continue
            trainer = self._task.trainer(override(self._config, each.values))
            kind = self._grouping.kind_of(each.values, trainer)
            values = {place: each.values[path] for path, place in kind.traced.items()}
            together = kind.key if each.left is None else f"{kind.key} {each.left.parent}"
            trial = BatchTrial(each, trainer, values)
            units.setdefault(together, (kind, []))[1].append(trial)
        for _, trials in units.values():
            trials.sort(key=lambda trial: trial.suggestion.origin)
        parts = [
            (kind, some)
            for kind, trials in units.values()
            for some in _parts(trials, self._room(kind))
        ]
        for _, some in parts[1:]:
            _note(some, waits=True)
        for number, (kind, some) in enumerate(parts):
            if number:
                _note(some, waits=False)
            suggestions = [each.suggestion for each in some]
            try:
                found = self._together(kind, some)
            except UntraceableError as error:
                self._make_static(kind, error.reasons)
                yield from self._outcomes(suggestions)
                continue
            yield suggestions, found

    def _make_static(self, kind: Kind, reasons: Mapping[str, str]) -> None:
        """Lets values form groups, which cannot be arguments of a program."""
        del self._groups[kind.key]
        self._seen.remove(kind.key)
        self._grouping.static.update(reasons)
        for path, reason in reasons.items():
            self._show(f"{path} is static, and its values form groups: {reason}")

    def _room(self, kind: Kind) -> int | None:
        """Returns the number of trials that the programs of a group can train; None for any."""
        return self._groups[kind.key].room if kind.key in self._groups else None

    def _together(self, kind: Kind, trials: Sequence[BatchTrial]) -> Sequence[Outcome]:
        """Trains the trials of a group as one population."""
        group = self._groups.pop(kind.key, None) or TrialGroup(self._show)
        self._groups[kind.key] = group  # the newest is last
        self._seen.add(kind.key)
        if len(self._groups) > _MOST_GROUPS:
            self._num_dropped += self._groups.pop(next(iter(self._groups))).num_programs
        try:
            return self._task.using(
                override(self._config, kind.static), partial(group.train, trials=trials)
            )
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        self._num_dropped += self._groups.pop(kind.key).num_programs
        self._show(
            f"{len(trials)} trials at once need more memory than there is, so they are trained "
            "one after the other. Use a smaller batch."
        )
        return [self._alone(each.suggestion) for each in trials]

    def _alone(self, suggestion: Suggestion) -> Outcome:
        """Trains a trial as a run of its own."""
        return trial_lib.run(self._task, override(self._config, suggestion.values), suggestion)


def is_member(path: Path) -> bool:
    """Whether a run directory belongs to a member of a population."""
    return (path.parent.parent / "population.json").exists()


def _note(trials: Sequence[BatchTrial], **facts: Any) -> None:
    """Records facts about trials, such as that they have not begun."""
    for each in trials:
        each.suggestion.note(**facts)


def _parts(trials: list[BatchTrial], size: int | None) -> Iterator[list[BatchTrial]]:
    size = size or len(trials)
    for start in range(0, len(trials), size):
        yield trials[start : start + size]


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"
