"""Keeps large arrays of the optimizer and of averages in host memory between steps."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from distaff.core.typing import PyTree
from distaff.errors import ConfigError, leaf_name
from distaff.mesh.config import MeshConfig
from distaff.step.state import TrainState

_KIND = "pinned_host"
_MEMBERS = ("opt_state", "averages")


class HostMemory:
    """Decides which arrays of a state are in host memory, and moves them.

    An array in host memory has a type of its own in JAX, which programs do not compute with.

    Args:
        config: its `offload` turns this on, and arrays of at least `min_size` values move.
        mesh: the devices.

    Raises:
        ConfigError: the devices cannot use host memory.
    """

    def __init__(self, config: MeshConfig, mesh: jax.sharding.Mesh) -> None:
        self.is_on, self._min_size = config.offload is not None, config.min_size
        if self.is_on:
            _check(mesh.devices.flat[0])

    def holds(self, path: tuple[Any, ...], leaf: Any) -> bool:
        """Returns whether an array of a state is in host memory between steps."""
        if not self.is_on or leaf_name(path).partition("/")[0] not in _MEMBERS:
            return False
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return not is_key and math.prod(leaf.shape) >= self._min_size

    def shardings(self, state: PyTree, places: PyTree) -> PyTree:
        """Returns shardings of a state, with the memory of each array."""

        def one(path: tuple[Any, ...], leaf: Any, place: NamedSharding) -> NamedSharding:
            return place.with_memory_kind(_KIND) if self.holds(path, leaf) else place

        return jax.tree.map_with_path(one, state, places)

    def moved(self, tree: PyTree, space: jax.memory.Space) -> PyTree:
        """Returns a tree whose states have these arrays in a memory, also within a program."""

        def one(path: tuple[Any, ...], leaf: Any) -> Any:
            # To put an array where it is would commit an uncommitted one to the first device.
            is_there = jax.typeof(leaf).memory_space == space
            return leaf if is_there or not self.holds(path, leaf) else jax.device_put(leaf, space)

        def of_state(node: Any) -> Any:
            return jax.tree.map_with_path(one, node) if isinstance(node, TrainState) else node

        return jax.tree.map(of_state, tree, is_leaf=lambda node: isinstance(node, TrainState))


def fetched(tree: PyTree) -> PyTree:
    """Returns arrays in the memory of their devices. Copies those in host memory."""

    def one(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)  # of a plan
        is_far = is_array and leaf.sharding.memory_kind == _KIND
        return jax.device_put(leaf, jax.memory.Space.Device) if is_far else leaf

    return jax.tree.map(one, tree)


def _check(device: Any) -> None:
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _KIND not in kinds:
        raise ConfigError(
            f"offload='optimizer' of a MeshConfig needs memory of the kind {_KIND!r}, which JAX "
            f"does not offer for {device.platform} devices here; it has {kinds}. Leave offload "
            "out, or split the optimizer state by fsdp=-1."
        )
