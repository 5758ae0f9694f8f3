"""Observation of an optimizer: angle between gradient and update, and their norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import StateError
from distaff.optim.transforms.extra_args import (
    FLUSH,
    find_states,
    with_description,
    with_known_args,
)


class Geometry(NamedTuple):
    """The latest update compared with its gradient, over all parameters together.

    Attributes:
        cosine: cosine of the angle between the update and the negative gradient, float32 `[]`: 1
            for steepest descent, 0 if they are orthogonal or one of them is zero.
        grad_norm: Euclidean norm of the gradient, float32 `[]`.
        update_norm: Euclidean norm of the update, float32 `[]`.
    """

    cosine: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array


class ObservedState(NamedTuple):
    """The state of an observed optimizer.

    Attributes:
        inner: the state of the optimizer itself.
        geometry: geometry of its latest update; zeros before the first.
    """

    inner: PyTree
    geometry: Geometry


def observed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state records the geometry of each update.

    The updates stay the same, bit for bit. It costs three dot products per step and stores three
    numbers. The gradient is the one passed to this wrapper; outside of a chain, that is before any
    clipping.

    Args:
        tx: any Optax optimizer; it gets extra arguments of `update`.

    Returns:
        The optimizer, whose state is an `ObservedState`; read it with `geometry(opt_state)`,
        however deeply it is nested.

    Example:
        >>> tx = observed(optax.sgd(0.1))
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> [round(float(number), 4) for number in geometry(state)]
        [1.0, 5.0, 0.5]
    """
    inner = with_known_args(tx)

    def init(params: Params) -> ObservedState:
        return ObservedState(inner.init(params), Geometry(*jnp.zeros([3], jnp.float32)))

    def update(
        updates: Params, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, ObservedState]:
        grads = updates
        updates, inner_state = inner.update(grads, state.inner, params, **extra_args)
        has_gradient = extra_args.get(FLUSH) != "end"
        latest = _geometry(grads, updates) if has_gradient else state.geometry
        return updates, ObservedState(inner_state, latest)

    return with_description(optax.GradientTransformationExtraArgs(init, update), inner)


def geometry(opt_state: PyTree) -> Geometry:
    """Returns the geometry of the latest update of an observed optimizer.

    Args:
        opt_state: the state of an optimizer with one `observed` in it, at any depth.

    Raises:
        StateError: there is not exactly one.
    """
    states = list(find_states(opt_state, ObservedState))
    if len(states) != 1:
        raise StateError(
            f"The state must be that of one observed optimizer, and holds {len(states)}. Wrap the "
            "optimizer, once: optim.observed(optax.adam(1e-3))."
        )
    return states[0].geometry


def _geometry(grads: Params, updates: Params) -> Geometry:
    grad_norm, update_norm = jnp.sqrt(_dot(grads, grads)), jnp.sqrt(_dot(updates, updates))
    lengths = grad_norm * update_norm
    cosine = -_dot(grads, updates) / jnp.where(lengths == 0, 1, lengths)
    # Rounding may bring a cosine slightly above 1.
    cosine = jnp.clip(cosine, -1, 1)
    return Geometry(cosine, grad_norm, update_norm)


def _dot(left: Params, right: Params) -> jax.Array:
    """Returns the (real part of the) inner product of two trees, float32 `[]`."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(a):
            return _dot((a.real, a.imag), (b.real, b.imag))
        return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))

    products = jax.tree.map(product, left, right)
    return jax.tree.reduce(jnp.add, products, jnp.zeros([], jnp.float32))
