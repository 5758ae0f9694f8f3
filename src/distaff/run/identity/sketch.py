"""Sketches of weights: a few numbers per array, compared up to rounding.

Initializers round differently on other CPUs, so two sketches are compared with a tolerance.
"""

from __future__ import annotations

import base64
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.execution.shards import whole

_MAX_VALUES = 2**14
_MAX_FAR_BYTES = 2**26
_MAX_LEAVES = 4096
_NEAR = 1e-4
"""Larger than rounding errors and smaller than the effect of training, except in 16 bits."""


def sketch(leaves: list[Any]) -> str:
    """Returns the sketch of arrays as text: two projections, the norm and a tolerance for each.

    Arrays of more than 16384 values are sampled evenly.

    Args:
        leaves: arrays of numbers or random keys; only the first 4096 are used.
    """
    found = [_numbers(leaf) for leaf in _samples([_plain(leaf) for leaf in leaves[:_MAX_LEAVES]])]
    return base64.b64encode(np.asarray(found, "<f4").tobytes()).decode()


def is_near(one: str, other: str) -> bool:
    """Whether two sketches are of the same arrays, up to rounding."""
    if one == other:
        return True
    pair = [np.frombuffer(base64.b64decode(each), "<f4") for each in (one, other)]
    if pair[0].size != pair[1].size:
        return False
    was, now = (each.reshape(-1, 4) for each in pair)
    scale = np.maximum(was[:, 2], now[:, 2]) * np.maximum(was[:, 3], now[:, 3])
    return bool((np.abs(was - now)[:, :3] <= scale[:, None]).all())


def _plain(leaf: Any) -> Any:
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _samples(leaves: list[Any]) -> list[np.ndarray]:
    """Returns values of each leaf on the host; large models are sampled on the device."""
    is_far = any(
        isinstance(x, jax.Array) and next(iter(x.devices())).platform != "cpu" for x in leaves
    )
    if is_far and sum(x.nbytes for x in leaves) > _MAX_FAR_BYTES:
        leaves = jax.jit(lambda many: [_some(x) for x in many])(leaves)
    return [_some(np.asarray(whole(leaf))) for leaf in leaves]


def _some(leaf: Any) -> Any:
    flat = leaf.reshape(-1)
    return flat[:: max(1, flat.size // _MAX_VALUES)][:_MAX_VALUES]


def _numbers(sample: np.ndarray) -> tuple[float, float, float, float]:
    exact = not jnp.issubdtype(sample.dtype, jnp.inexact)
    tolerance = 1e-6 if exact else max(_NEAR, 4 * float(jnp.finfo(sample.dtype).eps))
    values = np.nan_to_num(np.abs(sample) if np.iscomplexobj(sample) else sample.astype(np.float64))
    angles = np.arange(1, values.size + 1) * np.array([[0.7548776662466927], [0.5698402909980532]])
    one, other = np.sqrt(2) * np.cos(2 * np.pi * angles) @ values
    return float(one), float(other), float(np.linalg.norm(values)), tolerance
