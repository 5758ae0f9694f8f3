"""Counted: a training step of your own that makes several updates, or none, of `state.step`."""

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
    """Wraps a step of your own so that `state.step` counts its calls, which are batches.

    Inside the step `state.step` is the count that a plain loop would have: a step that makes two
    updates sees 0, 2, 4 and so on, and draws other random numbers in each of them.

    Args:
        step: `(state, batch) -> (state, metrics)`.
        is_own: whether it is of the user's own; all others make one update.

    Attributes:
        num_updates: by how much a call moves `state.step`; set by `count`.
    """

    def __init__(self, step: StepFn, *, is_own: bool = True) -> None:
        self._step, self._is_own = step, is_own
        self.num_updates = 1

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        """Returns the state after one batch, and the metrics."""
        if not self._is_own:
            return self._step(state, batch)
        inside = state if self.num_updates == 1 else state.replace(step=self._count_of(state))
        after, metrics = self._step(inside, batch)
        return after.replace(step=state.step + 1), metrics

    def count(self, state: TrainState, batch: Batch) -> int:
        """Finds out how many updates a call makes, which schedules are stretched by.

        Args:
            state: a state with its optimizer; it is not changed.
            batch: a batch like those of training.

        Returns:
            By how much a call moves `state.step`, at least 1.

        Raises:
            StateError: that depends on the step.
        """
        if not self._is_own:
            return 1
        try:
            moved = _moved_by(self._step, state, batch)
        except StateError:
            raise
        except Exception:  # it is traced again, by what says more of an error
            moved = {1}
        if len(moved) > 1:
            raise StateError(
                f"train_step moves state.step by {' or '.join(map(str, sorted(moved)))}, depending "
                "on the step, so that no schedule can be stretched over the run. Let each call "
                "count alike: return after.replace(step=state.step + 1), where state is the one "
                "that train_step was given."
            )
        self.num_updates = max(1, *moved)
        return self.num_updates

    def _count_of(self, state: TrainState) -> jax.Array:
        return state.step * self.num_updates


def counted(step: StepFn, kind: type, base: type) -> Counted:
    """Returns a step of a trainer, counted.

    Args:
        step: its training step.
        kind: its class.
        base: the class whose `create_functions` makes steps of one update.
    """
    methods = [getattr(each, "create_functions", None) for each in (kind, base)]
    return Counted(step, is_own=methods[0] is not methods[1])


def _moved_by(step: StepFn, state: TrainState, batch: Batch) -> set[int]:
    """Returns by how much a step moves `state.step`: several numbers where it depends on it."""
    found: list[Any] = []

    def run(state: TrainState, batch: Batch) -> tuple[()]:
        # A number of NumPy stays one where it is only counted up, also while all else is traced.
        found.append(step(state.replace(step=np.int32(0)), batch)[0].step)
        return ()

    jax.eval_shape(run, state, batch)
    if isinstance(found[0], int | np.integer):
        return {int(found[0])}

    @jax.jit
    def moved(count: jax.Array, state: TrainState, batch: Batch) -> jax.Array:
        return step(state.replace(step=count), batch)[0].step - count

    return {int(moved(jnp.int32(count), state, batch)) for count in range(_PROBED)}
