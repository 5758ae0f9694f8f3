"""Arrays on the devices of several processes: each process handles the parts on its own devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from distaff.core.typing import PyTree


def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Copies an array to devices, each of its parts by the process that has the device.

    Unlike `jax.device_put`, this does not make the processes compare their arrays.

    Args:
        leaf: the same in all processes; may also be an object with `shape` and an `__getitem__`
            that returns a part of the array.
        sharding: the devices, which may belong to several processes.
    """
    is_array = isinstance(leaf, jax.Array)
    if sharding.is_fully_addressable or (is_array and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    if is_array and _is_key(leaf):
        data = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    source = np.asarray(leaf) if is_array or not np.shape(leaf) else leaf
    return jax.make_array_from_callback(source.shape, sharding, lambda index: source[index])


def whole(tree: PyTree) -> PyTree:
    """Returns arrays that this process can read; the others are gathered, one at a time.

    If there are any of those, every process must call this.
    """

    def gather(leaf: Any) -> Any:
        return multihost_utils.process_allgather(leaf, tiled=True) if is_apart(leaf) else leaf

    return jax.tree.map(gather, tree)


def is_apart(leaf: Any) -> bool:
    """Returns whether other processes have values of an array that this process does not have."""
    is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    return not (is_here or leaf.is_fully_replicated)


def copied_parts(leaf: jax.Array) -> jax.Array:
    """Returns a copy of an array on the same devices; every process copies its own parts."""
    if _is_key(leaf):
        data = copied_parts(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    parts = [jax.device_put(x.data, may_alias=False) for x in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


@dataclasses.dataclass(frozen=True, eq=False)
class HostParts:
    """The parts of an array that are on devices of this process, in host memory.

    Attributes:
        shape: shape of the whole array.
        sharding: the devices.
        parts: each part and its device.
    """

    shape: tuple[int, ...]
    sharding: jax.sharding.Sharding
    parts: list[tuple[np.ndarray, jax.Device]]

    @classmethod
    def of(cls, leaf: jax.Array) -> HostParts:
        """Copies the parts of an array to the host."""
        parts = [(np.array(x.data), x.device) for x in leaf.addressable_shards]
        return cls(leaf.shape, leaf.sharding, parts)

    def restored(self) -> jax.Array:
        """Returns the array on its devices."""
        kind = self.sharding.memory_kind
        parts = [
            jax.device_put(np.array(part), SingleDeviceSharding(device, memory_kind=kind))
            for part, device in self.parts
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
