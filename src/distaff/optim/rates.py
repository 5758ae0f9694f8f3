"""Learning rates for the log, computed ahead.

Even the smallest program waits for all steps dispatched to the device before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distaff.core.typing import Schedule

_BLOCK = 1024
"""Number of steps whose rates are computed at once."""


def make_rates(schedule: Schedule) -> Callable[[int], Any]:
    """Returns a schedule's values as floats, without waiting for steps in flight.

    Args:
        schedule: the learning rate by optimizer step, traceable by JAX.

    Returns:
        A function `step -> learning_rate`, to be called with ascending steps. It returns an array
        if the schedule does.
    """
    if not jax.make_jaxpr(schedule)(0).eqns:  # constant
        rate = _plain(np.asarray(schedule(0)))
        return lambda step: rate
    return _Rates(schedule)


class _Rates:
    def __init__(self, schedule: Schedule) -> None:
        self._compute = jax.jit(
            lambda block: jax.vmap(schedule)(block * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32))
        )
        self._blocks: dict[int, jax.Array] = {}
        self._prepare(0)

    def __call__(self, step: int) -> Any:
        block, row = divmod(step, _BLOCK)
        self._prepare(block)
        return _plain(np.asarray(self._blocks[block])[row])

    def _prepare(self, block: int) -> None:
        """Computes a block and the one after it, without waiting for them."""
        wanted = block, block + 1
        kept = {number: self._blocks[number] for number in wanted if number in self._blocks}
        for number in wanted:
            if number not in kept:
                kept[number] = self._compute(np.int32(number))
                kept[number].copy_to_host_async()
        self._blocks = kept


def _plain(rate: np.ndarray) -> Any:
    return rate if np.ndim(rate) else float(rate)
