"""Normalizes the initial variables of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze

from distaff.core.seeds import folded
from distaff.core.typing import Batch, Key
from distaff.errors import ConfigError, StateError
from distaff.mesh import has_several_devices, pinned
from distaff.models import (
    LayerRow,
    Model,
    Variables,
    in_precision,
    rematerialized,
    standardized,
    stored,
)
from distaff.models.layers import layer_rows
from distaff.models.linen_collections import opened, recording_axis_names
from distaff.step.state import TrainState


def normalized(variables: Any) -> Variables:
    """Returns variables as a state holds them: dicts of unboxed arrays that JAX supports.

    NumPy arrays of float64 or int64 are converted as JAX would in the first step, so that a
    checkpoint fits its model.

    Args:
        variables: `Variables`, or collections by name, as returned by `module.init` of Flax Linen.

    Raises:
        ConfigError: `variables` has another type.
    """
    if isinstance(variables, Mapping) and ("params" in variables or not variables):
        variables = Variables.of(variables)
    if not isinstance(variables, Variables):
        raise ConfigError(
            "run_model_init must return distaff.models.Variables(params, ...), or the collections "
            f"of module.init, {{'params': ...}}; got {type(variables).__name__}."
        )
    thawed = Variables(*(unfreeze(x) if isinstance(x, FrozenDict) else x for x in variables))
    return jax.tree.map(_canonical, opened(thawed))


def _canonical(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    return jnp.asarray(np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)))


def trained_model(model: Model, config: Any) -> Model:
    """Returns a model whose passes follow the options of a trainer."""
    model = rematerialized(standardized(model, config.standardize), config.remat)
    on_mesh = has_several_devices(config)
    return in_precision(pinned(model, config), config.precision, on_mesh=on_mesh)


def on_host(function: Callable[..., Any], traced: Callable[..., Any], *args: Any) -> Any:
    """Returns `traced(*args)`, or `function(*args)` if that cannot be traced because of NumPy."""
    try:
        return traced(*args)
    except jax.errors.JAXTypeError:
        return function(*args)


def initial_state(trainer: Any, batch: Batch) -> TrainState:
    """Creates the initial state of a trainer on its devices, without an optimizer.

    Raises:
        ConfigError: the parameters do not fit the devices.
    """
    config, execution = trainer.config, trainer._workspace.execution
    name_axes(trainer, batch)
    init_key, root_key = execution.once(_two_keys)(folded(config.seed))
    variables = trainer._initial(batch, init_key)
    variables = variables._replace(params=stored(variables.params, config.precision))
    apply_fn = trained_model(trainer.model, config).apply_fn
    state = trainer.state_class.create(apply_fn=apply_fn, rng=root_key, **variables._asdict())
    execution.placement.check(state.params)
    return execution.placement.state(state)


def _two_keys(seed: Any) -> tuple[Key, Key]:
    first, second = jax.random.split(jax.random.key(seed))
    return first, second


def name_axes(trainer: Any, batch: Batch) -> None:
    """Gives the placement of a trainer what finds the axis names of the model's parameters."""

    def init(key: Key, batch: Batch) -> Any:
        return trainer._initial(batch, key)

    def find() -> dict[str, Any]:
        with recording_axis_names() as names:
            on_host(init, partial(jax.eval_shape, init), jax.random.key(0), batch)
        return names

    trainer._workspace.execution.placement.name_axes(find)


def rows_of(variables: Variables, kind: str) -> list[LayerRow]:
    """Returns the table rows of a model that cannot be called, with its arrays only."""
    return layer_rows(variables, {(): kind}, {(): ""}, {})


def traced_init(trainer: Any) -> Callable[[], Any]:
    """Returns a function that creates a model's variables from shapes, to see its modules.

    Raises:
        StateError: (when called) the trainer has no example batch.
    """

    def either(key: Key, batch: Batch) -> Any:
        try:
            return trainer.model.init(key, *trainer._initial_inputs(batch))
        except Exception:  # It has other inputs: `run_model_init` decides.
            return trainer.run_model_init(batch, key)

    def init() -> Any:
        batch = trainer._workspace.example_batch
        if batch is None:
            raise StateError(
                "The names of a Flax Linen model in PyTorch need an example batch. Pass "
                "example_batch=batch to the trainer."
            )
        return jax.eval_shape(either, jax.eval_shape(jax.random.key, 0), batch)

    return init
