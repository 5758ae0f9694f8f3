"""Counts batches in `state.step` for custom steps that make several updates per batch, or none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch
from distaff.errors import StateError
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState

_PROBED = 8


class Counted:
    """Wraps a custom step so that `state.step` counts its calls, which are batches.

    Inside the step, `state.step` counts updates as in a plain loop: a step that makes two updates
    sees 0, 2, 4 and so on, and draws different random numbers in each of them.

    Args:
        step: `(state, batch) -> (state, metrics)`.
        is_own: whether it is a custom step; all others make one update.

    Attributes:
        num_updates: increase of `state.step` per call; set by `count`.
    """

    def __init__(self, step: StepFn, *, is_own: bool = True) -> None:
        self._step, self._is_own = step, is_own
        self.num_updates = 1

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        """Returns the state after one batch, and the metrics."""
        if not self._is_own:
            return self._step(state, batch)
        inside = state
        if self.num_updates != 1:
            inside = state.replace(step=state.step * self.num_updates)
        after, metrics = self._step(inside, batch)
        return after.replace(step=state.step + 1), metrics

    def count(self, state: TrainState, batch: Batch) -> int:
        """Returns the number of updates per call, at least 1, by which schedules are stretched.

        Args:
            state: a state with its optimizer; it is not changed.
            batch: a training batch.

        Raises:
            StateError: the number depends on `state.step`.
        """
        if not self._is_own:
            return 1
        try:
            moved = _increments(self._step, state, batch)
        except StateError:
            raise
        except Exception:  # the step is traced again later, with a better error message
            moved = {1}
        if len(moved) > 1:
            raise StateError(
                "train_step must increase state.step by the same number in each call, so that "
                "schedules fit the run; it increases it by "
                f"{' or '.join(map(str, sorted(moved)))}, depending on the step. Return "
                "after.replace(step=state.step + 1), where state is the argument of train_step."
            )
        self.num_updates = max(1, *moved)
        return self.num_updates


def counted(step: StepFn, kind: type, base: type) -> Counted:
    """Wraps the training step of a trainer of class `kind` in `Counted`.

    The step is custom if `kind` overrides the `create_functions` of `base`.
    """
    own, default = (getattr(each, "create_functions", None) for each in (kind, base))
    return Counted(step, is_own=own is not default)


def _increments(step: StepFn, state: TrainState, batch: Batch) -> set[int]:
    """Returns the increments of `state.step` per call; several if they depend on the step."""
    found: list[Any] = []

    def run(state: TrainState, batch: Batch) -> tuple[()]:
        # A NumPy integer that is only incremented stays concrete while all else is traced.
        found.append(step(state.replace(step=np.int32(0)), batch)[0].step)
        return ()

    jax.eval_shape(run, state, batch)
    if isinstance(found[0], int | np.integer):
        return {int(found[0])}

    @jax.jit
    def moved(count: jax.Array, state: TrainState, batch: Batch) -> jax.Array:
        return step(state.replace(step=count), batch)[0].step - count

    return {int(moved(jnp.int32(count), state, batch)) for count in range(_PROBED)}
