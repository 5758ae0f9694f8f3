"""Moments of Adam in bfloat16."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError
from distaff.optim.transforms.extra_args import with_description, with_known_args

_MOMENTS = ("mu", "nu", "nu_max")


def with_half_moments(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that both of its Adam moments are stored in bfloat16.

    Updates are computed in float32. The moments are rounded stochastically: to the nearest number,
    the second moment could not decay, since a factor of 0.999 is lost in 8 bits. The random numbers
    depend on the number of updates alone.

    Args:
        tx: an Optax optimizer with the moments of Adam, such as adam, adamw, lamb or nadam.

    Returns:
        The optimizer, with the same states but for the dtype of the moments.

    Raises:
        ConfigError: from `init`, the optimizer has no such moments.
    """
    inner = with_known_args(tx)

    def init(params: Params) -> PyTree:
        state = inner.init(params)
        if not any(map(_has_moments, jax.tree.leaves(state, is_leaf=_has_moments))):
            raise ConfigError(
                "moments='bfloat16' needs an optimizer with the moments of Adam, such as adam, "
                "adamw or lamb, and the optimizer of this run has none. Pass moments='float32'."
            )
        return _rounded(state)

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, PyTree]:
        changes, after = inner.update(updates, _widened(state), params, **extra_args)
        return changes, _rounded(after)

    return with_description(optax.GradientTransformationExtraArgs(init, update), tx)


def _has_moments(node: Any) -> bool:
    return {"count", "mu", "nu"} <= set(getattr(node, "_fields", ()))


def _widened(state: PyTree) -> PyTree:
    def wide(node: Any) -> Any:
        if not _has_moments(node):
            return node
        moments = {name: getattr(node, name) for name in _MOMENTS if name in node._fields}
        return node._replace(**jax.tree.map(_to_float32, moments))

    return jax.tree.map(wide, state, is_leaf=_has_moments)


def _to_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def _rounded(state: PyTree) -> PyTree:
    nodes, structure = jax.tree.flatten(state, is_leaf=_has_moments)
    return jax.tree.unflatten(structure, [_narrow(n, node) for n, node in enumerate(nodes)])


def _narrow(number: int, node: Any) -> Any:
    if not _has_moments(node):
        return node
    moments = {name: getattr(node, name) for name in _MOMENTS if name in node._fields}
    leaves, structure = jax.tree.flatten(moments)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), node.count)
    keys = jax.random.split(key, len(leaves)) if leaves else ()
    rounded = [_stochastic(leaf, key) for leaf, key in zip(leaves, keys, strict=True)]
    return node._replace(**jax.tree.unflatten(structure, rounded))


def _stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down with the probability that makes the mean exact."""
    if x.dtype != jnp.float32:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
