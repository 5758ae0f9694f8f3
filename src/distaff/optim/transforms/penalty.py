"""The L2 penalty, and a test whether an optimizer decays parameters itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Params, PyTree
from distaff.errors import ConfigError
from distaff.optim.transforms.extra_args import FLUSH, with_known_args
from distaff.optim.transforms.masks import decay_mask

_PROBED_STEPS = 64
_COUNTS = [*range(1, 1025), *(2**k + j for k in range(11, 31) for j in (-1, 0, 2 ** (k - 1)))]
"""Counts of steps, or of micro-steps in a window, after which two more steps are probed."""

_ROUNDING = 1e-13


def l2_loss(
    params: Params, coefficient: float, mask: Callable[[Params], PyTree] | PyTree = decay_mask
) -> jax.Array:
    """Returns the L2 penalty `coefficient / 2 * sum(p ** 2)`, a scalar.

    Its gradient is `coefficient * p`, so the coefficient equals the `weight_decay` of SGD:
    `OptimizerConfig("sgd", weight_decay=...)` trains identically.

    Prefer the weight decay of an optimizer. It needs no pass over the parameters in the loss, and
    in an adaptive optimizer L2 is not weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).
    In a loss function use `ctx.add_l2_loss`, which keeps the penalty out of the reported loss.

    Args:
        params: the loss function's own `params` argument.
        coefficient: strength of the penalty.
        mask: the parameters to penalise: a pytree of bool like `params`, or a function that returns
            one. By default all except biases and norm scales.

    Raises:
        ConfigError: `coefficient` is negative, infinite or NaN.
    """
    if isinstance(coefficient, int | float) and not 0 <= coefficient < math.inf:
        raise ConfigError(f"coefficient must be a finite number >= 0; got {coefficient!r}.")
    applies = mask(params) if callable(mask) else mask
    squares = jax.tree.map(lambda leaf, on: _square(leaf) if on else 0.0, params, applies)
    return jnp.asarray(0.5 * coefficient * sum(jax.tree.leaves(squares)))


def _square(leaf: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(leaf):
        return _square(leaf.real) + _square(leaf.imag)
    return jnp.sum(jnp.square(_wide(leaf)))


def _wide(leaf: jax.Array) -> jax.Array:
    """Converts half precision to float32, in which a sum does not stall."""
    is_half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if is_half else leaf


def decays(tx: optax.GradientTransformation, params: Params) -> bool:
    """Returns whether an optimizer pulls parameters towards zero itself, like weight decay.

    Without a gradient, only decay moves parameters of one differently from parameters of zero. This
    is tested in 64 bits, on parameters named like `params`, of at most 2 along each axis: 64 steps,
    then two steps after each of many counts of earlier steps, so that a warm-up from 0, a late
    schedule, or gradient accumulation does not hide the decay.

    It detects the decay of every Optax optimizer that has one, except `prodigy`, whose update is
    NaN without gradients, and `sophia`, which needs more than a gradient. `fromage` shrinks all
    parameters by its rule, and counts as decaying.

    Args:
        tx: any Optax optimizer.
        params: a pytree of arrays, or of anything with `shape` and `dtype`; values are not read.

    Returns:
        True if it does; False if it does not, or fails on such parameters.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple(tuple(min(size, 2) for size in jnp.shape(leaf)) for leaf in leaves)
    # A transformation is a tuple of functions.
    return _decays(tx, structure, shapes)  # ty: ignore[invalid-argument-type]


@functools.lru_cache(maxsize=8)
def _decays(tx: Any, structure: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    try:
        # Computes concrete values even while a step is being traced.
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            ones = jax.tree.unflatten(structure, [jnp.ones(shape) for shape in shapes])
            return _moves(with_known_args(tx), ones)
    except Exception:  # a mask over other sizes, or missing arguments: unknown
        return False


def _moves(tx: optax.GradientTransformationExtraArgs, ones: Params) -> bool:
    zeros = jax.tree.map(jnp.zeros_like, ones)
    # The network of a learned optimizer depends on the parameters, so only its decay is probed.
    unused = {"decay_only": True, FLUSH: "now", "grad": zeros, "value": jnp.zeros([])}

    def loss(params: Params) -> jax.Array:
        return jnp.zeros([])

    def step(differ: jax.Array, *opt_states: PyTree) -> tuple[PyTree, ...]:
        (first, first_state), (second, second_state) = (
            tx.update(zeros, opt_state, params, **unused, value_fn=loss)
            for opt_state, params in zip(opt_states, (ones, zeros), strict=True)
        )
        # Noise in an update, as in optax.noisy_sgd, is the same in both.
        apart = jax.tree.map(lambda a, b: (jnp.abs(a - b) > _ROUNDING).any(), first, second)
        differ |= jax.tree.reduce(jnp.logical_or, apart, jnp.asarray(False))
        return differ, first_state, second_state

    start = tx.init(ones), tx.init(zeros)
    carry, compiled = (jnp.asarray(False), *start), jax.jit(step)
    for _ in range(_PROBED_STEPS):
        carry = compiled(*carry)
    return bool(carry[0]) or _moves_later(step, start)


def _moves_later(step: Callable[..., Any], start: tuple[PyTree, PyTree]) -> bool:
    """Returns whether decay shows within two steps after one of `_COUNTS` steps."""

    def at(count: jax.Array, state: PyTree) -> PyTree:
        def moved(leaf: jax.Array) -> jax.Array:
            is_count = leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
            return count.astype(leaf.dtype) if is_count else leaf

        return jax.tree.map(moved, state)

    def later(count: jax.Array) -> jax.Array:
        carry = (jnp.asarray(False), *(at(count, state) for state in start))
        return step(*step(*carry))[0]

    if not any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(start)):
        return False
    counts = jnp.asarray([count for count in _COUNTS if count < 2**31], jnp.int32)
    return bool(jax.jit(jax.vmap(later))(counts).any())
