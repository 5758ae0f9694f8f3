"""Assigns turns to the loaders of a mixture in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

import numpy as np

from distaff.core.config.checks import as_float
from distaff.data.loader import sources
from distaff.errors import ConfigError

_LONGEST_ROUND = 2**16
"""Turns with a period up to this are computed once and cached: 256 KiB a mixture."""


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the smallest integers with the same proportions as positive, finite weights.

    A float counts as its shortest decimal representation.

    >>> shares([0.7, 0.2, 0.1])
    (7, 2, 1)
    """
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(each.denominator for each in exact))
    whole = [int(each * unit) for each in exact]
    return tuple(each // math.gcd(*whole) for each in whole)


def turns(shares: tuple[int, ...], taken: Sequence[int], count: int) -> np.ndarray:
    """Returns the source of each of the next turns, int32 `[count]`.

    After any `n` turns, each of `k` sources has had its share of `n` to within
    `1 - 1 / (2 * k - 2)` turns: R. Tijdeman, The chairman assignment problem, Discrete Mathematics
    32 (1980), pages 323-330. Among the sources that are due, the one with the earliest deadline
    gets the turn. Choosing the source that is furthest behind is not enough: with ten sources, some
    are then more than one turn behind.

    Args:
        shares: share of each source, from `shares`.
        taken: number of turns that each source has had, all assigned by `turns`.
        count: number of turns.

    >>> turns((3, 1), (0, 0), 8).tolist()
    [0, 0, 1, 0, 0, 0, 1, 0]
    """
    if sum(shares) > _LONGEST_ROUND:
        return _assign(shares, taken, count)
    start = sum(taken) % sum(shares)
    return _period(shares).take(np.arange(start, start + count), mode="wrap")


@lru_cache(maxsize=16)
def _period(shares: tuple[int, ...]) -> np.ndarray:
    """Returns the turns of one period."""
    return _assign(shares, [0] * len(shares), sum(shares))


def _assign(shares: Sequence[int], taken: Sequence[int], count: int) -> np.ndarray:
    """Assigns turns; a heap orders the sources that are due by their deadlines.

    With `k` sources, `p = 2 * k - 2`, a share `s` of `total`, and `h` turns had, a source is due
    from turn `(p * h + 1) * total / (p * s)`, rounded up, and its deadline is one turn after
    `(p * (h + 1) - 1) * total / (p * s)`, rounded down.
    """
    number, total, reached = len(shares), sum(shares), sum(taken)
    part = max(2 * number - 2, 1)
    units = [part * share for share in shares]
    step, last = part * total, (part - 2) * total
    # Numerators of the turns from which each source is due, relative to the first of these turns.
    due = [
        (part * had + 1) * total - reached * unit for had, unit in zip(taken, units, strict=True)
    ]
    from_turn: list[list[int]] = [[] for _ in range(count + 1)]
    for source, unit in enumerate(units):
        from_turn[min(max((due[source] - 1) // unit, 0), count)].append(source)
    heap: list[int] = []
    assigned = []
    for turn in range(count):
        for source in from_turn[turn]:
            heappush(heap, (due[source] + last) // units[source] * number + source)
        source = heappop(heap) % number
        assigned.append(source)
        due[source] += step
        begins = (due[source] - 1) // units[source]
        if begins < count:
            from_turn[begins if begins > turn else turn + 1].append(source)
    return np.array(assigned, np.int32)


def check_weights(loaders: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Checks that each loader of a mixture has a positive weight, and no two share a source."""
    if not isinstance(loaders, Mapping) or not isinstance(weights, Mapping) or not loaders:
        raise ConfigError(
            "A mixture takes a dict of loaders by name, and a dict of their weights; got "
            f"{type(loaders).__name__} and {type(weights).__name__}. Write, for example, "
            "Mixture({'web': a, 'books': b}, {'web': 3, 'books': 1})."
        )
    if loaders.keys() != weights.keys() or not all(isinstance(name, str) for name in loaders):
        raise ConfigError(
            "A mixture needs a weight for each loader, under the same name, a str; got the loaders "
            f"{list(loaders)} and weights of {list(weights)}."
        )
    for name, weight in weights.items():
        if not 0 < as_float(weight) < math.inf:
            remedy = f" Remove {name!r}." if as_float(weight) == 0 else ""
            raise ConfigError(
                f"A weight must be a positive, finite number; that of {name!r} is "
                f"{weight!r}.{remedy}"
            )
    names: dict[int, str] = {}
    pairs = ((name, source) for name, each in loaders.items() for source in sources(each))
    for name, source in pairs:
        other = names.setdefault(id(source), name)
        if other != name:
            raise ConfigError(
                f"The loaders of a mixture must be independent; {other!r} and {name!r} are the "
                "same object, or read the same one. Pass it once, with the sum of the weights, or "
                "make a second one."
            )
