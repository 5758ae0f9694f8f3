"""Detects loss spikes with a robust running estimate of median and spread."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 128
"""Number of recent losses that are compared."""

WARM_UP = 32
"""Number of losses before the first possible spike."""

_TO_SIGMA = 1.4826
"""Standard deviations of a normal distribution per median absolute deviation."""

_MEAN_TO_SIGMA = 1.2533
"""Standard deviations of a normal distribution per mean absolute deviation."""

_ROUNDING = 4 * float(np.finfo(np.float32).eps)

_REFRESH = WARM_UP // 4
"""Losses per update of the median: on the CPU, sorting costs more than a small step."""


class Losses(NamedTuple):
    """The recent losses and the spike limit.

    Attributes:
        recent: the last finite losses, unordered, float32 `[WINDOW]`.
        count: number of finite losses so far, int32.
        limit: the largest loss that is not a spike, float32.
    """

    recent: jax.Array
    count: jax.Array
    limit: jax.Array


def no_losses() -> Losses:
    """Returns the `Losses` before the first step."""
    return Losses(jnp.zeros(WINDOW, jnp.float32), jnp.int32(0), jnp.float32(jnp.inf))


def is_spike(losses: Losses, loss: jax.Array) -> jax.Array:
    """Returns whether a loss is further above the recent median than noise explains.

    The distance is the modified z-score of Iglewicz and Hoaglin, *How to Detect and Handle
    Outliers* (1993): median absolute deviations, scaled to standard deviations; or, as they advise,
    mean absolute deviations if more than half of the losses are equal. A few spikes do not move
    the medians, so consecutive spikes are detected. A lasting change of level counts as a spike for
    at most half a window. Works inside `jax.jit`.

    Args:
        losses: the losses before it.
        loss: float32 scalar. A NaN or infinite loss is not a spike.
    """
    return jnp.isfinite(loss) & (loss > losses.limit)


def remembered(losses: Losses, loss: jax.Array, threshold: float) -> Losses:
    """Returns the losses with one more, float32 scalar, which is ignored if it is not finite.

    `threshold` is the distance of a spike from the median, in standard deviations.
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
    """Returns the median of the known values."""
    ordered = jnp.sort(jnp.where(known, values, jnp.inf))
    return 0.5 * (ordered[(num_known - 1) // 2] + ordered[num_known // 2])
