"""`OnMesh`: the arrays of a run on the devices of a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distaff.core.typing import Batch, PyTree
from distaff.data.loader import num_examples
from distaff.errors import ConfigError
from distaff.execution.feed.chunk import Stacked
from distaff.execution.placement import OneDevice, Place, Placement
from distaff.execution.shards import put
from distaff.mesh.axis_names import Names
from distaff.mesh.config import BATCH_AXES, MeshConfig
from distaff.mesh.host_memory import HostMemory, fetched
from distaff.mesh.rules import ShardingRules
from distaff.step.state import TrainState


class OnMesh(OneDevice):
    """Splits batches, and large arrays of the state, over the devices of a mesh.

    Args:
        config: the mesh and its rules.
    """

    gathers = False

    def __init__(self, config: MeshConfig) -> None:
        mesh = config.mesh()
        self._config, self._rules, self._mesh = config, ShardingRules(config, mesh), mesh
        self._host_memory = HostMemory(config, mesh)
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._num_parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh, with the axes of `AXES`."""
        return self._mesh

    @property
    def is_shared(self) -> bool:
        """Whether some of the devices belong to other processes."""
        return not self._whole.is_fully_addressable

    @property
    def num_parts(self) -> int:
        """Number of devices over which each batch is split."""
        return self._num_parts

    def alongside(self, batch: Batch) -> Placement:
        """Returns this placement, if the batch divides.

        Raises:
            ConfigError: the number of examples in a batch does not divide over the devices.
        """
        size = num_examples(batch)
        if size % self._num_parts:
            more = size + -size % self._num_parts
            raise ConfigError(
                f"A batch of {size} examples does not divide over the {self._num_parts} devices "
                f"that split it ({self._shape(BATCH_AXES)}). Use a batch size such as {more}."
            )
        return self

    def state(self, tree: PyTree) -> PyTree:
        """Returns a state split by the rules. Does not copy arrays already in their place."""
        return jax.tree.map(_moved, tree, self._shardings(tree))

    def fetched(self, tree: PyTree) -> PyTree:
        """Returns arrays in the memory of their devices. Copies those in host memory."""
        return fetched(tree) if self._host_memory.is_on else tree

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns arrays replicated on every device."""
        return jax.tree.map(lambda leaf: put(leaf, self._whole), tree)

    @property
    def batch(self) -> Place:
        """Splits batches by their examples; arrays that do not divide are replicated."""
        return self._split

    def resident(self, tree: PyTree) -> PyTree:
        """Returns batches on the devices that share no memory with the host's arrays."""
        return self._split(jax.tree.map(np.array, tree))

    def name_axes(self, find: Callable[[], Names]) -> None:
        """Uses the names of the parameters' axes, if there are rules for them."""
        if self._config.axis_rules:
            self._rules = ShardingRules(self._config, self._mesh, find())

    def out_shardings(self, function: Callable[..., PyTree], *args: Any) -> PyTree:
        """Returns the shardings of a new state, which is then never whole on one device."""
        return self._shardings(jax.eval_shape(function, *args))

    def keeping(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Returns a function whose states are split by the rules, and other results replicated.

        A program whose results are where its arguments were does not compile again.
        """
        return self._constrained(function, self._host_memory.holds)

    def updating(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Returns `keeping(function)`, which computes with arrays that are in host memory."""
        near, host = self._constrained(function, None), self._host_memory

        @functools.wraps(function)
        def run(*args: Any) -> PyTree:
            return host.moved(
                near(*host.moved(args, jax.memory.Space.Device)), jax.memory.Space.Host
            )

        return run if host.is_on else near

    def _constrained(
        self, function: Callable[..., PyTree], but: Callable[..., bool] | None
    ) -> Callable[..., PyTree]:
        """Constrains results to their shardings, except the arrays of a state that `but` is for."""

        def constrain_leaf(path: tuple[Any, ...], leaf: Any, place: NamedSharding) -> Any:
            is_left = but is not None and but(path, leaf)
            return leaf if is_left else jax.lax.with_sharding_constraint(leaf, place)

        def constrain(node: Any) -> Any:
            if not _is_state(node):
                return jax.lax.with_sharding_constraint(node, self._whole)
            return jax.tree.map_with_path(constrain_leaf, node, self._rules.shardings(node))

        @functools.wraps(function)
        def run(*args: Any) -> PyTree:
            return jax.tree.map(constrain, function(*args), is_leaf=_is_state)

        return function if self._mesh.size == 1 else run  # one device needs no constraint

    def _shardings(self, tree: PyTree) -> PyTree:
        places = self._rules.shardings(tree)
        return self._host_memory.shardings(tree, places) if _is_state(tree) else places

    def check(self, params: PyTree) -> None:
        """Checks the rules against the parameters.

        Raises:
            ConfigError: a rule does not fit, or too many bytes stay whole; see `MeshConfig`.
        """
        self._rules.check(params)

    def describe(self, batch: Batch) -> str:
        """Returns a line on the mesh."""
        devices = self._mesh.devices.flat
        line = f"{len(devices)} {devices[0].platform} devices: {self._shape(self._mesh.axis_names)}"
        return f"{line}, optimizer state in host memory" if self._host_memory.is_on else line

    def _shape(self, axes: tuple[str, ...]) -> str:
        sizes = {axis: self._mesh.shape[axis] for axis in axes}
        shown = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
        return ", ".join(shown) or "a mesh of one device"

    def _split(self, source: PyTree) -> PyTree:
        axis = int(isinstance(source, Stacked))
        before = (None,) * axis

        def place(leaf: Any) -> jax.Array:
            shape = np.shape(leaf)
            divides = len(shape) > axis and not shape[axis] % self._num_parts
            spec = PartitionSpec(*before, BATCH_AXES) if divides else PartitionSpec()
            return put(leaf, NamedSharding(self._mesh, spec))

        return jax.tree.map(place, source)


def _is_state(node: Any) -> bool:
    return isinstance(node, TrainState)


def _moved(leaf: Any, sharding: NamedSharding) -> jax.Array:
    is_array = isinstance(leaf, jax.Array) and leaf.committed  # else one device is equivalent
    if is_array and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    return put(leaf, sharding)
