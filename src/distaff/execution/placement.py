"""Placement: where the arrays of a run are, decided by one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Batch, PyTree
from distaff.step.state import strongly_typed

Place: TypeAlias = Callable[[PyTree], PyTree]
"""Starts to copy arrays to where programs read them, and does not wait for it."""


class Placement(Protocol):
    """Decides on which devices arrays are. Nothing else in the package names a device."""

    @property
    def gathers(self) -> bool:
        """Whether the arrays of a loader are resident, and programs gather their rows."""
        ...

    def alongside(self, batch: Batch) -> Placement:
        """Returns the placement of a run whose loader yields batches like this one."""
        ...

    def state(self, tree: PyTree) -> PyTree:
        """Returns a state where it is trained. Arrays that are there already are not copied."""
        ...

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns arrays whole on each device."""
        ...

    @property
    def batch(self) -> Place | None:
        """What places batches that are used once; None where programs take NumPy arrays."""
        ...

    def resident(self, tree: PyTree) -> PyTree:
        """Returns copies of arrays on the device, that stay there for many programs."""
        ...


class OneDevice:
    """Every array is where JAX puts it by default: on the first device."""

    @property
    def gathers(self) -> bool:
        """Whether the device is an accelerator: XLA on the CPU gathers row by row.

        There NumPy gathers while the device computes.
        """
        return jax.default_backend() != "cpu"

    def alongside(self, batch: Batch) -> Placement:
        """Returns this placement, or that of a loader which places its batches itself.

        Args:
            batch: like those of training. The first of its arrays that is committed to devices
                decides.
        """
        placed = [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array) and x.committed]
        if not placed:
            return self
        there = placed[0].sharding
        if isinstance(there, jax.sharding.NamedSharding):
            there = jax.sharding.NamedSharding(there.mesh, jax.sharding.PartitionSpec())
        return Alongside(there) if there.is_fully_replicated else self

    def state(self, tree: PyTree) -> PyTree:
        """Returns the state as it is."""
        return tree

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns arrays on the device."""
        return jax.device_put(tree)

    @property
    def batch(self) -> Place | None:
        """A copy to an accelerator; None on the CPU, whose programs take NumPy arrays."""
        return None if jax.default_backend() == "cpu" else jax.device_put

    def resident(self, tree: PyTree) -> PyTree:
        """Returns copies on the device, which share no memory with the host's arrays."""
        # `device_put` may take over the memory of a NumPy array, `may_alias=False` or not.
        return jax.tree.map(jnp.array, tree)


class Alongside(OneDevice):
    """The state is whole on each device that the loader has placed its batches on.

    A step returns its state where its arguments are: a state that was elsewhere before the first
    step would make it compile twice.

    Args:
        there: replicates over these devices.
    """

    def __init__(self, there: jax.sharding.Sharding) -> None:
        self._there = there

    def state(self, tree: PyTree) -> PyTree:
        """Returns the state on these devices; what is committed to others stays there."""

        def moved(leaf: Any) -> Any:
            is_placed = isinstance(leaf, jax.Array) and leaf.committed
            return leaf if is_placed else jax.device_put(leaf, self._there)

        return jax.tree.map(moved, tree)

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns arrays whole on each of these devices."""
        return jax.device_put(tree, self._there)


ONE_DEVICE = OneDevice()


def owned(tree: PyTree) -> PyTree:
    """Returns copies of arrays, each where it is in a buffer of its own: all can be donated.

    None of them is weakly typed; see `strongly_typed`.
    """

    def copied(leaf: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            leaf = jnp.asarray(np.array(leaf, jax.dtypes.canonicalize_dtype(np.result_type(leaf))))
        # Unlike `leaf.copy()`, this compiles no program for each shape.
        return jax.device_put(leaf, leaf.sharding if leaf.committed else None, may_alias=False)

    return strongly_typed(jax.tree.map(copied, tree))


def like(tree: PyTree, example: PyTree) -> PyTree:
    """Returns arrays that were read from somewhere on the devices of those they replace.

    JAX may place an array where it likes if it may place the one of the example. What is read from
    a file is committed to its device, and a program would compile again for that.

    Args:
        tree: JAX or NumPy arrays.
        example: of the same structure. A NumPy array asks for no device.
    """
    return jax.tree.map(_like, tree, example)


def _like(leaf: Any, example: Any) -> Any:
    if not isinstance(example, jax.Array):
        return leaf
    if isinstance(leaf, jax.Array) and (example.committed or not leaf.committed):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.device_put(np.asarray(jax.random.key_data(leaf)), may_alias=False)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    there = example.sharding if example.committed else None
    return jax.device_put(np.asarray(leaf), there, may_alias=False)


def to_host(tree: PyTree) -> PyTree:
    """Returns arrays as NumPy arrays; waits for them."""
    return jax.tree.map(np.asarray, tree)


def num_devices(batch: Batch) -> int:
    """Returns how many devices the arrays of a batch are on; 1 for arrays of the host."""
    arrays = [leaf for leaf in jax.tree.leaves(batch) if isinstance(leaf, jax.Array)]
    return max((len(array.sharding.device_set) for array in arrays), default=1)
