"""The initial variables of a model, in the form that a state keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze

from distaff.errors import ConfigError
from distaff.models import LayerRow, Variables
from distaff.models.layers import listed


def normalized(variables: Any) -> Variables:
    """Returns variables as a state keeps them: dicts, opened boxes, arrays that a program may hold.

    A NumPy array of float64 or int64 becomes what JAX makes of it, as it does in the first step: so
    a checkpoint fits the model that it is of.

    Args:
        variables: `Variables`, or collections by name, as `module.init` of Flax Linen returns them.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(variables, Mapping) and ("params" in variables or not variables):
        variables = Variables.of(variables)
    if not isinstance(variables, Variables):
        raise ConfigError(
            "run_model_init returns distaff.models.Variables(params, ...), or the collections that "
            f"module.init returns, {{'params': ...}}; got {type(variables).__name__}."
        )
    thawed = Variables(*(unfreeze(x) if isinstance(x, FrozenDict) else x for x in variables))
    return jax.tree.map(_canonical, nn.unbox(thawed))


def _canonical(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    return jnp.asarray(np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)))


def on_host(function: Callable[..., Any], traced: Callable[..., Any], *args: Any) -> Any:
    """Returns what a function returns that computes with NumPy on its way, and cannot be traced.

    Args:
        function: called where `traced` fails for that reason.
        traced: the function as a program.
        *args: arguments of both.
    """
    try:
        return traced(*args)
    except jax.errors.JAXTypeError:
        return function(*args)


def rows_of(variables: Variables, kind: str) -> list[LayerRow]:
    """Returns the rows of a model that cannot be called: its arrays, and no more.

    Args:
        variables: its arrays, or their shapes.
        kind: the name of its class.
    """
    return listed(variables, {(): kind}, {(): ""}, {})
