"""Spikes: losses that stand out from those before them, by a measure that they do not move."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 128
"""How many losses are looked back on."""

WARM_UP = 32
"""Losses before the first that can be a spike."""

_TO_SIGMA = 1.4826
"""Standard deviations of a normal distribution per median absolute deviation."""

_MEAN_TO_SIGMA = 1.2533
"""Likewise per mean absolute deviation."""

_ROUNDING = 4 * float(np.finfo(np.float32).eps)


_REFRESH = WARM_UP // 4
"""Losses between two looks at the median: on the CPU, sorting costs more than a small step."""


class Losses(NamedTuple):
    """The last losses, and what is made of them.

    Attributes:
        recent: in no order, float32 `[WINDOW]`.
        count: how many there have been, int32.
        limit: the largest loss that is no spike, float32.
    """

    recent: jax.Array
    count: jax.Array
    limit: jax.Array


def no_losses() -> Losses:
    """Returns what is remembered before the first step."""
    return Losses(jnp.zeros(WINDOW, jnp.float32), jnp.int32(0), jnp.float32(jnp.inf))


def is_spike(losses: Losses, loss: jax.Array) -> jax.Array:
    """Tells whether a loss is further above the median of the last ones than noise leads to.

    The distance is measured in median absolute deviations, scaled to be standard deviations: the
    modified z-score of Iglewicz and Hoaglin, *How to Detect and Handle Outliers* (1993); where more
    than half of the losses are equal, in mean absolute deviations, as they advise. Neither median
    is moved by a few spikes, so that a second one is seen after the first. A lasting change of
    level is one for half a window at most. It works inside a program.

    Args:
        losses: those before it, as `remembered`.
        loss: float32 scalar. One that is not finite is no spike.
    """
    return jnp.isfinite(loss) & (loss > losses.limit)


def remembered(losses: Losses, loss: jax.Array, threshold: float) -> Losses:
    """Returns the losses with one more; one that is not finite is not remembered.

    Args:
        losses: those before it.
        loss: float32 scalar.
        threshold: how many standard deviations above the median a spike is.
    """
    is_finite = jnp.isfinite(loss)
    place, count = losses.count % WINDOW, losses.count + is_finite
    recent = losses.recent.at[place].set(jnp.where(is_finite, loss, losses.recent[place]))
    is_due = is_finite & (count >= WARM_UP) & (count % _REFRESH == 0)
    limit = jax.lax.cond(is_due, lambda: _limit(recent, count, threshold), lambda: losses.limit)
    return Losses(recent, count, limit)


def _limit(recent: jax.Array, count: jax.Array, threshold: float) -> jax.Array:
    num_known = jnp.minimum(count, WINDOW)
    known = jnp.arange(WINDOW) < num_known
    median = _median(recent, known, num_known)
    distances = jnp.abs(recent - median)
    by_median = _TO_SIGMA * _median(distances, known, num_known)
    by_mean = _MEAN_TO_SIGMA * jnp.sum(distances, where=known) / num_known
    sigma = jnp.where(by_median > 0, by_median, by_mean)
    return median + threshold * jnp.maximum(sigma, _ROUNDING * jnp.abs(median))


def _median(values: jax.Array, known: jax.Array, num_known: jax.Array) -> jax.Array:
    """Returns the median of the values that are known; the others are sorted behind them."""
    ordered = jnp.sort(jnp.where(known, values, jnp.inf))
    return 0.5 * (ordered[(num_known - 1) // 2] + ordered[num_known // 2])
