"""Timetable: when a run validates, saves and ends, within its epochs and at their ends."""

from __future__ import annotations

from collections.abc import Collection

from distaff.core.config.cadence import Count, Every, Unit
from distaff.errors import CheckpointError, ConfigError
from distaff.execution.feed.room import COUNTED, Room, no_tokens
from distaff.execution.feed.skipped import num_drawn, skipped_batches
from distaff.run.events import Plan
from distaff.run.run_state import RunState


class Timetable:
    """Says when a run validates, saves and ends, from its progress alone.

    Args:
        plan: the loaders and epochs.
        saving: how often to save, in addition to validations; None if never.

    Raises:
        ConfigError: the trainer does not count tokens, and something is due by their number.

    Attributes:
        within: the cadences within an epoch; chunks of steps end at their multiples.
    """

    def __init__(self, plan: Plan, saving: Every | None) -> None:
        self._plan, self._saving = plan, saving
        cadences = [each for each in (plan.val_every, saving) if each is not None]
        self.within = [each for each in cadences if each.unit in ("steps", *COUNTED)]
        self.within += [] if plan.limit is None else [plan.limit]
        if plan.count_tokens is None and any(each.unit == "tokens" for each in self.within):
            raise no_tokens()

    def room(self, state: RunState) -> Room | None:
        """Returns what limits chunks in an epoch that continues after a state, if anything."""
        plan = self._plan
        if not self.within:
            return None
        return Room(self.within, state.step, state.counts, plan.count_tokens)

    def check_counts(self, state: RunState) -> None:
        """Checks that a resumed run has counted what it needs.

        Raises:
            CheckpointError: it has not.
        """
        for every in self.within:
            is_counted = every.unit == "steps" or every.unit in state.counts
            if not is_counted and state.step > state.begun_at[0]:
                raise CheckpointError(
                    f"The run was started without counting its {every.unit}, so it cannot resume "
                    f"with {str(every)!r}. Use the options it was started with, or start a new run "
                    "with resume='never'."
                )

    def is_spent(self, state: RunState) -> bool:
        """Whether the run has had the examples, tokens or seconds that it ends after."""
        limit = self._plan.limit
        return limit is not None and state.counts.get(limit.unit, _ZERO).now >= limit.count

    def is_over(self, state: RunState) -> bool:
        """Whether no epoch is left to train, or to complete."""
        progress, last = state.in_epoch, self._plan.last_epoch
        if last is not None:
            return progress.epoch > last
        return self.is_spent(state) and not progress.steps

    def is_save_due(self, unit: Unit, number: int) -> bool:
        """Whether to save after so many steps or epochs, in addition to validations."""
        return self._saving is not None and self._saving.is_due(unit, number)

    def is_pause_due(self, state: RunState) -> bool:
        """Whether to validate or save after the last step, within the epoch."""
        is_save_due = self._saving is not None and _is_due(self._saving, state)
        return is_save_due or self.is_due_within(state)

    def is_due_within(self, state: RunState) -> bool:
        """Whether to validate after the last step, unless it ends the epoch."""
        progress = state.in_epoch
        if not progress.steps or progress.is_trained or progress.is_validated:
            return False
        return _is_due(self._plan.val_every, state) and not self._is_over(state)

    def _is_over(self, state: RunState) -> bool:
        """Whether the steps of the epoch are known to be completed."""
        progress = state.in_epoch
        if self.is_spent(state):
            return True
        skipped = skipped_batches(state.skipped, progress.epoch)
        length = self._plan.steps_of(progress.epoch) or self._plan.epoch_length
        return num_drawn(progress.steps, skipped) == length

    def is_due_after(self, state: RunState, *, is_stopped: bool) -> bool:
        """Whether to validate at the end of an epoch.

        Args:
            state: the progress of the run.
            is_stopped: whether this epoch is the last one.
        """
        every, progress = self._plan.val_every, state.in_epoch
        if progress.validated == progress.steps:  # at a step that turned out to be the last
            return False
        is_last = is_stopped or self.is_spent(state) or progress.epoch == self._plan.last_epoch
        return is_last or _is_due(every, state) or every.is_due("epochs", progress.epoch)


_ZERO = Count(0, 0)


def _is_due(every: Every, state: RunState) -> bool:
    """Whether something is due after the last step, unless by epochs or time."""
    if every.unit == "steps":
        return every.is_due("steps", state.step)
    return every.unit in COUNTED and every.is_passed(state.counts.get(every.unit, _ZERO))


def check_not_within(cadences: Collection[Every], owner: str) -> None:
    """Checks that a class whose `train_epoch` makes its steps itself need not be interrupted.

    Raises:
        ConfigError: the run validates or saves within its epochs.
    """
    if cadences:
        raise ConfigError(
            f"{owner}.train_epoch makes its steps itself, so the run cannot validate, save or end "
            f"every {' or '.join(map(str, cadences))}. In train_epoch, iterate over "
            "epoch_steps(self.last_run, train_loader) of distaff.run.loop, or set num_epochs, "
            "val_every and save_every to epochs."
        )
