"""Watches whether a run learns: after its first steps, and after validations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from distaff.callbacks import Callbacks, EarlyStopping
from distaff.core.warnings import warn
from distaff.execution.placement import like
from distaff.metrics.monitor import Monitor
from distaff.optim import num_updates
from distaff.optim.transforms.plateau import Plateau, after_validation, with_numbers
from distaff.run.workspace import Workspace
from distaff.step.finite import evidence_of_learning, what_is_missing
from distaff.step.state import TrainState

_TRAINING_LOSS = "train/loss"

_LEAST_EPOCHS = 10
"""Fewest epochs without improvement for a suggestion."""


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


class LearningWatch:
    """Lowers the learning rate on a plateau if configured; else suggests what to do, once.

    Args:
        workspace: has the state and its optimizer.
        monitor: the metric that ranks models.
        callbacks: of the run; with an `EarlyStopping` among them there is no suggestion.
        num_epochs: epochs of the run; None if unknown.
    """

    def __init__(
        self, workspace: Workspace, monitor: Monitor, callbacks: Callbacks, num_epochs: int | None
    ) -> None:
        self._workspace, self._monitor = workspace, monitor
        is_stopped = any(isinstance(each, EarlyStopping) for each in callbacks.callbacks)
        self._stagnation = None if is_stopped else Stagnation(monitor, num_epochs or 0)

    def validated(self, judged: Mapping[str, Any], latest: Mapping[str, Any]) -> None:
        """Reacts to a validation.

        Args:
            judged: the metrics that rank the model.
            latest: the latest metrics of training and validation.

        Raises:
            MetricError: the optimizer needs the monitored metric, and it is missing.
        """
        workspace = self._workspace
        plateau = getattr(workspace.ready_state().tx, "plateau", None)
        if plateau is not None:
            _watch_plateau(workspace, plateau, self._monitor, judged)
        elif self._stagnation and (line := self._stagnation(latest, workspace.epoch)):
            workspace.show(line)


class Stagnation:
    """Suggests what to do, once in this process, when the loss has long not improved.

    Args:
        monitor: the metric that ranks models; the training loss replaces it in a run without it.
        num_epochs: epochs of the run; a hint waits for a tenth of them, and for ten at least.
    """

    def __init__(self, monitor: Monitor, num_epochs: int) -> None:
        self._patience = max(_LEAST_EPOCHS, num_epochs // 10)
        self._monitors = (monitor, Monitor(_TRAINING_LOSS))
        self._best: dict[str, tuple[float, int]] = {}
        self._is_done = False

    def __call__(self, metrics: Mapping[str, Any], epoch: int) -> str:
        """Returns a line of advice after an epoch or a validation; empty for none.

        Args:
            metrics: the latest metrics of training and validation.
            epoch: the epoch that they are of.
        """
        for monitor in self._monitors:
            value = metrics.get(monitor.name)
            best, _ = self._best.get(monitor.name, (None, 0))
            if value is not None and np.ndim(value) == 0 and monitor.better(float(value), best):
                self._best[monitor.name] = (float(value), epoch)
        watched = next((each for each in self._monitors if each.name in self._best), None)
        if watched is None or self._is_done:
            return ""
        best, since = self._best[watched.name]
        is_perfect = best == (1.0 if watched.mode == "max" else 0.0)
        if is_perfect or epoch - since < self._patience:
            return ""
        self._is_done = True
        return self._advice(watched.name, epoch)

    def _advice(self, name: str, epoch: int) -> str:
        best, since = self._best[name]
        _, learned = self._best.get(_TRAINING_LOSS, (0.0, 0))
        waited, record = epoch - since, f"best: {best:.6g}, epoch {since}"
        text = f"{name} has not improved for {waited} epochs ({record})"
        if learned > since:
            return (
                f"{text}, but {_TRAINING_LOSS} has: the model may be overfitting. "
                "callbacks=[EarlyStopping()] ends such a run; weight decay, dropout or "
                "augmentation may help."
            )
        return (
            f"{text}. OptimizerConfig(plateau=Plateau()) lowers the learning rate in such a case, "
            "callbacks=[EarlyStopping()] ends the run. Or try another learning rate."
        )


def _watch_plateau(
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
