"""Shapes instead of arrays on the devices of a mesh, for programs that are compiled but not run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distaff.core.typing import Batch, PyTree
from distaff.execution.execution import Compiled
from distaff.execution.placement import OneDevice
from distaff.mesh.config import BATCH_AXES
from distaff.mesh.placement import OnMesh


class ShapesOnMesh(OnMesh):
    """Leaves shapes where they are."""

    def state(self, tree: PyTree) -> PyTree:
        """Returns the shapes."""
        return tree

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns the shapes."""
        return tree

    def placed_state(self, tree: PyTree) -> PyTree:
        """Returns the shapes of a state with their shardings."""
        places = self.out_shardings(lambda state: state, tree)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            places,
        )

    def placed_batch(self, batch: Batch) -> Batch:
        """Returns the shapes of a batch with their shardings."""

        def place(leaf: Any) -> jax.ShapeDtypeStruct:
            divides = bool(leaf.shape) and not leaf.shape[0] % self.num_parts
            spec = PartitionSpec(BATCH_AXES) if divides else PartitionSpec()
            sharding = NamedSharding(self.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place, batch)


class ShapesOnOneDevice(OneDevice):
    """Leaves shapes where they are: on the default device, or on the device of a batch."""

    def replicated(self, tree: PyTree) -> PyTree:
        """Returns the shapes."""
        return tree

    def placed_state(self, tree: PyTree) -> PyTree:
        """Returns the shapes."""
        return tree

    def placed_batch(self, batch: Batch) -> Batch:
        """Returns the shapes."""
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class OnlyTraced(Compiled):
    """Traces the programs that create a state."""

    def once(self, function: Callable[..., Any]) -> Any:
        """Returns `jax.jit(function)`."""
        return jax.jit(function)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array, or of a number, with the sharding of one that has a place."""
    dtype = getattr(leaf, "dtype", None) or np.result_type(leaf)
    if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    is_placed = isinstance(leaf, jax.Array) and leaf.committed
    sharding = leaf.sharding if is_placed else None
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)
