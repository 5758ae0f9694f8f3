"""Which members of a population are replaced, by which, and with what values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distaff.tune.dimension import Float

_FACTORS = (0.8, 1.25)
"""A value that a member takes over is multiplied by one of these."""

_REDRAWN = 0.25
"""Probability that a value is drawn from its range instead."""


class Generation(NamedTuple):
    """How the members continue after an epoch.

    Attributes:
        sources: for each member, the index of the member whose state it continues from.
        values: for each member, its values by path.
    """

    sources: list[int]
    values: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Evolution:
    """Replaces the worst members by perturbed copies of the best (Jaderberg et al. 2017).

    All random numbers are functions of the seed and the epoch, so that a resumed population
    continues as if it had not been interrupted.

    Args:
        space: ranges of the values by path.
        every: epochs between two replacements.
        fraction: share of the members that are replaced, and from which they are copied.
        seed: seed of all draws.
    """

    space: Mapping[str, Float]
    every: int
    fraction: float
    seed: int

    def initial(self, size: int) -> list[dict[str, float]]:
        """Returns the first values of each member."""
        rng = np.random.default_rng([self.seed, 0])
        return [{path: _draw(each, rng) for path, each in self.space.items()} for _ in range(size)]

    def is_due(self, epoch: int) -> bool:
        """Whether members are replaced after an epoch."""
        return epoch % self.every == 0

    def next(
        self, values: Sequence[Mapping[str, float]], scores: Sequence[float | None], epoch: int
    ) -> Generation:
        """Returns how the members continue.

        Args:
            values: the values of each member.
            scores: the larger the better; None for a member that diverged, which is replaced.
            epoch: the epoch after which they are replaced.
        """
        rng = np.random.default_rng([self.seed, epoch])
        size = len(scores)
        alive = [n for n, score in enumerate(scores) if score is not None]
        ranked = sorted(alive, key=lambda n: -_number(scores[n]))
        count = max(1, int(self.fraction * size))
        parents = ranked[:count]
        worst = ranked[max(count, len(ranked) - count) :]  # never one of the parents
        replaced = {*worst, *(set(range(size)) - set(alive))} if parents else set()
        sources, after = list(range(size)), [dict(each) for each in values]
        for n in sorted(replaced):
            sources[n] = parents[int(rng.integers(len(parents)))]
            after[n] = self._perturbed(values[sources[n]], rng)
        return Generation(sources, after)

    def _perturbed(self, values: Mapping[str, float], rng: np.random.Generator) -> dict[str, float]:
        found = {}
        for path, dimension in self.space.items():
            low, high = dimension.ends()
            scaled = values[path] * _FACTORS[int(rng.integers(2))]
            drawn = _draw(dimension, rng)  # always, so that the next numbers do not depend on it
            value = drawn if rng.random() < _REDRAWN else scaled
            found[path] = float(np.clip(value, low, high))
        return found


def _draw(dimension: Float, rng: np.random.Generator) -> float:
    low, high = dimension.ends()
    if dimension.log:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(rng.uniform(low, high))


def _number(value: float | None) -> float:
    return -math.inf if value is None else value
