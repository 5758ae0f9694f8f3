"""Repeats steps on copies of their state, and compares the results bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import PyTree
from distaff.errors import leaf_name
from distaff.execution.dispatch.packed_metrics import MetricLayout, MetricTable
from distaff.execution.placement import copies
from distaff.step.state import TrainState

_MAX_NAMES = 4
"""Most arrays that a message describes."""

Outcome: TypeAlias = tuple[TrainState, MetricTable, list[Any]]
"""What the dispatcher returns for a chunk of steps."""


class LeafDifference(NamedTuple):
    """How two executions differ in an array.

    Attributes:
        number: values that differ.
        size: values of the array.
        largest: the largest distance of two values; NaN if one of them is not finite.
    """

    number: int
    size: int
    largest: float

    def __str__(self) -> str:
        far = "not finite" if np.isnan(self.largest) else f"at most {self.largest:.3g} apart"
        return f"{self.number} of {self.size} values, {far}"


class BitDifference(NamedTuple):
    """How repeated steps differ.

    Attributes:
        steps: the steps, counted from 1.
        leaves: the arrays that differ, by path: of the state, and `metrics/...` of the steps.
        agrees: which execution a third one agrees with, 1 or 2; None for neither.
    """

    steps: range
    leaves: Mapping[str, LeafDifference]
    agrees: int | None

    def __str__(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        some = [f"{name} ({each})" for name, each in list(self.leaves.items())[:_MAX_NAMES]]
        left = len(self.leaves) - len(some)
        number = "1 array" if len(self.leaves) == 1 else f"{len(self.leaves)} arrays"
        third = {
            1: "A third execution agrees with the first.",
            2: "A third execution agrees with the second.",
            None: "A third execution agrees with neither.",
        }
        return (
            f"Two executions of {steps}, on the same state and batches, differ in {number}: "
            f"{', '.join(some)}{f', and {left} more' * (left > 0)}. {third[self.agrees]}"
        )


@runtime_checkable
class RepeatsSteps(Protocol):
    """Decides which steps to repeat, and what to do if their bits differ."""

    def must_repeat(self, steps: range) -> bool:
        """Whether to repeat these steps, counted from 1: one step or one program. Called once."""
        ...

    def report(self, difference: BitDifference) -> None:
        """Raises an error, or logs a warning, for steps whose results differ."""
        ...


def repeated(
    dispatch: Callable[[TrainState], Outcome],
    state: TrainState,
    layout: MetricLayout,
    steps: range,
    reports: Sequence[Callable[[BitDifference], None]],
) -> Outcome:
    """Runs steps twice, on copies of the state; returns the outcome that can be relied on.

    Waits for the device. Needs memory for two further states. If the results differ, runs the steps
    a third time, and returns what two of three executions agree on, or else the first.

    Args:
        dispatch: runs the steps, and donates the state.
        state: not changed, so that it survives an error of a report.
        layout: layout of the metrics of a step.
        steps: the steps.
        reports: called if the results differ.
    """
    first, second = dispatch(copies(state)), dispatch(copies(state))
    with jax.transfer_guard_device_to_host("allow"):  # one bool
        if not _differ(_leaves(first), _leaves(second)):
            return first
        found = [_on_host(each, layout) for each in (first, second)]
        third = _on_host(dispatch(copies(state)), layout)
        agrees = [number for number, each in enumerate(found, 1) if not differences(each, third)]
        difference = BitDifference(steps, differences(*found), next(iter(agrees), None))
        for report in reports:
            report(difference)
    return second if agrees == [2] else first


def differences(first: PyTree, second: PyTree) -> dict[str, LeafDifference]:
    """Returns how two trees of arrays on the host differ, by the path of the array.

    Args:
        first: NumPy arrays.
        second: arrays of the same structure, shapes and dtypes.
    """
    found = {}
    pairs = zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True)
    for (path, one), other in pairs:
        differ = np.any(_bytes(one) != _bytes(other), axis=-1)
        if number := int(differ.sum()):
            largest = _distance(one.reshape(-1)[differ], other.reshape(-1)[differ])
            found[leaf_name(path)] = LeafDifference(number, one.size, largest)
    return found


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    wide = np.complex128 if np.iscomplexobj(first) else np.float64
    with np.errstate(all="ignore"):
        return float(np.max(np.abs(first.astype(wide) - second.astype(wide))))


def _bytes(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of each value, uint8 `[size, itemsize]`."""
    flat = np.ascontiguousarray(array).reshape(-1, 1)
    return flat.view(np.uint8)


def _on_host(outcome: Outcome, layout: MetricLayout) -> dict[str, PyTree]:
    """Copies the arrays of an outcome to the host, by name."""
    state, table, _ = outcome
    metrics = jax.tree.map(np.asarray, layout.metrics(table.fetch()))
    return {
        **jax.tree.map(lambda leaf: np.asarray(_plain(leaf)), state.arrays()),
        "metrics": metrics,
    }


def _leaves(outcome: Outcome) -> list[jax.Array]:
    state, table, _ = outcome
    return [*jax.tree.leaves(state), table.rows]


@jax.jit
def _differ(first: Sequence[jax.Array], second: Sequence[jax.Array]) -> jax.Array:
    """Returns whether any bit differs: bool `[]`."""
    pairs = zip(first, second, strict=True)
    return jnp.stack([jnp.any(_bits(one) != _bits(other)) for one, other in pairs]).any()


def _bits(leaf: jax.Array) -> jax.Array:
    """Returns an array of integers or bools with the bits of an array."""
    leaf = _plain(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jax.lax.bitcast_convert_type(leaf, f"uint{jnp.finfo(leaf.dtype).bits}")


def _plain(leaf: jax.Array) -> jax.Array:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
