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
from distaff.execution.placement import copies, like
from distaff.metrics import Metric, Sum
from distaff.metrics.accumulators import aligned
from distaff.step.finite import all_finite, are_near, finite_rows
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState
from distaff.tune.population.varied import Varied, state_in, with_arrays

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

    def state(self, index: int) -> TrainState:
        """Returns the present state of a member. Training on may free its arrays."""
        ...

    def is_finite(self, index: int) -> bool:
        """Whether all parameters of a member are finite."""
        ...

    def keep(self, which: Sequence[int]) -> None:
        """Keeps the present states of some members, instead of those kept before."""
        ...

    def kept(self, index: int) -> TrainState:
        """Returns the state that was kept of a member."""
        ...

    def arrays(self) -> dict[str, PyTree]:
        """Returns arrays `[members, ...]`: `members` of all states, and `best` of the kept ones.

        The state of each member must have been kept. Training on may free the arrays.
        """
        ...

    def restore(self, arrays: Mapping[str, PyTree]) -> None:
        """Replaces the arrays of all states by some that `arrays` has returned."""
        ...

    def replace(self, states: Sequence[PyTree]) -> None:
        """Replaces the members by others, which the same programs train."""
        ...

    def exchange(self, sources: Sequence[int], values: Sequence[Mapping[str, Any]]) -> None:
        """Gives each member the state of another, or its own, and other traced values.

        Args:
            sources: for each member, the index of the one whose state it gets. Its random key
                stays.
            values: for each member, its values.
        """
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
        self.dispatcher, self._execution = dispatcher, execution
        self._states: list[Any] = list(states)
        self._kept: dict[int, TrainState] = {}
        self._programs: dict[Any, Any] = {}

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

    def state(self, index: int) -> TrainState:
        """Returns the state of a member; its next step donates it."""
        return state_in(self._states[index])

    def is_finite(self, index: int) -> bool:
        """Whether all parameters of a member are finite."""
        return all_finite(self.state(index).params)

    def keep(self, which: Sequence[int]) -> None:
        """Keeps copies of the present states of some members."""
        self._kept.update((index, copies(self.state(index))) for index in which)

    def kept(self, index: int) -> TrainState:
        """Returns the state that was kept of a member."""
        return self._kept[index]

    def arrays(self) -> dict[str, PyTree]:
        """Returns copies of all states and of the kept ones, on the host."""
        indices = range(len(self._states))
        return {
            "members": joined([self.state(index).arrays() for index in indices]),
            "best": joined([self._kept[index].arrays() for index in indices]),
        }

    def restore(self, arrays: Mapping[str, PyTree]) -> None:
        """Gives each member its own arrays."""
        for index, state in enumerate(self._states):
            own = state_in(state).arrays()
            found = {name: like(row(each, index), own) for name, each in arrays.items()}
            self._states[index] = with_arrays(state, found["members"])
            self._kept[index] = state_in(state).replace(**found["best"])

    def replace(self, states: Sequence[PyTree]) -> None:
        """Replaces the members by any number of others."""
        self._states, self._kept = list(states), {}

    def exchange(self, sources: Sequence[int], values: Sequence[Mapping[str, Any]]) -> None:
        """Gives each member a copy of the state of another, or its own, and other values."""
        own = [state_in(each) for each in self._states]
        found = [own[n] if n == source else copies(own[source]) for n, source in enumerate(sources)]
        states = [x.replace(rng=before.rng) for x, before in zip(found, own, strict=True)]
        triples = zip(self._states, states, values, strict=True)
        self._states = [_exchanged(*each) for each in triples]


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
        self.dispatcher, self._execution = dispatcher, execution
        self._num = self._room = len(states)
        self._width = dispatcher.layout.width // len(states)
        self._state: Any = _stacked_states(states)
        self._best: TrainState | None = None
        self._finite: np.ndarray | None = None
        self._replace = execution.program(replaced, donate=0)
        self._programs: dict[Any, Any] = {}

    def example(self) -> PyTree:
        """Returns the stacked states."""
        return self._state

    @property
    def states(self) -> TrainState:
        """The states of all members; training on may free the arrays."""
        return state_in(self._state)

    @property
    def best(self) -> TrainState:
        """The kept states of all members; `keep` may free the arrays."""
        assert self._best is not None
        return self._best

    def begin_epoch(self) -> None:
        """Begins a new table of metrics."""
        self._table = self.dispatcher.blank

    def train(self, chunk: Chunk, step: int, running: Sequence[int]) -> Iterator[MetricTable]:
        """Trains all members, and yields the metrics of those that are running."""
        self._state, table, _ = self.dispatcher(self._state, self._table, chunk, step)
        self._table, self._finite = table, None
        for index in running:
            columns: Any = _Columns(table.rows, index * self._width, (index + 1) * self._width)
            yield table._replace(rows=columns)

    def apply(self, function: Callable[[PyTree], PyTree], running: Sequence[int]) -> None:
        """Replaces the states of all members; that of one that has ended is no longer read."""
        if function not in self._programs:
            self._programs[function] = self._execution.program(jax.vmap(function), donate=0)
        self._state, self._finite = self._programs[function](self._state), None

    def state(self, index: int) -> TrainState:
        """Returns a copy of the state of a member."""
        return like(row(self.states, index), self.states)

    def is_finite(self, index: int) -> bool:
        """Whether all parameters of a member are finite; found for all members at once."""
        if self._finite is None:
            self._finite = finite_rows(self.states.params)
        return bool(self._finite[index])

    def keep(self, which: Sequence[int]) -> None:
        """Keeps the present states of some members, in one program."""
        if self._best is None:
            self._best = copies(self.states)
        elif which:
            mask = np.isin(np.arange(self._room), which)
            is_near = are_near(jax.tree.leaves(self.states))
            replace = replaced_on_host if is_near else self._replace
            self._best = replace(self._best, self.states, mask)

    def kept(self, index: int) -> TrainState:
        """Returns a copy of the state that was kept of a member."""
        return like(row(self.best, index), self.states)

    def arrays(self) -> dict[str, PyTree]:
        """Returns the arrays of the stacked states."""
        arrays = {"members": self.states.arrays(), "best": self.best.arrays()}
        return arrays if self._num == self._room else row(arrays, np.arange(self._num))

    def restore(self, arrays: Mapping[str, PyTree]) -> None:
        """Replaces the arrays of the stacked states."""
        if self._num < self._room:
            arrays = row(arrays, np.minimum(np.arange(self._room), self._num - 1))
        own = self.states.arrays()
        self._state = with_arrays(self._state, like(arrays["members"], own))
        self._best, self._finite = self.states.replace(**arrays["best"]), None

    def replace(self, states: Sequence[PyTree]) -> None:
        """Replaces the members by others, at most as many as at first.

        If there are fewer, copies of the last one fill the program.
        """
        self._num = len(states)
        rest = [states[-1]] * (self._room - self._num)
        self._state = _stacked_states([*states, *rest])
        self._best = self._finite = None

    def exchange(self, sources: Sequence[int], values: Sequence[Mapping[str, Any]]) -> None:
        """Gathers the states of the members in one program, and replaces their values."""
        if gathered not in self._programs:
            self._programs[gathered] = self._execution.program(gathered, donate=0)
        rest = range(self._num, self._room)
        states = self._programs[gathered](self.states, np.array([*sources, *rest], np.int32))
        found = [*values, *[values[-1]] * len(rest)]
        self._state, self._finite = _exchanged(self._state, states, stack(*found)), None


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


