"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree

_EXACT = jax.lax.Precision.HIGHEST
"""Accelerators multiply float32 in fewer bits by default, which is not enough for eigenvectors."""

Factors = tuple[jax.Array, ...]


class SoapState(NamedTuple):
    """The state of `scale_by_soap`, in float32 or wider.

    Attributes:
        count: number of updates, int32 `[]`.
        mu: first moment of the gradients.
        nu: second moment of the gradients in the eigenbases.
        factors: for each parameter the Kronecker factors `[n, n]`, by preconditioned axis.
        bases: their eigenvectors, as columns `[n, n]`.
    """

    count: jax.Array
    mu: Params
    nu: Params
    factors: PyTree
    bases: PyTree


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    precondition_frequency: int = 10,
    max_preconditioned: int = 10_000,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer SOAP, with decoupled weight decay; see `scale_by_soap`.

    Args:
        learning_rate: a number, or a schedule.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment, and of the Kronecker factors.
        eps: added to the root of the second moment.
        weight_decay: strength of the weight decay, multiplied by the learning rate.
        mask: for which parameters; see `optax.add_decayed_weights`.
        precondition_frequency: updates between two refreshes of the eigenbases.
        max_preconditioned: length of the longest axis that is preconditioned. A matrix with one
            longer axis is preconditioned on the other side only.
    """
    return optax.chain(
        scale_by_soap(b1, b2, eps, precondition_frequency, max_preconditioned),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    precondition_frequency: int = 10,
    max_preconditioned: int = 10_000,
) -> optax.GradientTransformation:
    """Rescales updates by Adam in the eigenbasis of Shampoo's preconditioner.

    For a gradient `G`, `[m, n]`, with the factors `L` and `R` and their eigenvectors `Q_L`, `Q_R`:

        G' = Q_L^T G Q_R
        M = b1 M + (1 - b1) G
        V = b2 V + (1 - b2) G' * G'
        update = Q_L (Q_L^T M Q_R / (sqrt(V) + eps)) Q_R^T      with Adam's correction of the bias
        L = b2 L + (1 - b2) G G^T
        R = b2 R + (1 - b2) G^T G
        every `precondition_frequency` updates: Q_L = QR(L Q_L), Q_R = QR(R Q_R)

    The first gradient only makes the factors, with their exact eigenvectors: it would be rotated by
    itself, and the parameters stay as they are. Arrays of more than two axes have a factor for each
    axis. Axes of length 1 and longer than `max_preconditioned` have none. Parameters with none at
    all, such as biases, and complex ones are trained by Adam, from the first gradient.

    Args:
        b1: see `soap`.
        b2: see `soap`.
        eps: see `soap`.
        precondition_frequency: see `soap`.
        max_preconditioned: see `soap`.

    Example:
        >>> tx = scale_by_soap()
        >>> state = tx.init({"kernel": jnp.ones([3, 2]), "bias": jnp.ones([2])})
        >>> [factor.shape for factor in state.factors["kernel"]]
        [(3, 3), (2, 2)]
    """

    def init(params: Params) -> SoapState:
        bases = jax.tree.map(lambda leaf: _identities(leaf, max_preconditioned), params)
        factors = jax.tree.map(jnp.zeros_like, bases)
        mu, nu = jax.tree.map(_zeros, params), jax.tree.map(lambda x: abs(_zeros(x)), params)
        return SoapState(jnp.zeros([], jnp.int32), mu, nu, factors, bases)

    def update(
        updates: Params, state: PyTree, params: Params | None = None
    ) -> tuple[Params, SoapState]:
        grads, structure = jax.tree.flatten(updates)
        moments = [structure.flatten_up_to(each) for each in (state.mu, state.nu)]
        factors, bases = map(structure.flatten_up_to, (state.factors, state.bases))
        steps, mu, nu, changed = [], [], [], []
        for grad, m, v, own, basis in zip(grads, *moments, factors, bases, strict=True):
            axes, wide = _axes(grad, max_preconditioned), grad.astype(m.dtype)
            # The first gradient does not count where it makes the factors.
            adam_count = state.count if axes else state.count + 1
            adam = (m, v, adam_count, _Rotation(axes, basis))
            step, m, v = _adam(wide, *adam, b=(b1, b2), eps=eps)
            steps.append(step.astype(grad.dtype))
            mu.append(m)
            nu.append(v)
            changed.append(_accumulated(wide, own, axes, b2))
        bases = _refreshed(state.count, changed, bases, precondition_frequency)
        trees = [structure.unflatten(each) for each in (steps, mu, nu, changed, bases)]
        return trees[0], SoapState(state.count + 1, *trees[1:])

    return optax.GradientTransformation(init, update)


class _Rotation(NamedTuple):
    """The change to the eigenbases of some axes of an array.

    Attributes:
        axes: the axes.
        bases: the eigenvectors of each, as columns.
    """

    axes: Sequence[int]
    bases: Factors

    def forth(self, array: jax.Array) -> jax.Array:
        """Returns an array in the eigenbases."""
        for axis, basis in zip(self.axes, self.bases, strict=True):
            array = _along(array, axis, basis)
        return array

    def back(self, array: jax.Array) -> jax.Array:
        """Returns an array of the eigenbases in the original space."""
        for axis, basis in zip(self.axes, self.bases, strict=True):
            array = _along(array, axis, basis.T)
        return array


def _adam(
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    count: jax.Array,
    rotation: _Rotation,
    *,
    b: tuple[float, float],
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the update and both moments; zero and the old ones if `count` is 0."""
    is_counted = count > 0
    rotated = rotation.forth(grad)
    new_mu = b[0] * mu + (1 - b[0]) * grad
    new_nu = b[1] * nu + (1 - b[1]) * jnp.square(jnp.abs(rotated))
    exponent = jnp.maximum(count, 1).astype(nu.dtype)
    corrections = [1 - jnp.asarray(each, nu.dtype) ** exponent for each in b]
    scaled = rotation.forth(new_mu) / corrections[0]
    step = rotation.back(scaled / (jnp.sqrt(new_nu / corrections[1]) + eps))
    kept = [(step, jnp.zeros_like(step)), (new_mu, mu), (new_nu, nu)]
    step, mu, nu = (jnp.where(is_counted, new, old) for new, old in kept)
    return step, mu, nu


