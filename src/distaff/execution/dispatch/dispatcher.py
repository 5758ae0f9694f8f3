"""Dispatcher: runs the steps of a run as programs of one step or of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.config.cadence import Cadence
from distaff.core.config.options import at_least, check_choice, option
from distaff.core.typing import Batch, PyTree
from distaff.data import num_examples
from distaff.errors import ConfigError, MetricError
from distaff.execution.compile.recompiles import Watch
from distaff.execution.dispatch.packed_metrics import MetricLayout, MetricTable, blank
from distaff.execution.dispatch.repetition import RepeatsSteps, repeated
from distaff.execution.dispatch.steps_per_call import Expected, FusionChoice, choose_fusion
from distaff.execution.execution import Execution, ExecutionOptions
from distaff.execution.feed.chunk import Chunk, ChunkData, ChunkSize, One
from distaff.execution.flops import Flops, flops_of
from distaff.execution.placement import Placement
from distaff.execution.timers import Timers
from distaff.metrics import Metric, results
from distaff.step.normalise import StepFn, accumulating
from distaff.step.state import TrainState


def _steps_per_call(name: str, value: Any) -> Any:
    if isinstance(value, str):
        check_choice(name, value, Literal["auto", "measure"])
        return value
    return at_least(1)(name, value)


_LOG_EVERY = Cadence(
    ("steps",),
    number="steps",
    why="The metrics of an epoch are logged as train/... in any case.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchOptions(ExecutionOptions):
    """How the steps of a run are grouped into programs and log lines."""

    log_every_n_steps: int | str = option(
        50,
        'Steps per line of training metrics in the log: 50, or "50 steps".',
        check=_LOG_EVERY.check,
        resume="same run",
    )
    steps_per_call: int | Literal["auto", "measure"] = option(
        "auto",
        """Steps per program; more of them reduce the host's work. "auto" estimates a good number
        from the operations of a step and the shapes of its arrays, so that equal runs use equal
        numbers; on the CPU it is 1 for a model with convolutions. "measure" times single and fused
        steps before the first step, on a copy of the state, and keeps the faster. Both use 1 if a
        callback watches steps.""",
        check=_steps_per_call,
        resume="same run",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deterministic and self.steps_per_call == "measure":
            raise ConfigError(
                f"deterministic={self.deterministic!r} and steps_per_call='measure' contradict "
                "each other: a choice by the clock may round differently in the next run. Use "
                "steps_per_call='auto' or a number."
            )

    @property
    def log_every(self) -> int:
        """Steps per line of training metrics in the log."""
        return int(_LOG_EVERY.parse("log_every_n_steps", self.log_every_n_steps).count)

    def one_by_one(self) -> Self:
        """Returns these options with one step per call.

        Raises:
            ConfigError: the options require fused steps.
        """
        if self.steps_per_call not in (1, "auto"):
            raise ConfigError(
                f"steps_per_call={self.steps_per_call} fuses steps into one program, but each "
                "batch of data.OnPolicy depends on the previous step. Leave steps_per_call out."
            )
        return dataclasses.replace(self, steps_per_call=1)


def make_dispatcher(
    execution: Execution,
    step: StepFn,
    example: tuple[TrainState, Batch],
    config: DispatchOptions,
    expected: Expected,
    *,
    watched: bool,
    watch: Watch | None = None,
    own_step: StepFn | None = None,
) -> Dispatcher:
    """Creates the dispatcher of a run. Traces the step, and compiles nothing.

    Args:
        execution: creates the programs.
        step: a training step, as `normalise` returns it.
        example: a state and a batch with the shapes of the run.
        config: `steps_per_call`, `log_every_n_steps` and `debug` are used.
        expected: known facts about the run's batches.
        watched: whether to return the metrics of every step.
        watch: detects recompiles.
        own_step: the user's own program `(state, batch) -> (state, metrics)`, called for each step
            instead of `step`; None to compile `step`.

    Raises:
        MetricError: a metric cannot be used in training.
    """
    placement = execution.placement.alongside(example[1])
    step = placement.updating(step)
    _, metrics = execution.shapes(step, *example)
    for metric in metrics.values():
        if metric.refused_in_training:
            raise MetricError(metric.refused_in_training)
    forms = choose_fusion(
        1 if config.debug else config.steps_per_call,
        metrics,
        expected,
        watched=watched,
        jaxpr=lambda: jax.make_jaxpr(step)(*example),
    )
    watch = watch or Watch()
    dispatcher = Dispatcher(
        execution,
        step,
        metrics,
        forms=forms,
        log_every=config.log_every,
        watched=watched,
        watch=watch,
        placement=placement,
    )
    watch.expect(num_shapes=expected.num_shapes)
    dispatcher.example = jax.eval_shape(lambda *each: each, *example)
    dispatcher.own_step = own_step
    return dispatcher


def single(step: StepFn, layout: MetricLayout, *, watched: bool) -> Callable[..., Any]:
    """Returns a program of one step.

    Args:
        step: a training step, as `normalise` returns it.
        layout: layout of its metrics.
        watched: whether to return the metrics as well.

    Returns:
        `(state, table, source) -> (state, table, metrics)`: drops the first row of the table and
        appends the metrics as its last row. `metrics` is empty unless `watched`.
    """

    def program(
        state: TrainState, table: jax.Array, source: ChunkData
    ) -> tuple[TrainState, jax.Array, Any]:
        state, metrics = step(state, source.batch(0))
        table = jnp.concatenate([table[1:], layout.row(metrics)[None]])
        return state, table, metrics if watched else {}

    return program


def appending(layout: MetricLayout) -> Callable[..., Any]:
    """Returns a program that appends the metrics of the user's own step to a table.

    Args:
        layout: layout of the metrics of a step.

    Returns:
        `(table, metrics, examples) -> (table, metrics)`: converts the metrics to accumulators and
        appends them as the last row of the table. `examples` is any array `[batch]`.
    """

    def program(
        table: jax.Array, metrics: Mapping[str, Any], examples: jax.Array
    ) -> tuple[jax.Array, dict[str, Metric]]:
        measured = accumulating(metrics, len(examples))
        return jnp.concatenate([table[1:], layout.row(measured)[None]]), measured

    return program


def fused(step: StepFn, layout: MetricLayout, metrics: PyTree) -> Callable[..., Any]:
    """Returns one program of many steps. Their number is an argument, so partial chunks reuse it.

    Args:
        step: a training step, as `normalise` returns it.
        layout: layout of its metrics.
        metrics: the metrics of one step, or their shapes, to return the metrics of every step; an
            empty pytree to return none.

    Returns:
        `(state, source, num_steps) -> (state, table, metrics)`: row `i` of the table
        `[source.capacity, width]` has the metrics of step `i`; rows after the last step are
        undefined. If `num_steps` is an int rather than an array, it is part of the program.
    """

    def program(
        state: TrainState, source: ChunkData, num_steps: jax.Array | int
    ) -> tuple[TrainState, jax.Array, Any]:
        def body(index: jax.Array, carry: PyTree) -> PyTree:
            state, table, kept = carry
            state, measured = step(state, source.batch(index))
            if jax.tree.leaves(kept):
                kept = jax.tree.map(lambda rows, leaf: rows.at[index].set(leaf), kept, measured)
            return state, table.at[index].set(layout.row(measured)), kept

        table = jnp.zeros((source.capacity, layout.width), jnp.uint32)
        room = jax.tree.map(
            lambda leaf: jnp.zeros((source.capacity, *leaf.shape), leaf.dtype), metrics
        )
        return jax.lax.fori_loop(0, num_steps, body, (state, table, room))

    return program


class Dispatcher:
    """Runs chunks of steps as programs of one step or of many.

    Args:
        execution: creates the programs.
        step: the step, as `normalise` returns it.
        metrics: the metrics of one step, or their shapes.
        forms: the choice of steps per call; may be replaced before the first step.
        log_every: steps per window.
        watched: whether to return the metrics of every step.
        watch: detects recompiles.
        placement: devices of the state; by default the placement of `execution`.

    Attributes:
        example: shapes of a state and a batch; None if they are unknown.
        own_step: the user's own program of a step; None to use `step`.
        checks: decide which steps to repeat, to compare their bits.
        watch: detects recompiles.
    """

    example: tuple[TrainState, Batch] | None = None
    own_step: StepFn | None = None
    checks: Sequence[RepeatsSteps] = ()

    def __init__(
        self,
        execution: Execution,
        step: StepFn,
        metrics: Mapping[str, Metric],
        *,
        forms: FusionChoice,
        log_every: int,
        watched: bool = False,
        watch: Watch | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.layout, self.log_every, self.forms = MetricLayout(metrics), log_every, forms
        self.names = tuple(results(metrics))
        self.placement = placement or execution.placement
        rows = blank(self.layout.table_rows(log_every), self.layout.width)
        self.blank = MetricTable(0, 0, self.placement.replicated(rows), True)
        self.timers, self._watched, self._limit = Timers(), watched, InFlightLimit()
        kept, watch = metrics if watched else {}, watch or Watch()
        self._guard, self.watch = execution.guard, watch
        keeping = self.placement.keeping
        one = keeping(single(step, self.layout, watched=watched))
        self._one = execution.program(one, donate=0)
        loop = keeping(fused(step, self.layout, kept))
        many = execution.program(loop, donate=0)
        full = execution.program(lambda *each: loop(*each, each[1].capacity), donate=0)
        self._append = execution.program(appending(self.layout))
        self._single = watch.over(self._one, "the step", ("state", "table", "source"))
        self._fused = watch.over(many, "the fused steps", ("state", "source", "num_steps"))
        self._full = watch.over(full, "the fused steps of a full chunk", ("state", "source"))

    def __call__(
        self, state: TrainState, table: MetricTable, chunk: Chunk, step: int
    ) -> tuple[TrainState, MetricTable, list[Any]]:
        """Runs a chunk; returns once it is dispatched.

        Args:
            state: donated; placed by `placement.state`.
            table: the table of the previous chunk; `blank` for the first chunk.
            chunk: the batches.
            step: completed steps before this chunk.

        Returns:
            The new state; a table with the metrics of the new steps, and possibly of earlier ones;
            the metrics of each step, empty if steps are not watched.
        """
        outer = self.timers.turn_to("host")
        with self._guard():
            if self.checks and self.forms.measurement is None:
                state, table, metrics = self._checked(state, table, chunk, step)
            else:
                state, table, metrics = self._dispatch(state, table, chunk, step)
        self.timers.handed(table.rows)
        self.timers.turn_to(outer)
        self._limit.add(table.rows, chunk.num_bytes)
        return state, table, metrics

    def chunk_size(self) -> ChunkSize:
        """Returns the size of the next chunk."""
        return self.forms.chunk_size

    def flops(self) -> Flops | None:
        """Counts the FLOPs of one step; see `flops_of`."""
        if self.example is None:
            return None
        state, batch = self.example
        return flops_of(self._one, state, self.blank.rows, One(batch))

    def _checked(
        self, state: TrainState, table: MetricTable, chunk: Chunk, step: int
    ) -> tuple[TrainState, MetricTable, list[Any]]:
        """Runs a chunk, and repeats it if a check asks for that."""
        steps = range(step + 1, step + 1 + chunk.num_steps)
        due = [check for check in self.checks if check.must_repeat(steps)]
        if not due:
            return self._dispatch(state, table, chunk, step)

        def dispatch(copy: TrainState) -> tuple[TrainState, MetricTable, list[Any]]:
            return self._dispatch(copy, table, chunk, step)

        with self.timers.spent("callbacks"):
            return repeated(dispatch, state, self.layout, steps, [each.report for each in due])

    def _dispatch(
        self, state: TrainState, table: MetricTable, chunk: Chunk, step: int
    ) -> tuple[TrainState, MetricTable, list[Any]]:
        capacity = chunk.source.capacity
        if capacity > 1:
            is_full = self.forms.chunk_size.partial_capacity and chunk.num_steps == capacity
            end = () if is_full else (np.int32(chunk.num_steps),)
            program = self._full if is_full else self._fused
            state, rows, measured = program(state, chunk.source, *end)
            metrics = [_row(measured, row) for row in range(chunk.num_steps * self._watched)]
            return state, MetricTable(step, chunk.num_steps, rows, False), metrics
        is_full = table.num_rows in (0, len(table.rows))
        if is_full or not table.at_end or step % self.log_every == 0:
            table = self.blank._replace(first=step)
        if self.own_step is None:
            state, rows, measured = self._single(state, table.rows, chunk.source)
        else:
            batch = chunk.source.batch(0)
            state, metrics = self.own_step(state, batch)
            rows, measured = self._append(table.rows, metrics, np.empty(num_examples(batch), bool))
        table = MetricTable(table.first, table.num_rows + 1, rows, True)
        return state, table, [measured] * self._watched


def _row(tree: PyTree, row: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[row], tree)


MAX_CHUNKS = 8
"""Most chunks in flight: enough that a device is never idle. With about 50 or more, simulated CPU
devices may deadlock in their collectives."""

MAX_BYTES = 2**27
"""Approximate limit of bytes in flight; the chunk that exceeds it is still dispatched."""


class InFlightLimit:
    """Limits how far the host runs ahead of the device, as batches in flight occupy memory.

    Waits for the chunk dispatched half a limit ago, which nearly always has finished.
    """

    def __init__(self) -> None:
        self._marker: jax.Array | None = None
        self._chunks = self._bytes = 0

    def add(self, output: jax.Array, num_bytes: int) -> None:
        """Counts a chunk; waits if more than the limit would be in flight.

        Args:
            output: any output of its program that is not donated.
            num_bytes: memory in use until the program has run.
        """
        self._chunks += 1
        self._bytes += num_bytes
        if self._chunks < MAX_CHUNKS // 2 and self._bytes < MAX_BYTES // 2:
            return
        if self._marker is not None:
            self._marker.block_until_ready()
        self._marker, self._chunks, self._bytes = output, 0, 0
