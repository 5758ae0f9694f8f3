"""The two forms in which the members of a population train: stacked, or in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch, PyTree
from distaff.execution.dispatch.dispatcher import Dispatcher
from distaff.execution.dispatch.packed_metrics import MetricLayout, MetricTable
from distaff.execution.execution import Execution
from distaff.execution.feed.chunk import Chunk
from distaff.execution.placement import copies
from distaff.metrics import Metric, Sum
from distaff.step.normalise import StepFn
from distaff.tune.population.settings import state_in, with_arrays

_ROWS = "members"


class Members(Protocol):
    """The states of all members, and the programs that train them."""

    form: str
    dispatcher: Dispatcher

    def example(self) -> PyTree:
        """Returns a state as the dispatcher trains it."""
        ...

    def begin_epoch(self) -> None:
        """Begins new tables of metrics."""
        ...

    def train(self, chunk: Chunk, step: int, running: Sequence[int]) -> Iterator[MetricTable]:
        """Trains on a chunk, and yields the metrics of each of the running members.

        Args:
            chunk: the batches.
            step: completed steps before this chunk.
            running: indices of the members that still train.
        """
        ...

    def apply(self, function: Callable[[PyTree], PyTree], running: Sequence[int]) -> None:
        """Replaces the states by `function(state)`; a function is compiled once."""
        ...

    def state(self, index: int) -> PyTree:
        """Returns the state of a member. Training on may free its arrays."""
        ...

    def kept(self, index: int) -> PyTree:
        """Returns the state of a member, whose arrays stay."""
        ...

    def arrays(self) -> dict[str, PyTree]:
        """Returns the arrays of all states, each `[members, ...]`. Training on may free them."""
        ...

    def restore(self, arrays: Mapping[str, PyTree]) -> None:
        """Replaces the arrays of all states by some that `arrays` has returned."""
        ...

    def replace(self, states: Sequence[PyTree]) -> None:
        """Replaces the members by others, which the same programs train."""
        ...


class MembersInTurn:
    """Trains one member after the other on each chunk, with the same program.

    A member has the bits of a run of its own, because its program is that of a run of its own.

    Args:
        execution: compiles functions of a state.
        dispatcher: runs the steps of one member.
        states: the states of the members; donated.
    """

    form = "in turn"

    def __init__(
        self, execution: Execution, dispatcher: Dispatcher, states: Sequence[PyTree]
    ) -> None:
        self.dispatcher, self._execution, self._states = dispatcher, execution, list(states)
        self._programs: dict[Any, Any] = {}
        self._stack = execution.program(lambda *trees: stack(*trees))
        self._take = execution.program(lambda trees, index: take(trees, index))

    def example(self) -> PyTree:
        """Returns the state of the first member."""
        return self._states[0]

    def begin_epoch(self) -> None:
        """Begins new tables of metrics."""
        self._tables = [self.dispatcher.blank] * len(self._states)

    def train(self, chunk: Chunk, step: int, running: Sequence[int]) -> Iterator[MetricTable]:
        """Trains each of the running members, and yields its metrics."""
        for index in running:
            state, table = self._states[index], self._tables[index]
            state, table, _ = self.dispatcher(state, table, chunk, step)
            self._states[index], self._tables[index] = state, table
        yield from (self._tables[index] for index in running)

    def apply(self, function: Callable[[PyTree], PyTree], running: Sequence[int]) -> None:
        """Replaces the states of the running members."""
        if function not in self._programs:
            self._programs[function] = self._execution.program(function, donate=0)
        for index in running:
            self._states[index] = self._programs[function](self._states[index])

    def state(self, index: int) -> PyTree:
        """Returns the state of a member; its next step donates it."""
        return self._states[index]

    def kept(self, index: int) -> PyTree:
        """Returns a copy of the state of a member."""
        return copies(self._states[index])

    def arrays(self) -> dict[str, PyTree]:
        """Returns copies of the arrays of all states."""
        return self._stack(*(state_in(each).arrays() for each in self._states))

    def restore(self, arrays: Mapping[str, PyTree]) -> None:
        """Gives each member its own arrays."""
        for index, state in enumerate(self._states):
            self._states[index] = with_arrays(state, self._take(arrays, np.int32(index)))

    def replace(self, states: Sequence[PyTree]) -> None:
        """Replaces the members by any number of others."""
        self._states = list(states)


class StackedMembers:
    """Trains all members in one program: each array of the state is `[members, ...]`.

    Within the step, a function sees one member, never the stack: `vmap` is around all of it.

    Args:
        execution: compiles functions of a state.
        dispatcher: runs the steps of `stacked`.
        states: the states of the members.
    """

    form = "stacked"

    def __init__(
        self, execution: Execution, dispatcher: Dispatcher, states: Sequence[PyTree]
    ) -> None:
        self.dispatcher, self._execution, self._num = dispatcher, execution, len(states)
        self._stack = execution.program(lambda *states: stack(*states))
        self._room, self._state = len(states), self._stack(*states)
        self._width = dispatcher.layout.width // len(states)
        self._take = execution.program(lambda trees, index: take(trees, index))
        self._programs: dict[Any, Any] = {}

    def example(self) -> PyTree:
        """Returns the stacked states."""
        return self._state

    def begin_epoch(self) -> None:
        """Begins a new table of metrics."""
        self._table = self.dispatcher.blank

    def train(self, chunk: Chunk, step: int, running: Sequence[int]) -> Iterator[MetricTable]:
        """Trains all members, and yields the metrics of those that are running."""
        self._state, table, _ = self.dispatcher(self._state, self._table, chunk, step)
        self._table = table
        for index in running:
            columns: Any = _Columns(table.rows, index * self._width, (index + 1) * self._width)
            yield table._replace(rows=columns)

    def apply(self, function: Callable[[PyTree], PyTree], running: Sequence[int]) -> None:
        """Replaces the states of all members; that of one that has ended is no longer read."""
        if function not in self._programs:
            self._programs[function] = self._execution.program(jax.vmap(function), donate=0)
        self._state = self._programs[function](self._state)

    def state(self, index: int) -> PyTree:
        """Returns a copy of the state of a member."""
        return self._take(self._state, np.int32(index))

    kept = state

    def arrays(self) -> dict[str, PyTree]:
        """Returns the arrays of the stacked states."""
        arrays = state_in(self._state).arrays()
        return arrays if self._num == self._room else self._take(arrays, np.arange(self._num))

    def restore(self, arrays: Mapping[str, PyTree]) -> None:
        """Replaces the arrays of the stacked states."""
        if self._num < self._room:
            arrays = self._take(arrays, np.minimum(np.arange(self._room), self._num - 1))
        self._state = with_arrays(self._state, arrays)

    def replace(self, states: Sequence[PyTree]) -> None:
        """Replaces the members by others, at most as many as at first.

        If there are fewer, copies of the last one fill the program.
        """
        self._num = len(states)
        rest = [states[-1]] * (self._room - self._num)
        self._state = self._stack(*states, *rest)


def stacked(step: StepFn, layout: MetricLayout) -> StepFn:
    """Returns the step of all members as one; the batch is shared.

    Args:
        step: the step of one member, as `normalise` returns it.
        layout: the layout of its metrics.

    Returns:
        A step whose metrics are the packed rows of all members, one after the other.
    """

    def step_of_all(states: PyTree, batch: Batch) -> tuple[PyTree, dict[str, Metric]]:
        states, metrics = jax.vmap(step, in_axes=(0, None))(states, batch)
        return states, {_ROWS: Sum(jax.vmap(layout.row)(metrics))}

    return step_of_all


def stack(*states: PyTree) -> PyTree:
    """Returns the states of all members as one, each array `[members, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def take(trees: PyTree, index: jax.Array | np.ndarray | np.int32) -> PyTree:
    """Returns the tree of one member, or of several, from arrays `[members, ...]`."""
    return jax.tree.map(lambda leaf: leaf[index], trees)


class _Columns:
    """Some columns of a table on the device, which is copied to the host once for all members."""

    def __init__(self, rows: jax.Array, start: int, end: int) -> None:
        self._rows, self._start, self._end = rows, start, end

    def __len__(self) -> int:
        return len(self._rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._rows)[:, self._start : self._end]

    def copy_to_host_async(self) -> None:
        self._rows.copy_to_host_async()
