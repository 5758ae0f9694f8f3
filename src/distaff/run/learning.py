"""Learning: a warning where the first steps of a run have changed nothing."""

from __future__ import annotations

from distaff.core.warnings import warn
from distaff.optim import num_updates
from distaff.step.finite import Evidence, evidence_of_learning, what_is_missing
from distaff.step.state import TrainState


class LearningCheck:
    """Compares the state after the first updates of a run with the one before them.

    Args:
        state: before the first step; fingerprints of it are kept. None checks nothing.
    """

    def __init__(self, state: TrainState | None) -> None:
        self._before: Evidence | None = None
        # The learning rate of the first update is zero under a warm-up.
        self._num_steps, self._enough = 2, 2
        if state is not None:
            self._before = evidence_of_learning(state)
            self._enough += _updates(state) or 0

    def __call__(self, state: TrainState, num_steps: int) -> None:
        """Warns, once, if nothing has been learned. It waits for the device when it looks.

        Args:
            state: after some steps.
            num_steps: how many of them have been trained on.
        """
        if self._before is None or num_steps < self._num_steps:
            return
        updates = _updates(state)
        if updates is not None and updates < self._enough:  # It accumulates for longer than that.
            self._num_steps = 2 * num_steps
            return
        before, self._before = self._before, None
        missing = what_is_missing(before, evidence_of_learning(state))
        if missing:
            warn(
                f"{missing} in the first {num_steps} steps. Either the loss does not depend on its "
                "argument `params`: a loss that reads state.params instead has zero gradients. Or "
                "the learning rate is zero, every parameter frozen, or every example without "
                "weight.",
                stacklevel=2,
            )


def _updates(state: TrainState) -> int | None:
    updates = num_updates(state.opt_state)
    return None if updates is None else int(updates)
