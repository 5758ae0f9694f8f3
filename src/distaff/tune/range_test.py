"""The result of a learning rate range test: its curve, and the learning rates it suggests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from distaff.core import optional
from distaff.core.views.brief import brief

_FEWEST = 5
"""Number of steps that a suggestion needs at least."""

_LAST = 0.9
"""Part of the steps after which the steepest descent counts as the end of the range."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RangeTest:
    """A learning rate range test; `repr` has its result in one line.

    Attributes:
        learning_rates: the learning rate of each update, float64 `[steps]`, rising geometrically.
            A test that diverges ends before its highest rate.
        losses: the training loss of each update, computed before it, float64 `[steps]`. The last
            one may be NaN or infinite.
        smoothed: the losses averaged over neighbouring steps, float64 `[steps]`: an average with
            weights that fall exponentially to both sides, debiased at the ends.
        suggestion: the learning rate at which the smoothed loss falls fastest before its minimum;
            None if the loss never fell.
        minimum: the learning rate at the minimum of the smoothed loss; None without a suggestion,
            or if the loss still fell at the highest rate.
        remark: why there is no suggestion, or a limit of the test; empty without one.
        diverged: whether the loss rose far above its minimum, or became NaN or infinite.
        title: what was tested, for the figure.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    minimum: float | None
    remark: str
    diverged: bool
    title: str = ""

    @property
    def tenth_of_minimum(self) -> float | None:
        """A tenth of `minimum`, another common rule; None if that is None."""
        return None if self.minimum is None else self.minimum / 10

    def __repr__(self) -> str:
        tenth, last = self.tenth_of_minimum, self.learning_rates[-1]
        return brief(
            self,
            "" if self.suggestion is None else f"suggestion {self.suggestion:.3g}",
            "" if tenth is None else f"minimum / 10 {tenth:.3g}",
            self.remark,
            f"diverged at {last:.3g}" if self.diverged and self.suggestion is not None else "",
            f"{len(self.losses)} steps",
        )

    def figure(self) -> Any:
        """Returns the loss over the learning rate as a matplotlib Figure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return optional.load("matplotlib_optimizers", extra="plots").range_test(self)


def evaluate(
    learning_rates: np.ndarray,
    losses: np.ndarray,
    *,
    highest_loss: float,
    diverged: bool,
    smoothing: float,
    title: str = "",
) -> RangeTest:
    """Returns a range test with its suggestion.

    The smoothed loss must fall by more than that of a model that does not learn, by chance.

    Args:
        learning_rates: the learning rate of each update `[steps]`.
        losses: the loss of each update `[steps]`.
        highest_loss: losses above it count as this much.
        diverged: whether the test ended early.
        smoothing: weight of a step, as a factor of that of its neighbour; 0 to smooth nothing.
        title: what was tested.
    """
    rates, losses = np.asarray(learning_rates, float), np.asarray(losses, float)
    used = np.where(np.isfinite(losses), np.minimum(losses, highest_loss), highest_loss)
    smoothed = smooth(used, smoothing)
    at = int(np.argmin(smoothed))
    suggestion = minimum = None
    if len(used) < _FEWEST:
        remark = f"no suggestion: the loss diverged after {len(used)} steps. Lower low."
    elif smoothed[: at + 1].max() - smoothed[at] <= _fall_by_chance(used, smoothing):
        remark = f"no suggestion: the loss never fell between {rates[0]:.3g} and {rates[-1]:.3g}"
    else:
        # Rates are evenly spaced on a logarithmic axis.
        steepest = int(np.gradient(smoothed[: at + 1]).argmin())
        is_inside = diverged or at < len(used) - 1
        remark = ""
        if not is_inside and steepest >= _LAST * at:
            remark = f"no suggestion: the loss fell ever faster up to {rates[-1]:.3g}. Raise high."
        elif not is_inside:
            remark = f"the loss still fell at {rates[-1]:.3g}: raise high"
        elif steepest == 0:
            remark = f"the loss fell fastest at {rates[0]:.3g}: lower low"
        if not remark.startswith("no"):
            suggestion, minimum = float(rates[steepest]), float(rates[at]) if is_inside else None
    return RangeTest(
        learning_rates=rates,
        losses=losses,
        smoothed=smoothed,
        suggestion=suggestion,
        minimum=minimum,
        remark=remark,
        diverged=diverged,
        title=title,
    )


def smooth(values: np.ndarray, factor: float) -> np.ndarray:
    """Returns averages over neighbours, weighted by `factor ** distance`, with no lag.

    An exponential average of past values only lags behind by `factor / (1 - factor)` steps, which
    would move each suggestion to higher learning rates.

    >>> smooth(np.array([0.0, 0.0, 1.0, 0.0, 0.0]), 0.5).tolist()[1:4]
    [0.2, 0.4, 0.2]
    """
    total, weight = _decayed(values, factor), _decayed(np.ones(len(values)), factor)
    return total / weight


def _decayed(values: np.ndarray, factor: float) -> np.ndarray:
    """Returns the sums of all values, weighted by `factor ** distance`."""

    def of_past(values: np.ndarray) -> np.ndarray:
        sums, total = np.empty(len(values)), 0.0
        for index, value in enumerate(values):
            total = sums[index] = factor * total + value
        return sums

    return of_past(values) + of_past(values[::-1])[::-1] - values


def noise_of(losses: np.ndarray) -> float:
    """Returns the standard deviation of the noise of losses, along any smooth trend.

    It is estimated from the median of the second differences, so that a few large ones at the end
    do not matter.
    """
    return 0.605 * float(np.median(abs(np.diff(losses, 2)))) if len(losses) > 2 else 0.0


def _fall_by_chance(losses: np.ndarray, smoothing: float) -> float:
    """Returns by how much the smoothed loss of a model that does not learn falls at most.

    The bound was exceeded in less than 1 % of simulated curves of 20 to 1,000 steps.
    """
    share = (1 - smoothing) * (1 + smoothing**2) / (1 + smoothing) ** 3
    return 8 * noise_of(losses) * float(np.sqrt(share))
