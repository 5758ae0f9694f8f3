"""Warns if the first steps of a run change nothing."""

from __future__ import annotations

from distaff.core.warnings import warn
from distaff.optim import num_updates
from distaff.step.finite import evidence_of_learning, what_is_missing
from distaff.step.state import TrainState


class LearningCheck:
    """Compares the state after the first updates of a run with the initial state.

    Args:
        state: the initial state; only its fingerprints are kept.
    """

    def __init__(self, state: TrainState) -> None:
        self._before = evidence_of_learning(state)
        # With a warm-up, the learning rate of the first update is zero.
        self._num_steps = 2
        self._enough = 2 + (_updates(state) or 0)

    def __call__(self, state: TrainState, num_steps: int) -> bool:
        """Warns if the first steps have changed nothing. Blocks until the device is done.

        Args:
            state: the current state.
            num_steps: completed steps, without skipped ones.

        Returns:
            Whether the check is complete.
        """
        if num_steps < self._num_steps:
            return False
        updates = _updates(state)
        if updates is not None and updates < self._enough:  # gradients are still accumulated
            self._num_steps = 2 * num_steps
            return False
        missing = what_is_missing(self._before, evidence_of_learning(state))
        if missing:
            warn(
                f"{missing} in the first {num_steps} steps. Either the loss does not depend on its "
                "argument `params` (a loss that reads state.params instead has zero gradients), or "
                "the learning rate is zero, all parameters are frozen, or all example weights are "
                "zero.",
                stacklevel=2,
            )
        return True


def _updates(state: TrainState) -> int | None:
    updates = num_updates(state.opt_state)
    return None if updates is None else int(updates)
