"""A float32 copy of parameters that are stored in half precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.optim.transforms.extra_args import with_description, with_known_args


class MasterCopyState(NamedTuple):
    """The state of an optimizer with a copy of the parameters.

    Attributes:
        params: the parameters in float32; those that are not in half precision as they are.
        inner: the state of the optimizer itself.
    """

    params: Params
    inner: PyTree


def with_master_copy(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that it updates a float32 copy of parameters in half precision.

    The parameters are the copy, rounded: an update that is too small for them adds up in the copy.
    In bfloat16 alone, an update of 1e-3 on a weight of 1 would be lost. The optimizer gets the
    gradients and the parameters in float32. A parameter that was changed since its last update,
    such as by loading weights, replaces its copy. Micikevicius et al. 2018, arXiv:1710.03740.

    Args:
        tx: any Optax optimizer.

    Returns:
        The optimizer; its state is a `MasterCopyState`.
    """
    inner = with_known_args(tx)

    def init(params: Params) -> MasterCopyState:
        # A copy, because both it and the parameters are donated.
        copy = jax.tree.map(jnp.array, widened(params))
        return MasterCopyState(copy, inner.init(copy))

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, MasterCopyState]:
        if "grad" in extra_args:
            extra_args["grad"] = widened(extra_args["grad"])
        before = jax.tree.map(_copy_of, params, state.params)
        changes, inner_state = inner.update(widened(updates), state.inner, before, **extra_args)
        copy = optax.apply_updates(before, changes)
        rounded = jax.tree.map(_change, params, copy, changes)
        return rounded, MasterCopyState(copy, inner_state)

    return with_description(optax.GradientTransformationExtraArgs(init, update), tx)


def widened(tree: PyTree) -> PyTree:
    """Returns a tree whose arrays of bfloat16 and float16 are in float32; others unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_half(x) else x, tree)


def _is_half(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 2


def _copy_of(param: jax.Array, copy: jax.Array) -> jax.Array:
    """Returns the copy of a parameter; the parameter itself if it was changed elsewhere."""
    return jnp.where(copy.astype(param.dtype) == param, copy, param.astype(copy.dtype))


def _change(param: jax.Array, copy: jax.Array, change: jax.Array) -> jax.Array:
    """Returns the update after which a parameter is its copy, rounded."""
    if not _is_half(param):
        return change
    target, before = (x.astype(param.dtype).astype(jnp.float32) for x in (copy, param))
    # -0.0 + 0.0 is 0.0, but x + -0.0 is x for every x.
    return jnp.where(target == before, -0.0, target - before)
