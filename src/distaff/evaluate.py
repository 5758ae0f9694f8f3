"""Evaluation and prediction: the fold of a step over a loader, exact over a short last batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distaff import metrics as metrics_lib
from distaff.compiling import Watch
from distaff.data import Chunk, One, Source, num_examples, pad
from distaff.errors import BatchError, leaf_name
from distaff.execution import Execution
from distaff.measured import accumulating
from distaff.metrics import Metric
from distaff.rows import Columns
from distaff.state import TrainState
from distaff.step import EvalFn, EvalStep, MaskError
from distaff.typing import Batch, PyTree

_IN_FLIGHT = 32


class Evaluator:
    """Folds an evaluation step over a loader.

    Every example counts once. A batch shorter than the first whose examples have its shapes is
    padded to its size and masked where the step can mask (an `EvalStep` whose loss and metrics are
    values per example), so that one program serves all of these shapes; otherwise it keeps its own
    size, which compiles once more.

    Args:
        eval_step: an `EvalStep`, or any `(state, batch) -> metrics`.
        execution: how the step is made to run.
        watch: watches what compiles.

    Attributes:
        masks: whether the step can mask; None as long as that is not known.
    """

    def __init__(
        self, eval_step: EvalFn | EvalStep, execution: Execution, watch: Watch | None = None
    ) -> None:
        self._eval_step = eval_step
        self.masks: bool | None = None if isinstance(eval_step, EvalStep) else False
        self._execution = execution
        self._columns: dict[int, Columns] = {}
        self._one = execution.part(self._accumulating_one)
        self._run = execution.program(self._accumulating)
        watch, arguments = watch or Watch(), ("state", "source", "mask", "num_steps")
        many = execution.program(self._accumulating_each)
        self._call = watch.over(self._run, "the evaluation step", arguments)
        self._call_fused = watch.over(many, "the fused evaluation steps", arguments)

    def __call__(self, state: TrainState, chunks: Iterable[Chunk]) -> dict[str, Metric]:
        """Returns the metrics over all examples, on the host.

        Args:
            state: evaluated, not changed.
            chunks: one pass over a data set.

        Raises:
            BatchError: there is no batch.
        """
        full_sizes, waiting, total = {}, [], None
        for chunk in chunks:
            full_size = full_sizes.setdefault(_shapes(chunk.source), chunk.examples)
            waiting.append(self._measure(state, chunk, full_size))
            if len(waiting) == _IN_FLIGHT:
                total, waiting = _drained(total, waiting), []
        total = _drained(total, waiting)
        if total is None:
            raise BatchError("An evaluation needs at least one batch; the loader gave none.")
        return total

    def shapes(self, state: TrainState, batch: Batch) -> dict[str, Metric]:
        """Returns the metrics of one full batch, as shapes where the step can be traced."""
        mask = np.ones(num_examples(batch), bool)
        if self._can_mask(state, One(batch), mask):
            return self._execution.shapes(self._run, state, One(batch), mask)
        return self._execution.shapes(self._run, state, One(batch), None)

    def _measure(
        self, state: TrainState, chunk: Chunk, full_size: int
    ) -> dict[str, Metric] | _Rows:
        source, mask = chunk.source, None
        if self._can_mask(state, source, np.ones(chunk.examples, bool)):
            if chunk.examples > full_size:
                raise BatchError(
                    f"In evaluation the first batch is the largest; it had {full_size} examples "
                    f"and a later one {chunk.examples}. Yield batches of one size, the last one "
                    "shorter."
                )
            source, mask = source.padded(full_size), np.arange(full_size) < chunk.examples
        if source.capacity == 1:
            return self._call(state, source, mask)
        table = self._call_fused(state, source, mask, np.int32(chunk.num_steps))
        size = chunk.examples if mask is None else full_size
        return _Rows(chunk.num_steps, table, self._columns[size])

    def _accumulating_one(
        self, state: TrainState, batch: Batch, mask: jax.Array | None
    ) -> dict[str, Metric]:
        # Only an `EvalStep` is ever given a mask; see `_measure`.
        step: Any = self._eval_step
        metrics = step(state, batch) if mask is None else step(state, batch, mask)
        return accumulating(metrics, num_examples(batch))

    def _accumulating(
        self, state: TrainState, source: Source, mask: jax.Array | None, index: Any = 0
    ) -> dict[str, Metric]:
        return self._one(state, source.batch(index), mask)

    def _accumulating_each(
        self, state: TrainState, source: Source, mask: jax.Array | None, num_steps: jax.Array
    ) -> jax.Array:
        """Returns a row for each batch: uint32 `[capacity, width]`; those after the last are 0."""
        size = num_examples(jax.eval_shape(lambda: source.batch(0)))
        columns = Columns(jax.eval_shape(self._accumulating, state, source, mask))
        self._columns[size] = columns  # while it is traced, before it is run for the first time

        def body(index: jax.Array, table: jax.Array) -> jax.Array:
            row = columns.row(self._accumulating(state, source, mask, index))
            return table.at[index].set(row)

        table = jnp.zeros((source.capacity, columns.width), jnp.uint32)
        return jax.lax.fori_loop(0, num_steps, body, table)

    def _can_mask(self, state: TrainState, source: Source, mask: np.ndarray) -> bool:
        if self.masks is None:
            try:
                self._execution.shapes(self._run, state, source, mask)
                self.masks = True
            except MaskError:
                self.masks = False
        return self.masks


def _shapes(source: Source) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of an example of the batches, whatever their number and size."""
    axes = 1 if isinstance(source, One) else 2
    return tuple(leaf.shape[axes:] for leaf in jax.tree.leaves(source))


class _Rows(NamedTuple):
    """The metrics of several batches, on the device; see `Columns`."""

    num_rows: int
    table: jax.Array
    columns: Columns

    def merged(self) -> dict[str, Metric]:
        rows = self.columns.metrics(np.asarray(self.table)[: self.num_rows])
        return metrics_lib.merge_rows(rows)


def _drained(
    total: dict[str, Metric] | None, waiting: list[dict[str, Metric] | _Rows]
) -> dict[str, Metric] | None:
    for each in waiting:
        fetched = each.merged() if isinstance(each, _Rows) else metrics_lib.to_host(each)
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
        BatchError: there is no batch, an output has no batch axis, or its other axes differ from
            batch to batch.
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
    return jax.tree.map_with_path(_joined, *parts)


def _joined(path: tuple[Any, ...], *leaves: np.ndarray) -> np.ndarray:
    shapes = {leaf.shape[1:] for leaf in leaves}
    if len(shapes) > 1:
        name = f" {leaf_name(path)!r}" if path else ""
        raise BatchError(
            f"The outputs of a prediction are alike for all examples; the output{name} has shapes "
            f"[batch, ...] with {sorted(shapes)} after the batch. Pad the examples to one length, "
            "data.bucketed(examples, [length], ...), or predict each length by itself."
        )
    return np.concatenate(leaves)


def _fetched(outputs: PyTree, size: int, padded_size: int) -> tuple[PyTree, int, int]:
    shapes = {leaf_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(outputs)}
    if not shapes or any(shape[:1] != (padded_size,) for shape in shapes.values()):
        raise BatchError(
            f"A prediction has one entry per example in every array, here {padded_size}; "
            f"it has the shapes {shapes}. Return arrays [batch, ...]."
        )
    kept = jax.tree.map(lambda leaf: np.asarray(leaf)[:size], outputs)
    return kept, size, size