def _stacked_states(states: Sequence[PyTree]) -> PyTree:
    """Returns the states of all members as one, on the device of the first one."""
    found = like(joined(states), states[0])
    if not isinstance(found, Varied):
        return found
    # The values are weakly typed, which NumPy arrays are not.
    return found._replace(values=stack(*(each.values for each in states)))


def joined(trees: Sequence[PyTree]) -> PyTree:
    """Returns the trees of all members as one, with NumPy arrays `[members, ...]`."""
    return jax.tree.map(lambda *leaves: _of_host(np.stack, *leaves), *trees)


def row(tree: PyTree, index: int | np.ndarray) -> PyTree:
    """Returns the tree of one member, or of several, from arrays `[members, ...]`, in NumPy."""
    return jax.tree.map(
        lambda leaf: _of_host(lambda leaves: np.array(leaves[0][index]), leaf), tree
    )


def _of_host(function: Callable[[list[np.ndarray]], np.ndarray], *leaves: jax.Array) -> Any:
    """Returns a function of arrays on the host, which compiles nothing; keys stay keys."""
    first = leaves[0]
    if not jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
        return function([np.asarray(leaf) for leaf in leaves])
    bits = [jax.random.key_data(leaf) for leaf in leaves]
    found = like(function([np.asarray(each) for each in bits]), bits[0])
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(first))


def _exchanged(member: Any, state: TrainState, values: Mapping[str, Any]) -> Any:
    """Returns a member with another state and other values, if it has any."""
    return Varied(values, state) if isinstance(member, Varied) else state


def gathered(states: TrainState, sources: jax.Array) -> TrainState:
    """Returns the states of some members, `[members]`, each with the random key of its place."""
    found = jax.tree.map(lambda leaf: leaf[sources], states)
    return found.replace(rng=states.rng)


def replaced(old: PyTree, new: PyTree, mask: jax.Array) -> PyTree:
    """Returns arrays `[members, ...]` with the new values where `mask` `[members]` is true."""
    return jax.tree.map(lambda *pair: jnp.where(aligned(mask, pair[0]), *pair[::-1]), old, new)


def replaced_on_host(old: PyTree, new: PyTree, mask: np.ndarray) -> PyTree:
    """Returns what `replaced` returns, as NumPy arrays."""

    def chosen(pair: list[np.ndarray]) -> np.ndarray:
        return np.where(aligned(mask, pair[0]), *pair[::-1])

    return jax.tree.map(lambda *pair: _of_host(chosen, *pair), old, new)


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
