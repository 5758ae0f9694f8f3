"""Evaluation and prediction: the fold of a step over a loader, exact over a short last batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from distaff import metrics as metrics_lib
from distaff.data import num_examples
from distaff.errors import BatchError, leaf_name
from distaff.execution import Execution
from distaff.metrics import Metric
from distaff.state import TrainState
from distaff.step import EvalFn, EvalStep, MaskError
from distaff.typing import Batch, PyTree
from distaff.window import accumulating

_IN_FLIGHT = 32


class Evaluator:
    """Folds an evaluation step over a loader.

    Every example counts once. A batch shorter than the first is padded to its size and masked where
    the step can mask (an `EvalStep` whose loss and metrics are values per example), so that one
    program serves all; otherwise it keeps its own size, which compiles once more.

    Args:
        eval_step: an `EvalStep`, or any `(state, batch) -> metrics`.
        execution: how the step is made to run.
    """

    def __init__(self, eval_step: EvalFn | EvalStep, execution: Execution) -> None:
        self._eval_step = eval_step
        self._masks = None if isinstance(eval_step, EvalStep) else False
        self._execution = execution
        self._run = execution.program(self._accumulating)

    def __call__(self, state: TrainState, batches: Iterable[Batch]) -> dict[str, Metric]:
        """Returns the metrics over all examples, on the host.

        Args:
            state: evaluated, not changed.
            batches: one pass over a data set.

        Raises:
            BatchError: there is no batch.
        """
        full_size, waiting, total = 0, [], None
        for batch in batches:
            full_size = full_size or num_examples(batch)
            waiting.append(self._run(state, *self._padded(state, batch, full_size)))
            if len(waiting) == _IN_FLIGHT:
                total, waiting = _drained(total, waiting), []
        total = _drained(total, waiting)
        if total is None:
            raise BatchError("An evaluation needs at least one batch; the loader gave none.")
        return total

    def shapes(self, state: TrainState, batch: Batch) -> dict[str, Metric]:
        """Returns the metrics of one full batch, as shapes where the step can be traced."""
        padded = self._padded(state, batch, num_examples(batch))
        return self._execution.shapes(self._run, state, *padded)

    def _accumulating(
        self, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> dict[str, Metric]:
        # Only an `EvalStep` is ever given a mask; see `_padded`.
        step: Any = self._eval_step
        metrics = step(state, batch) if mask is None else step(state, batch, mask)
        return accumulating(metrics, num_examples(batch))

    def _padded(
        self, state: TrainState, batch: Batch, full_size: int
    ) -> tuple[Batch, np.ndarray | None]:
        size = num_examples(batch)
        if self._masks is None:
            self._masks = self._can_mask(state, batch, np.ones(size, bool))
        if not self._masks:
            return batch, None
        if size > full_size:
            raise BatchError(
                f"In evaluation the first batch is the largest; it had {full_size} examples and a "
                f"later one {size}. Yield batches of one size, the last one shorter."
            )
        return pad(batch, full_size), np.arange(full_size) < size

    def _can_mask(self, state: TrainState, batch: Batch, mask: np.ndarray) -> bool:
        try:
            self._execution.shapes(self._run, state, batch, mask)
        except MaskError:
            return False
        return True


def pad(batch: Batch, size: int) -> Batch:
    """Repeats the last example until the batch has `size` examples.

    Real examples rather than zeros, so that no division by zero or logarithm of zero can appear.
    """
    missing = size - num_examples(batch)
    if missing == 0:
        return batch
    return jax.tree.map(
        lambda leaf: np.concatenate([leaf, np.repeat(np.asarray(leaf)[-1:], missing, axis=0)]),
        batch,
    )


def _drained(
    total: dict[str, Metric] | None, waiting: list[dict[str, Metric]]
) -> dict[str, Metric] | None:
    for metrics in jax.device_get(waiting):
        fetched = metrics_lib.to_host(metrics)
        total = fetched if total is None else metrics_lib.merge(total, fetched)
    return total


def predict(
    predict_step: Callable[[TrainState, Batch], PyTree],
    state: TrainState,
    batches: Iterable[Batch],
) -> PyTree:
    """Gathers a model's outputs over a loader, in its order, on the host.

    Args:
        predict_step: `(state, batch) -> outputs`, each output `[batch, ...]`.
        state: used, not changed.
        batches: one pass over a data set; a short batch is padded, and its padding cut off.

    Returns:
        The outputs as numpy arrays, `[examples, ...]`, in the structure of one batch's outputs.

    Raises:
        BatchError: there is no batch, or an output has no batch axis.
    """
    full_size, gathered = 0, []
    for batch in batches:
        size = num_examples(batch)
        full_size = max(full_size, size)
        outputs = predict_step(state, pad(batch, full_size))
        gathered.append((outputs, size, full_size))
        if len(gathered) > _IN_FLIGHT:
            late = len(gathered) - _IN_FLIGHT - 1
            gathered[late] = _fetched(*gathered[late])
    if not gathered:
        raise BatchError("A prediction needs at least one batch; the loader gave none.")
    parts = [_fetched(*entry)[0] for entry in gathered]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _fetched(outputs: PyTree, size: int, padded_size: int) -> tuple[PyTree, int, int]:
    shapes = {leaf_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(outputs)}
    if not shapes or any(shape[:1] != (padded_size,) for shape in shapes.values()):
        raise BatchError(
            f"A prediction has one entry per example in every array, here {padded_size}; "
            f"it has the shapes {shapes}. Return arrays [batch, ...]."
        )
    kept = jax.tree.map(lambda leaf: np.asarray(leaf)[:size], outputs)
    return kept, size, size
