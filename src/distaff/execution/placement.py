"""Placement: decides on which devices the arrays of a run are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from distaff.core.typing import Batch, PyTree
from distaff.execution.shards import copied_parts, put, whole
from distaff.step.state import strongly_typed

Place: TypeAlias = Callable[[PyTree], PyTree]
"""Starts to copy arrays to the devices of the programs, without waiting."""


class Placement(Protocol):
    """Decides on which devices arrays are. No other object names a device."""

    @property
    def gathers(self) -> bool:
        """Whether a loader's arrays stay on the device, and programs gather rows from them."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether some of the devices belong to other processes."""
        ...

    @property
    def num_parts(self) -> int:
        """Number of devices over which each batch is split."""
        ...

    def alongside(self, batch: Batch) -> Placement:
        """Returns the placement for a run whose loader yields batches like this one."""
        ...

    def state(self, tree: PyTree) -> PyTree:
        """Returns a state on its training devices. Does not copy arrays already there."""
        ...

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns arrays replicated on every device."""
        ...

    @property
    def batch(self) -> Place | None:
        """Places batches that are used once; None if programs take NumPy arrays."""
        ...

    def resident(self, tree: PyTree) -> PyTree:
        """Returns copies of arrays on the device, to be used by many programs."""
        ...

    def name_axes(self, find: Callable[[], Mapping[str, Any]]) -> None:
        """Receives what finds the axis names of the parameters, before the first state is created.

        Args:
            find: returns the names by path of each parameter; creates no arrays.
        """
        ...

    def out_shardings(self, function: Callable[..., PyTree], *args: Any) -> PyTree | None:
        """Returns where a function that creates a state puts each array; None for the default."""
        ...

    def keeping(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Returns a function for programs, whose results stay where its arguments are."""
        ...

    def updating(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Returns `keeping(function)` for a function that computes with all arrays of a state.

        Apply it to a step, and `keeping` to a program that repeats the step.
        """
        ...

    def fetched(self, tree: PyTree) -> PyTree:
        """Returns arrays of a state with which any program can compute."""
        ...

    def check(self, params: PyTree) -> None:
        """Checks that the parameters can be placed."""
        ...

    def describe(self, batch: Batch) -> str:
        """Returns a line on the devices of a run; empty if there is nothing to say."""
        ...


class OneDevice:
    """Leaves every array on JAX's default device, the first one."""

    @property
    def gathers(self) -> bool:
        """Whether the device is an accelerator.

        XLA on the CPU gathers row by row, so NumPy gathers there while the device computes.
        """
        return jax.default_backend() != "cpu"

    @property
    def is_shared(self) -> bool:
        """Whether some of the devices belong to other processes."""
        return False

    @property
    def num_parts(self) -> int:
        """One: each device has the whole batch."""
        return 1

    def alongside(self, batch: Batch) -> Placement:
        """Returns this placement, or one that follows a loader's own placement.

        Args:
            batch: a training batch. Its first array committed to devices decides.
        """
        placed = [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array) and x.committed]
        if not placed:
            return self
        sharding = placed[0].sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return Alongside(sharding) if sharding.is_fully_replicated else self

    def state(self, tree: PyTree) -> PyTree:
        """Returns the state unchanged."""
        return tree

    def replicated(self, tree: PyTree) -> PyTree:
        """Copies arrays to the device."""
        return jax.device_put(tree)

    @property
    def batch(self) -> Place | None:
        """Copies to an accelerator; None on the CPU, whose programs take NumPy arrays."""
        return None if jax.default_backend() == "cpu" else jax.device_put

    def resident(self, tree: PyTree) -> PyTree:
        """Returns copies on the device that share no memory with the host's arrays."""
        # `device_put` may alias the memory of a NumPy array, even with `may_alias=False`.
        return copies(tree)

    def name_axes(self, find: Callable[[], Mapping[str, Any]]) -> None:
        """Does nothing: names do not matter on one device."""

    def out_shardings(self, function: Callable[..., PyTree], *args: Any) -> PyTree | None:
        """Returns None: arrays are created on the default device."""
        return None

    def keeping(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Returns the function itself."""
        return function

    def updating(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Returns the function itself."""
        return function

    def fetched(self, tree: PyTree) -> PyTree:
        """Returns the arrays themselves."""
        return tree

    def check(self, params: PyTree) -> None:
        """Does nothing: any array fits one device."""

    def describe(self, batch: Batch) -> str:
        """Returns a line about local devices that training leaves idle; see `idle_devices`."""
        return idle_devices(batch)


class Alongside(OneDevice):
    """Replicates the state over the devices on which the loader places its batches.

    A step returns its state on the devices of its arguments. A state placed elsewhere before the
    first step would make it compile twice.

    Args:
        sharding: replicates over these devices.
    """

    def __init__(self, sharding: jax.sharding.Sharding) -> None:
        self._sharding = sharding

    def state(self, tree: PyTree) -> PyTree:
        """Replicates the state over these devices, except arrays committed to others."""

        def place(leaf: Any) -> Any:
            is_placed = isinstance(leaf, jax.Array) and leaf.committed
            return leaf if is_placed else jax.device_put(leaf, self._sharding)

        return jax.tree.map(place, tree)

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns arrays replicated over these devices."""
        return jax.device_put(tree, self._sharding)


ONE_DEVICE = OneDevice()

_HIDING = {
    "cpu": "leave jax_num_cpu_devices and --xla_force_host_platform_device_count unset",
    "gpu": "set CUDA_VISIBLE_DEVICES=0, or ROCR_VISIBLE_DEVICES=0 for AMD,",
}


def copies(tree: PyTree) -> PyTree:
    """Returns copies of arrays on their devices, each in its own buffer: all can be donated."""

    def copy(leaf: Any) -> jax.Array:
        if isinstance(leaf, Tracer):  # of a plan: it has no buffer
            return leaf
        if not isinstance(leaf, jax.Array):
            # Unlike `jnp.asarray`, this compiles nothing.
            leaf = jax.device_put(
                np.array(leaf, jax.dtypes.canonicalize_dtype(np.result_type(leaf)))
            )
        if not leaf.is_fully_addressable:
            return copied_parts(leaf)
        # Unlike `leaf.copy()`, this does not compile a program per shape.
        return jax.device_put(leaf, leaf.sharding if leaf.committed else None, may_alias=False)

    return jax.tree.map(copy, tree)


def owned(tree: PyTree) -> PyTree:
    """Returns copies of arrays that can be donated, strongly typed; see `strongly_typed`."""
    return strongly_typed(copies(tree))


def like(tree: PyTree, example: PyTree) -> PyTree:
    """Returns arrays on the devices of the arrays they replace.

    If an array of the example is uncommitted, so is the result. Arrays read from a file would be
    committed to a device, and programs would compile again for them.

    Args:
        tree: JAX or NumPy arrays.
        example: arrays of the same structure. A NumPy array requires no device.
    """
    return jax.tree.map(_leaf_like, tree, example)


def _leaf_like(leaf: Any, example: Any) -> Any:
    if not isinstance(example, jax.Array):
        return leaf
    if isinstance(leaf, jax.Array) and _is_alongside(leaf, example):
        return leaf
    if not example.is_fully_addressable:
        return put(leaf, example.sharding)
    if example.committed:
        return jax.device_put(leaf, example.sharding, may_alias=False)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.device_put(np.asarray(jax.random.key_data(leaf)), may_alias=False)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(np.asarray(leaf), may_alias=False)


def _is_alongside(leaf: jax.Array, example: jax.Array) -> bool:
    """Returns whether an array is on the devices of another one."""
    if not example.committed:
        return not leaf.committed
    return leaf.committed and leaf.sharding.is_equivalent_to(example.sharding, leaf.ndim)


def to_host(tree: PyTree) -> PyTree:
    """Converts arrays to NumPy arrays; waits for them.

    Arrays of which this process holds only some values are gathered: every process must call this.
    """
    return jax.tree.map(np.asarray, whole(tree))


def unplaced(tree: PyTree) -> PyTree:
    """Returns shapes for arrays on a mesh, which would be part of a jaxpr."""

    def shape_of(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        is_on_mesh = is_array and not isinstance(leaf.sharding, jax.sharding.SingleDeviceSharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_on_mesh else leaf

    return jax.tree.map(shape_of, tree)


def num_devices(batch: Batch) -> int:
    """Returns the number of devices of a batch's arrays; 1 for arrays on the host."""
    arrays = [leaf for leaf in jax.tree.leaves(batch) if isinstance(leaf, jax.Array)]
    return max((len(array.sharding.device_set) for array in arrays), default=1)


def bytes_on_a_device(tree: PyTree) -> int:
    """Returns the bytes of arrays on the first device of each."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def idle_devices(batch: Batch) -> str:
    """Returns a line about local devices that training leaves idle; empty if all are used.

    Args:
        batch: a batch of the train loader. Steps run on the devices of its arrays: a loader may
            place them on several devices.
    """
    local, used = jax.local_devices(), num_devices(batch)
    if used >= len(local):
        return ""
    platform = local[0].platform
    hiding = _HIDING.get("gpu" if platform in ("cuda", "rocm") else platform, "")
    remedy = f" To hide the others, {hiding} before the program starts." if hiding else ""
    number = "One" if used == 1 else str(used)
    computes = "computes" if used == 1 else "compute"
    return f"{number} of {len(local)} local {platform} devices {computes}.{remedy}"
