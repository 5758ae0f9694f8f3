"""Warns if the first steps of a run change nothing, and lowers the learning rate on a plateau."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from distaff.core.warnings import warn
from distaff.execution.placement import like
from distaff.metrics.monitor import Monitor
from distaff.optim import num_updates
from distaff.optim.transforms.plateau import Plateau, after_validation, with_numbers
from distaff.run.workspace import Workspace
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


def watch_plateau(
    workspace: Workspace, plateau: Plateau, monitor: Monitor, metrics: Mapping[str, Any]
) -> None:
    """Passes a validation to the plateau rule of the optimizer, and shows a new learning rate.

    Raises:
        MetricError: the monitored metric is missing.
    """
    value = np.float32(monitor.value(metrics))
    rule = partial(after_validation, plateau=plateau, mode=monitor.mode)
    program = workspace.program(f"{plateau} {monitor.mode}", rule)
    state = workspace.ready_state()
    opt_state, (before, after) = with_numbers(
        state.opt_state, lambda numbers: like(program(numbers, value), numbers)
    )
    workspace.state = state.replace(opt_state=opt_state)
    if after != before:
        workspace.show(
            f"the learning rate is now {after:g} of its schedule: {monitor.name} has not "
            f"improved for {plateau.patience} validations"
        )
