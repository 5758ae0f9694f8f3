"""The training step of a trainer with other options, traced from shapes and compiled."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from distaff.core.digest import program_digest
from distaff.core.typing import Batch
from distaff.execution.device_memory import is_out_of_memory, program_bytes
from distaff.execution.execution import Compiled
from distaff.mesh.config import mesh_of
from distaff.mesh.shapes import OnlyTraced, ShapesOnMesh, ShapesOnOneDevice, shape_of
from distaff.models import remat_of
from distaff.run.diagnosis.recomputed import check_recomputed
from distaff.run.display import NullDisplay
from distaff.step.state import TrainState
from distaff.trainer.initial import trained_model
from distaff.trainer.memory.rungs import Rung
from distaff.trainer.preparation import Preparation

_RANDOM = ("random_bits", "random_gamma")

_MANY_STEPS = 1_000_000, 1000
"""Steps of a run and of an epoch, so that every warm-up fits."""


class MeasuredStep:
    """The training step of a copy of a trainer, traced from shapes: no array is created.

    Args:
        trainer: the trainer; it is not changed.
        base: the class that it overrides.
        batch: a training batch.
        rung: options of the copy.

    Attributes:
        state: the shapes of the state.

    Raises:
        ConfigError: an option does not fit, or has no effect.
    """

    def __init__(self, trainer: Any, base: type, batch: Batch, rung: Rung) -> None:
        other = trainer.variant(loggers=(), callbacks=(), root=None, init_from=None, **rung.changes)
        self._here, self._other, self._base = other._workspace, other, base
        self._here.display, self._here.explains = NullDisplay(), False
        mesh = other.config.mesh
        self._placement = ShapesOnOneDevice() if mesh is None else ShapesOnMesh(mesh_of(mesh))
        self._placement.alongside(batch)
        self.state = self._shapes(batch, trainer._workspace.state)
        self._batch = jax.tree.map(shape_of, batch)
        if rung.remat is not None:
            remat = remat_of(other.config.remat)
            check_recomputed(self._here.plain_step, self.state, self._batch, remat)

    def _shapes(self, batch: Batch, state: TrainState | None) -> TrainState:
        here, preparation = self._here, Preparation(self._other, self._base)

        def begin(state: TrainState | None) -> TrainState:
            preparation.set_up_alone(batch, state)
            preparation.init_optimizer(*_MANY_STEPS)
            made, here.state = here.ready_state(), None
            here.counted.count(made, batch)
            return made

        if state is not None:
            apply_fn = trained_model(self._other.model, self._other.config).apply_fn
            members = dict.fromkeys(("opt_state", "tx", "guard", "averages"))
            state = jax.tree.map(shape_of, state.replace(apply_fn=apply_fn, **members))
        here.execution = OnlyTraced(self._placement)
        try:
            return jax.eval_shape(begin, state)
        except jax.errors.JAXTypeError:  # an initializer that needs values, such as NumPy's
            here.execution = Compiled()
            return jax.tree.map(shape_of, begin(None))

    def digest(self) -> str:
        """Returns a digest of the step, equal in every process and on any devices."""
        state, batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (self.state, self._batch)
        )
        return program_digest(self._here.measured_step, state, batch).whole

    @property
    def is_random(self) -> bool:
        """Whether the step draws random numbers, such as dropout masks."""
        return _draws(jax.make_jaxpr(self._here.measured_step)(self.state, self._batch))

    def peak_bytes(self) -> int | None:
        """Compiles the step; returns the bytes that it needs on each device.

        None if the compiler itself runs out of memory.
        """
        place = self._placement
        step = jax.jit(place.updating(self._here.measured_step), donate_argnums=0)
        try:
            lowered = step.lower(place.placed_state(self.state), place.placed_batch(self._batch))
            return program_bytes(lowered.compile())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None


def _draws(jaxpr: Any) -> bool:
    return any(
        each.primitive.name in _RANDOM or any(map(_draws, jaxprs_in_params(each.params)))
        for each in jaxpr.eqns
    )
