"""Which parameters weight decay applies to."""

from __future__ import annotations

import jax
import numpy as np

from distaff.typing import Params, PyTree

_NEVER_DECAYED = {"bias", "scale"}


def decay_mask(params: Params) -> PyTree:
    """Tells for each parameter whether weight decay applies to it.

    Decay is for matrices and kernels. Biases and the scales of norm layers set the offset and the
    size of activations, where a pull towards zero does harm, and are left alone: leaves of fewer
    than two axes, and those named `bias` or `scale` at any rank (the biases of multi-head attention
    have shape `[heads, features]`).

    Args:
        params: a pytree of arrays, or of anything with `ndim`.

    Returns:
        A pytree of bool with the structure of `params`, as the `mask` argument of Optax takes it.

    Example:
        >>> decay_mask({"kernel": np.ones([3, 2]), "bias": np.ones([2])})
        {'bias': False, 'kernel': True}
    """

    def is_decayed(path: tuple, leaf: jax.Array) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return np.ndim(leaf) >= 2 and name not in _NEVER_DECAYED

    return jax.tree_util.tree_map_with_path(is_decayed, params)
