"""Folds seeds of any size into 64 bits."""

from __future__ import annotations

import numpy as np


def folded(seed: int) -> np.int64:
    """Returns a seed folded into 64 bits; a seed that fits is unchanged."""
    seed = int(seed)
    while not -(2**63) <= seed < 2**63:
        high, low = divmod(seed, 2**62)
        seed = low ^ (high * 0x9E3779B97F4A7C15 % 2**62 + 1)
    return np.int64(seed)
