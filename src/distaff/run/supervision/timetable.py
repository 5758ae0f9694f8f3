"""Timetable: when a run validates and saves, within its epochs and at their ends."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from distaff.core.config.cadence import Every, Unit
from distaff.errors import ConfigError
from distaff.execution.feed.feed import Room
from distaff.execution.feed.skipped import num_drawn, skipped_batches
from distaff.run.events import Plan
from distaff.run.run_state import RunState


class Timetable:
    """Says when a run validates and saves; depends on its progress alone, not on the clock.

    Args:
        plan: the loaders and epochs.
        saving: how often to save, in addition to validations; None if never.

    Attributes:
        within: the cadences within an epoch; chunks of steps end at their multiples.
    """

    def __init__(self, plan: Plan, saving: Every | None) -> None:
        self._plan, self._saving = plan, saving
        cadences = (plan.val_every, saving)
        self.within = [each for each in cadences if each is not None and each.unit == "steps"]

    def room(self, step: int) -> Room | None:
        """Returns the limit of a chunk's steps, in an epoch that continues after a step, if any."""
        return partial(self._left, step) if self.within else None

    def _left(self, step: int, num_done: int) -> int:
        return min(every.left(step + num_done) for every in self.within)

    def is_save_due(self, unit: Unit, number: int) -> bool:
        """Whether to save after so many steps or epochs, in addition to validations."""
        return self._saving is not None and self._saving.is_due(unit, number)

    def is_pause_due(self, state: RunState) -> bool:
        """Whether to validate or save after the last step, within the epoch."""
        return self.is_save_due("steps", state.step) or self.is_due_within(state)

    def is_due_within(self, state: RunState) -> bool:
        """Whether to validate after the last step, unless it ends the epoch."""
        progress = state.in_epoch
        if not progress.steps or progress.is_trained or progress.is_validated:
            return False
        is_due = self._plan.val_every.is_due("steps", state.step)
        return is_due and not self._is_over(state)

    def _is_over(self, state: RunState) -> bool:
        """Whether the steps of the epoch are known to be completed."""
        progress = state.in_epoch
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
        is_last = is_stopped or progress.epoch == self._plan.last_epoch
        return (
            is_last or every.is_due("steps", state.step) or every.is_due("epochs", progress.epoch)
        )


def check_not_within(cadences: Collection[Every], owner: str) -> None:
    """Checks that a class whose `train_epoch` makes its steps itself need not be interrupted.

    Raises:
        ConfigError: the run validates or saves within its epochs.
    """
    if cadences:
        raise ConfigError(
            f"{owner}.train_epoch makes its steps itself, so the run cannot validate or save every "
            f"{' or '.join(map(str, cadences))}. In train_epoch, iterate over "
            "epoch_steps(self.last_run, train_loader) of distaff.run.loop, or set val_every and "
            "save_every to epochs."
        )
