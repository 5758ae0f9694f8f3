"""Proportions: whose turn it is, so that each has had its share at every moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns weights as the smallest whole numbers of the same proportions.

    A float counts as the shortest decimal number that it is written as.

    Args:
        weights: positive and finite.

    >>> shares([0.7, 0.2, 0.1])
    (7, 2, 1)
    """
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(each.denominator for each in exact))
    whole = [int(each * unit) for each in exact]
    return tuple(each // math.gcd(*whole) for each in whole)


def turns(shares: tuple[int, ...], taken: Sequence[int], count: int) -> np.ndarray:
    """Returns who takes each of the next turns.

    Of `n` turns from the first one on, each of `k` sources takes its share of `n` to within
    `1 - 1 / (2 * k - 2)` turns: by R. Tijdeman, The chairman assignment problem, Discrete
    Mathematics 32 (1980), pages 323-330. Of those whose share is due, the one takes a turn that
    could wait the least. To give it to whoever lacks the most is not enough: with ten sources, some
    are then more than one turn behind.

    Args:
        shares: of each source, as `shares` returns them.
        taken: how many turns each one has had.
        count: how many there are.

    Returns:
        The index of a source for each turn, int32 `[count]`; do not write to it.

    >>> turns((3, 1), (0, 0), 8).tolist()
    [0, 0, 1, 0, 0, 0, 1, 0]
    """
    # They come again after so many turns.
    rounds = sum(taken) // sum(shares)
    behind = tuple(had - rounds * share for had, share in zip(taken, shares, strict=True))
    return _turns(shares, behind, count)


@lru_cache(maxsize=1024)
def _turns(shares: tuple[int, ...], taken: tuple[int, ...], count: int) -> np.ndarray:
    had, total, common = list(taken), sum(shares), math.lcm(*shares)
    part = max(2 * len(shares) - 2, 1)
    sources = range(len(shares))
    found = np.empty(count, np.int32)
    for turn in range(count):
        reached = sum(taken) + turn + 1
        due = [i for i in sources if part * (shares[i] * reached - total * had[i]) >= total]
        chosen = min(due, key=lambda i: (part * (had[i] + 1) - 1) * (common // shares[i]))
        had[chosen] += 1
        found[turn] = chosen
    found.flags.writeable = False
    return found
