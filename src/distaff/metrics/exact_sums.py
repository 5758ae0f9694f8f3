"""Exact sums of integers and weights, where float32 would round each addend away."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LIMB = 12
"""Bits of a limb: an int32 holds the sum of 2**18 limbs, which is a block."""

_LIMBS = 4
"""Limbs per float weight, relative to the largest one, so that small weights keep their digits."""

_BLOCK = 2**18
_HALF = 16
_ROWS = 2**15


def sum_by_cell(cells: jax.Array, weight: jax.Array, num_cells: int) -> jax.Array:
    """Sums weights by cell, as exactly as float32 can hold the sums.

    A scatter into float32 rounds after each addend: a count stops at 2**24, and a sum of a million
    weights is off by a percent. So each weight is split into limbs of 12 bits, which are added as
    integers.

    Args:
        cells: the cell of each weight, int32 `[n]`; weights of cells out of range are dropped.
        weight: bool, int32, or float `[n]`.
        num_cells: number of cells.

    Returns:
        Float32 `[num_cells]`, or float64 for float64 weights; NaN if a weight is not finite.
    """
    if weight.dtype == jnp.float64:
        return jnp.zeros(num_cells, weight.dtype).at[cells].add(weight, mode="drop")
    if weight.dtype == jnp.bool_:
        return _sum_limbs(cells, weight.astype(jnp.int32)[:, None], num_cells)[..., 0].sum(0)
    if jnp.issubdtype(weight.dtype, jnp.floating):
        largest = jnp.max(jnp.abs(weight), initial=0)
        exponent = jnp.frexp(largest)[1]
        # Scaling by a power of two is exact.
        scaled, limbs = jnp.ldexp(weight, _LIMB - exponent), []
        for _ in range(_LIMBS - 1):
            limbs.append(jnp.floor(scaled))
            scaled = (scaled - limbs[-1]) * 2**_LIMB
        limbs = [limb.astype(jnp.int32) for limb in (*limbs, jnp.round(scaled))]
        unit = jnp.ldexp(jnp.float32(1), exponent - _LIMBS * _LIMB)
        unit = jnp.where(jnp.isfinite(largest), unit, jnp.nan)
    else:
        low = weight & (2**_LIMB - 1)
        middle = (weight >> _LIMB) & (2**_LIMB - 1)
        limbs, unit = [weight >> 2 * _LIMB, middle, low], jnp.float32(1)
    sums = _sum_limbs(cells, jnp.stack(limbs, axis=-1), num_cells)
    powers = [2.0 ** (_LIMB * place) for place in reversed(range(len(limbs)))]
    return (sums * jnp.array([[powers]], jnp.float32)).sum((0, 2)) * unit


def _sum_limbs(cells: jax.Array, limbs: jax.Array, num_cells: int) -> jax.Array:
    """Returns sums of limbs `[n, k]` by block and cell: float32 `[blocks, cells, k]`."""
    num_blocks = max(1, -(-len(cells) // _BLOCK))
    blocks = jnp.arange(len(cells), dtype=jnp.int32) // _BLOCK
    zeros = jnp.zeros((num_blocks, num_cells, limbs.shape[1]), jnp.int32)
    return zeros.at[blocks, cells].add(limbs, mode="drop").astype(jnp.float32)


def sum_integers(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums integers along the first axis, without overflow or rounding up to 2**47.

    Args:
        values: integers of 32 bits or fewer, or bools, `[n, ...]`.

    Returns:
        Two float32 arrays `[...]` whose sum in float64 is exact.
    """
    if values.dtype != jnp.uint32:
        values = values.astype(jnp.int32)
    num_blocks = max(1, -(-len(values) // _ROWS))
    missing = num_blocks * _ROWS - len(values) if num_blocks > 1 else 0
    values = jnp.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)])
    values = values.reshape(num_blocks, -1, *values.shape[1:])
    low = (values & (2**_HALF - 1)).astype(jnp.int32).sum(1)
    high = (values >> _HALF).astype(jnp.int32).sum(1) + (low >> _HALF)
    low, high = (low & (2**_HALF - 1)).sum(0), high.sum(0)
    rounded = high.astype(jnp.float32)
    # The rounding error of the high half is small, and is added to the low one.
    rest = (high - rounded.astype(jnp.int32)) * 2**_HALF + low
    return rounded * 2**_HALF, rest.astype(jnp.float32)
