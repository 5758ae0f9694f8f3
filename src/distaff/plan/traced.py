"""Traces the training step of a trainer from shapes: no array is ever created."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from distaff.core.typing import Batch, PyTree
from distaff.errors import ConfigError, leaf_name
from distaff.mesh import MeshConfig
from distaff.mesh.config import mesh_of
from distaff.mesh.planned import Planned, planning
from distaff.mesh.shapes import OnlyTraced, ShapesOnMesh
from distaff.plan.result import Parameter
from distaff.run.display import NullDisplay
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule
from distaff.trainer.preparation import Preparation


class TracedStep(NamedTuple):
    """A training step that is traced for the devices of a mesh.

    Attributes:
        mesh: the mesh.
        config: its rules.
        state: the shapes of the state, with their shardings.
        batch: the shapes of a batch, with their shardings.
        traced: the step; `traced.lower().compile()` compiles it.
    """

    mesh: jax.sharding.Mesh
    config: MeshConfig
    state: TrainState
    batch: Batch
    traced: Any


def traced_step(
    trainer: TrainerModule, batch: Batch, devices: Sequence[Any], steps: tuple[int, int]
) -> TracedStep:
    """Traces the training step of a copy of a trainer, with everything that its options add.

    Args:
        trainer: the trainer; it is not changed.
        batch: shapes of a training batch.
        devices: the devices of its mesh; without a mesh it uses the first one.
        steps: the steps of the run, and of an epoch.

    Raises:
        DistaffError: the mesh, the batch or an option does not fit.
    """
    option = trainer.config.mesh
    config = MeshConfig(1, pin=False) if option is None else mesh_of(option)
    used = devices if option is not None else devices[:1]
    with planning(Planned(used, _refuse)):
        other = trainer.variant(
            loggers=(), callbacks=(), root=None, init_from=None, debug=False, mesh=config
        )
        here, placement = other._workspace, ShapesOnMesh(config)
        here.execution, here.display, here.explains = OnlyTraced(placement), NullDisplay(), False

        def begin(batch: Batch) -> TrainState:
            preparation = Preparation(other, TrainerModule)
            preparation.set_up_alone(batch, None)
            preparation.init_optimizer(*steps)
            state, here.state = here.ready_state(), None
            return state

        placement.alongside(batch)
        state = _shapes(begin, batch)
        here.counted.count(state, batch)
        state, batch = placement.placed_state(state), placement.placed_batch(batch)
        step = jax.jit(placement.updating(here.measured_step), donate_argnums=0)
        return TracedStep(placement.mesh, config, state, batch, step.trace(state, batch))


def shapes_of(batch: Batch, num_examples: int | None, found: int) -> Batch:
    """Returns the shapes of a batch, with another number of examples if it is given.

    Args:
        batch: a batch of arrays.
        num_examples: the examples of the batch to plan; as in `batch` by default.
        found: the examples of `batch`.
    """

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(np.shape(leaf))
        dtype = getattr(leaf, "dtype", None) or np.result_type(leaf)
        if num_examples is not None and shape[:1] == (found,):
            shape = num_examples, *shape[1:]
        extended = jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
        return jax.ShapeDtypeStruct(
            shape, dtype if extended else jax.dtypes.canonicalize_dtype(dtype)
        )

    return jax.tree.map(shape_of, batch)


def parameters_of(params: PyTree) -> tuple[Parameter, ...]:
    """Returns the parameters of a traced state, the largest on a device first."""
    found = [
        Parameter(
            path=leaf_name(path),
            shape=tuple(leaf.shape),
            dtype=str(leaf.dtype),
            spec=_spec_text(leaf.sharding),
            device_bytes=device_bytes(leaf),
        )
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
    return tuple(sorted(found, key=lambda each: -each.device_bytes))


def _spec_text(sharding: NamedSharding) -> str:
    return str(tuple(sharding.spec)) if any(sharding.spec) else ""


def device_bytes(tree: PyTree) -> int:
    """Returns the bytes of traced arrays on each device."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _shapes(begin: Callable[[Batch], TrainState], batch: Batch) -> TrainState:
    try:
        return jax.eval_shape(begin, batch)
    except jax.errors.JAXTypeError as error:
        raise ConfigError(
            "The state of this trainer cannot be planned, because creating it needs values, not "
            f"shapes: {str(error).splitlines()[0]} Use initializers of JAX instead of NumPy."
        ) from error


def _refuse(trainer: Any, plan: Any) -> Any:
    raise ConfigError(
        "A training cannot start another training while it is planned. Plan that one by itself."
    )
