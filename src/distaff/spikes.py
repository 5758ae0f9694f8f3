"""Spikes: losses that stand out from those before them, by a measure that they do not move."""

from __future__ import annotations

import math

import numpy as np

from distaff.errors import ConfigError

_TO_SIGMA = 1.4826
"""Standard deviations of a normal distribution per median absolute deviation."""

_MEAN_TO_SIGMA = 1.2533
"""Likewise per mean absolute deviation."""

_ROUNDING = 4 * float(np.finfo(np.float32).eps)


class SpikeDetector:
    """Tells which losses are spikes: further above the median of the last ones than noise leads to.

    The distance is measured in median absolute deviations, scaled to be standard deviations: the
    modified z-score of Iglewicz and Hoaglin, *How to Detect and Handle Outliers* (1993); where more
    than half of the losses are equal, in mean absolute deviations, as they advise. Neither median
    is moved by a few spikes, so that a second one is seen after the first. A lasting change of
    level is one for half a window at most.

    >>> is_spike = SpikeDetector()
    >>> [step for step, loss in enumerate(losses, 1) if is_spike(loss)]
    [1207]

    Args:
        threshold: how many standard deviations above the median a spike is.
        window: how many losses are looked back on.
        warm_up: losses before the first that can be a spike.

    Raises:
        ConfigError: an option is out of its range.
    """

    def __init__(self, threshold: float = 8.0, *, window: int = 128, warm_up: int = 32) -> None:
        if not 0 < threshold < math.inf:
            raise ConfigError(f"threshold is a positive number; got {threshold!r}.")
        if not 8 <= warm_up <= window:
            raise ConfigError(
                "A median needs losses: 8 <= warm_up <= window, but "
                f"warm_up={warm_up!r}, window={window!r}."
            )
        self._threshold, self._warm_up = threshold, warm_up
        self._losses = np.empty(window)
        self._count = self._next = 0
        self._limit = math.inf

    def __call__(self, loss: float) -> bool:
        """Tells whether a loss is a spike, and remembers it.

        Args:
            loss: of the next step. One that is not finite is a spike, and is not remembered.
        """
        if not math.isfinite(loss):
            return True
        is_spike = loss > self._limit
        losses = self._losses
        losses[self._next] = loss
        self._next = (self._next + 1) % len(losses)
        self._count += 1
        # Anew four times per warm-up: the limit may be that old, and a median is not for free.
        if self._count >= self._warm_up and self._count % (self._warm_up // 4) == 0:
            self._limit = _limit(losses[: self._count], self._threshold)
        return is_spike


def _limit(losses: np.ndarray, threshold: float) -> float:
    """Returns the largest loss that is no spike, after `losses` of shape `[window]`."""
    median = _median(losses)
    distances = np.abs(losses - median)
    sigma = _TO_SIGMA * _median(distances) or _MEAN_TO_SIGMA * np.mean(distances)
    return float(median + threshold * max(sigma, _ROUNDING * abs(median)))


def _median(values: np.ndarray) -> float:
    """Returns what `np.median` does, ten times as fast for so few."""
    ordered = np.sort(values)
    half = len(ordered) // 2
    return 0.5 * float(ordered[half] + ordered[~half])