def _accumulated(grad: jax.Array, factors: Factors, axes: Sequence[int], decay: float) -> Factors:
    """Returns the Kronecker factors with another gradient."""
    new = []
    for axis, factor in zip(axes, factors, strict=True):
        rows = jnp.moveaxis(grad, axis, 0).reshape(grad.shape[axis], -1)
        new.append(decay * factor + (1 - decay) * jnp.matmul(rows, rows.T, precision=_EXACT))
    return tuple(new)


def _refreshed(
    count: jax.Array, factors: list[Factors], bases: list[Factors], frequency: int
) -> list[Factors]:
    """Returns the eigenbases for the next update: exact ones first, then by power iteration."""

    def keep(factors: list[Factors], bases: list[Factors]) -> list[Factors]:
        return bases

    def iterate(factors: list[Factors], bases: list[Factors]) -> list[Factors]:
        return jax.tree.map(_power_iteration, factors, bases)

    def exact(factors: list[Factors], bases: list[Factors]) -> list[Factors]:
        # By falling eigenvalue, the order in which power iteration keeps them.
        return jax.tree.map(lambda factor: jnp.linalg.eigh(factor)[1][:, ::-1], factors)

    choice = jnp.where(count == 0, 2, jnp.where(count % frequency == 0, 1, 0))
    return jax.lax.switch(choice, [keep, iterate, exact], factors, bases)


def _power_iteration(factor: jax.Array, basis: jax.Array) -> jax.Array:
    return jnp.linalg.qr(jnp.matmul(factor, basis, precision=_EXACT))[0]


def _along(array: jax.Array, axis: int, basis: jax.Array) -> jax.Array:
    """Returns `basis.T @ array` along an axis."""
    product = jnp.tensordot(array, basis, ((axis,), (0,)), precision=_EXACT)
    return jnp.moveaxis(product, -1, axis)


def _axes(leaf: jax.Array, longest: int) -> list[int]:
    """Returns the axes of a parameter that are preconditioned."""
    is_vector = sum(length > 1 for length in leaf.shape) < 2
    if is_vector or math.prod(leaf.shape) == 0 or jnp.iscomplexobj(leaf):
        return []
    return [axis for axis, length in enumerate(leaf.shape) if 1 < length <= longest]


def _identities(leaf: jax.Array, longest: int) -> Factors:
    dtype = _zeros(leaf).dtype
    return tuple(jnp.eye(leaf.shape[axis], dtype=dtype) for axis in _axes(leaf, longest))


def _zeros(leaf: jax.Array) -> jax.Array:
    return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
