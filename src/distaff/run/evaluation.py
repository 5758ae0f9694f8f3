"""Evaluation and prediction over a loader, exact for batches of any sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import distaff.metrics as metrics_lib
from distaff.core.typing import Batch, PyTree
from distaff.data import num_examples
from distaff.errors import BatchError, MaskError, leaf_name
from distaff.execution.compile.recompiles import Watch
from distaff.execution.dispatch.packed_metrics import MetricLayout
from distaff.execution.execution import Compiled, Execution
from distaff.execution.feed.chunk import Chunk, ChunkData, One, pad
from distaff.execution.placement import to_host
from distaff.execution.shards import whole
from distaff.metrics import Metric, PerExample
from distaff.step.independence import keeps_apart
from distaff.step.normalise import accumulating, reduced
from distaff.step.state import TrainState
from distaff.step.step import EvalFn, EvalStep, per_example

_IN_FLIGHT = 32

MayPad: TypeAlias = Callable[[ChunkData], bool]
"""Returns whether batches with the shapes and dtypes of this one may be padded."""


class Evaluator:
    """Accumulates the metrics of an evaluation step over a loader.

    Every example counts once, and batches may have any sizes. A batch smaller than an earlier one
    with the same example shapes is padded to its size and masked, so that one program serves both.
    A batch is not padded, and compiles another program, if the step cannot mask it (its loss or a
    metric is not one value per example, or the step is a custom function), or if the values of an
    example depend on other examples; see `Padding`.

    Args:
        eval_step: an `EvalStep`, or any `(state, batch) -> metrics`.
        execution: compiles and runs the step.
        watch: detects recompilations.

    Attributes:
        outputs: `(state, batch) -> metrics`, before they are reduced over examples.
    """

    def __init__(
        self, eval_step: EvalFn | EvalStep, execution: Execution, watch: Watch | None = None
    ) -> None:
        self._execution = execution
        self._padding: Padding | None = None
        self.outputs = execution.part(getattr(eval_step, "outputs", eval_step))
        if isinstance(eval_step, EvalStep):
            self._padding = Padding(execution, self._per_example)
        self._one = execution.part(self.metrics_of)
        self._run = execution.program(self._accumulating)
        watch, arguments = watch or Watch(), ("state", "source", "mask", "num_steps")
        many = execution.program(self._accumulating_each)
        self._call = watch.over(self._run, "the evaluation step", arguments)
        self._call_fused = watch.over(many, "the fused evaluation steps", arguments)

    def __call__(self, state: TrainState, chunks: Iterable[Chunk]) -> dict[str, Metric]:
        """Returns the metrics over all examples, on the host.

        Args:
            state: the state to evaluate; not changed.
            chunks: one pass over a data set.

        Raises:
            BatchError: there are no batches.
        """
        sizes, waiting, total = Sizes(self.may_pad(state)), [], None
        for chunk in chunks:
            waiting.append(self._evaluate(state, chunk, sizes))
            if len(waiting) == _IN_FLIGHT:
                total, waiting = _merge_waiting(total, waiting), []
        total = _merge_waiting(total, waiting)
        if total is None:
            raise BatchError("An evaluation needs at least one batch, but the loader is empty.")
        return total

    def may_pad(self, state: TrainState) -> MayPad:
        """Returns a function that decides which batches to pad in an evaluation of a state."""
        return (lambda source: False) if self._padding is None else self._padding.of(state)

    def step(self, state: TrainState, batch: Batch) -> dict[str, Metric]:
        """Returns the metrics of one full batch, before they are merged."""
        return self._run(state, One(batch), self._mask(state, batch))

    def shapes(self, state: TrainState, batch: Batch) -> dict[str, Metric]:
        """Returns the metrics of one full batch; as shapes if the step can be traced."""
        return self._execution.shapes(self._run, state, One(batch), self._mask(state, batch))

    def _mask(self, state: TrainState, batch: Batch) -> np.ndarray | None:
        return np.ones(num_examples(batch), bool) if self.may_pad(state)(One(batch)) else None

    def _evaluate(
        self, state: TrainState, chunk: Chunk, sizes: Sizes
    ) -> tuple[int, dict[str, Metric] | _Table]:
        """Returns the number of batches in a chunk, and their metrics on the device."""
        source, mask, axes = chunk.source, None, 1 if isinstance(chunk.source, One) else 2
        full = sizes.full(example_spec(source, axes=axes), chunk.examples, lambda: source)
        if full.may_pad:
            mask = np.arange(full.size) < chunk.examples
            if jax.tree.leaves(source)[0].shape[axes - 1] != full.size:
                source = source.padded(full.size)
        if source.capacity == 1:
            return 1, self._call(state, source, mask)
        num_steps = chunk.num_steps
        return num_steps, self._call_fused(state, source, mask, np.int32(num_steps))

    def _per_example(self, state: TrainState, batch: Batch) -> dict[str, PerExample]:
        return per_example(self.outputs(state, batch))

    def metrics_of(self, state: TrainState, batch: Batch, mask: jax.Array | None) -> dict[str, Any]:
        """Returns the metrics of one batch; for use inside a program.

        Args:
            state: the state to evaluate.
            batch: the batch.
            mask: bool `[batch]`, false for examples that pad it; None if nothing does.
        """
        size = num_examples(batch)
        if self._padding is None:
            return accumulating(self.outputs(state, batch), size)
        kept = jnp.ones(size, bool) if mask is None else mask
        return reduced(self.outputs(state, batch), kept)

    def _accumulating(
        self, state: TrainState, source: ChunkData, mask: jax.Array | None, index: Any = 0
    ) -> dict[str, Metric]:
        return self._one(state, source.batch(index), mask)

    def _accumulating_each(
        self, state: TrainState, source: ChunkData, mask: jax.Array | None, num_steps: jax.Array
    ) -> _Table:
        """Returns one row per batch; unused rows are 0."""
        layout = MetricLayout(jax.eval_shape(self._accumulating, state, source, mask))

        def body(index: jax.Array, table: jax.Array) -> jax.Array:
            row = layout.row(self._accumulating(state, source, mask, index))
            return table.at[index].set(row)

        table = jnp.zeros((source.capacity, layout.width), jnp.uint32)
        return _Table(jax.lax.fori_loop(0, num_steps, body, table), layout)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Table:
    """The packed metrics of several batches, with their layout as static data.

    Args:
        rows: uint32 `[capacity, width]`.
        layout: layout of a row.
    """

    rows: jax.Array
    layout: MetricLayout = field(metadata={"static": True})


def _merge_waiting(
    total: dict[str, Metric] | None, waiting: list[tuple[int, dict[str, Metric] | _Table]]
) -> dict[str, Metric] | None:
    for num_rows, each in waiting:
        if isinstance(each, _Table):
            rows = np.asarray(_readable(each.rows))[:num_rows]
            fetched = metrics_lib.merge_rows(each.layout.metrics(rows))
        else:
            fetched = metrics_lib.to_host(_readable(each))
        total = fetched if total is None else metrics_lib.merge(total, fetched)
    return total


def _readable(tree: PyTree) -> PyTree:
    return tree if jax.process_count() == 1 else whole(tree)


class Padding:
    """Decides whether a batch may be padded: only if a function treats examples separately.

    Padding repeats the last example. It would change the outputs of a function that mixes examples,
    such as a contrastive loss, or uses the batch size. This is determined from the jaxpr of the
    function, once per combination of argument shapes and dtypes.

    Args:
        execution: traces the function; without a trace, batches are not padded.
        function: `(state, batch) -> outputs`, each `[batch, ...]`. Raises MaskError if an output
            has another shape.
    """

    def __init__(self, execution: Execution, function: Callable[[Any, Batch], PyTree]) -> None:
        self._execution, self._function = execution, function
        self._known: dict[Any, bool] = {}

    def of(self, state: PyTree) -> MayPad:
        """Returns a function that decides which batches may be padded for a state."""
        spec = example_spec(state, axes=0)

        def may_pad(source: ChunkData) -> bool:
            key = spec, type(source), example_spec(source, axes=0)
            if key not in self._known:
                self._known[key] = self._trace_rows(state, source)
            return self._known[key]

        return may_pad

    def _trace_rows(self, state: PyTree, source: ChunkData) -> bool:
        batch = jax.eval_shape(lambda each: each.batch(0), source)
        if not has_rows(batch):
            return False

        def trace(state: PyTree, batch: Batch) -> Any:
            return self._execution.jaxpr(self._function, state, batch)

        try:
            return keeps_apart(trace, state, batch)
        except MaskError:
            return False


class Full(NamedTuple):
    """The largest batch so far with examples of these shapes.

    Attributes:
        size: its number of examples.
        may_pad: whether smaller batches may be padded to this size.
    """

    size: int
    may_pad: bool


class Sizes:
    """The largest batches of one pass over a data set, by the shapes of their examples."""

    def __init__(self, may_pad: MayPad) -> None:
        self._may_pad = may_pad
        self._full: dict[Any, Full] = {}

    def full(self, spec: Any, size: int, source: Callable[[], ChunkData]) -> Full:
        """Returns the largest batch so far, this one included.

        Args:
            spec: see `example_spec`.
            size: number of examples in the batch.
            source: returns the data of the batch.
        """
        full = self._full.get(spec)
        if full is None or full.size < size:
            full = self._full[spec] = Full(size, self._may_pad(source()))
        return full


def predict(
    predict_step: Callable[[TrainState, Batch], PyTree],
    state: TrainState,
    batches: Iterable[Batch],
    execution: Execution | None = None,
) -> PyTree:
    """Gathers a model's outputs over a loader, in order, on the host.

    Args:
        predict_step: `(state, batch) -> outputs`, each output `[batch, ...]`.
        state: the state to predict with; not changed.
        batches: one pass over a data set. A batch smaller than an earlier one is padded to its
            size, if each output depends on its own example only; the padding is removed again.
        execution: traces the step; compiled by default.

    Returns:
        The outputs as NumPy arrays `[examples, ...]`, in the structure of one batch's outputs.

    Raises:
        BatchError: there are no batches, an output has no batch axis, or its other axes differ
            between batches.
    """
    execution = execution or Compiled()
    may_pad, place = Padding(execution, predict_step).of(state), execution.placement.batch
    full_sizes: dict[Any, int] = {}
    gathered: list[tuple[PyTree, int, int]] = []
    for batch in batches:
        size, spec = num_examples(batch), example_spec(batch)
        full_size = full_sizes[spec] = max(size, full_sizes.get(spec, 0))
        is_short = size < full_size and has_rows(batch)
        padded = pad(batch, full_size) if is_short else batch
        if not is_short or not may_pad(One(padded)):
            padded, full_size = batch, size
        placed = padded if place is None else place(padded)
        gathered.append((predict_step(state, placed), size, full_size))
        if len(gathered) > _IN_FLIGHT:
            late = len(gathered) - _IN_FLIGHT - 1
            gathered[late] = _fetch(*gathered[late])
    if not gathered:
        raise BatchError("A prediction needs at least one batch, but the loader is empty.")
    parts = [_fetch(*entry)[0] for entry in gathered]
    return jax.tree.map_with_path(_join, *parts)


def _join(path: tuple[Any, ...], *leaves: np.ndarray) -> np.ndarray:
    shapes = {leaf.shape[1:] for leaf in leaves}
    if len(shapes) > 1:
        name = f" {leaf_name(path)!r}" if path else ""
        raise BatchError(
            f"The outputs of a prediction must have one shape for all examples; the output{name} "
            f"has the shapes {sorted(shapes)} after the batch axis. Pad the examples to one length "
            "with data.bucketed(examples, [length], ...), or predict each length separately."
        )
    return np.concatenate(leaves)


def _fetch(outputs: PyTree, size: int, padded_size: int) -> tuple[PyTree, int, int]:
    shapes = {leaf_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(outputs)}
    if not shapes or any(shape[:1] != (padded_size,) for shape in shapes.values()):
        raise BatchError(
            f"Each array of a prediction must have one entry per example ({padded_size}); got the "
            f"shapes {shapes}. Return arrays [batch, ...]."
        )
    kept = jax.tree.map(lambda leaf: leaf[:size], to_host(outputs))
    return kept, size, size


def has_rows(batch: Batch) -> bool:
    """Returns whether each array of a batch has one row per example."""
    return {leaf.shape[:1] for leaf in jax.tree.leaves(batch)} == {(num_examples(batch),)}


def example_spec(tree: PyTree, *, axes: int = 1) -> Any:
    """Returns the structure, shapes and dtypes of an example, equal for batches of any size.

    Args:
        tree: a pytree of arrays.
        axes: number of leading axes to drop from the shapes.
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape[axes:], leaf.dtype) for leaf in leaves)
