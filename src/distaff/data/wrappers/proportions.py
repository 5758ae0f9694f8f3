"""Proportions: whose turn it is, so that each has had its share at every moment."""

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
"""Turns that come again after so many at most are drawn once, and kept: 256 KiB a mixture."""


def check_weight(name: str, weight: Any) -> None:
    """Checks a weight.

    Args:
        name: of the loader that has it.
        weight: any value.

    Raises:
        ConfigError: it is not a positive, finite number, in double precision.
    """
    if not 0 < as_float(weight) < math.inf:
        remedy = f" Leave {name!r} out." if as_float(weight) == 0 else ""
        raise ConfigError(
            f"A weight is a positive, finite number; that of {name!r} is {weight!r}.{remedy}"
        )


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
        taken: how many turns each one has had, all of them as `turns` gave them.
        count: how many there are.

    Returns:
        The index of a source for each turn, int32 `[count]`.

    >>> turns((3, 1), (0, 0), 8).tolist()
    [0, 0, 1, 0, 0, 0, 1, 0]
    """
    if sum(shares) > _LONGEST_ROUND:
        return _drawn(shares, taken, count)
    start = sum(taken) % sum(shares)
    return _round(shares).take(np.arange(start, start + count), mode="wrap")


@lru_cache(maxsize=16)
def _round(shares: tuple[int, ...]) -> np.ndarray:
    """Returns the turns of one round, after which they come again."""
    return _drawn(shares, [0] * len(shares), sum(shares))


def _drawn(shares: Sequence[int], taken: Sequence[int], count: int) -> np.ndarray:
    """Draws turns: of the sources that are due, a heap names the one whose last chance is next.

    With `k` sources, `p = 2 * k - 2`, a share `s` of `total`, and `h` turns had, a source is due
    from turn `(p * h + 1) * total / (p * s)` on, rounded up, and to be served until one turn after
    `(p * (h + 1) - 1) * total / (p * s)`, rounded down.
    """
    number, total, reached = len(shares), sum(shares), sum(taken)
    part = max(2 * number - 2, 1)
    units = [part * share for share in shares]
    step, last = part * total, (part - 2) * total
    # Numerators of when each one is due, counted from the first of these turns.
    due = [
        (part * had + 1) * total - reached * unit for had, unit in zip(taken, units, strict=True)
    ]
    from_turn: list[list[int]] = [[] for _ in range(count + 1)]
    for source, unit in enumerate(units):
        from_turn[min(max((due[source] - 1) // unit, 0), count)].append(source)
    heap: list[int] = []
    found = []
    for turn in range(count):
        for source in from_turn[turn]:
            heappush(heap, (due[source] + last) // units[source] * number + source)
        source = heappop(heap) % number
        found.append(source)
        due[source] += step
        begins = (due[source] - 1) // units[source]
        if begins < count:
            from_turn[begins if begins > turn else turn + 1].append(source)
    return np.array(found, np.int32)


def check_weights(loaders: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Checks that each loader of a mixture has a weight, and that no two read the same one.

    Raises:
        ConfigError: it is not so.
    """
    if not isinstance(loaders, Mapping) or not isinstance(weights, Mapping) or not loaders:
        raise ConfigError(
            "A mixture takes a dict of loaders by name, and a dict of their weights; got "
            f"{type(loaders).__name__} and {type(weights).__name__}. Write for example "
            "Mixture({'web': a, 'books': b}, {'web': 3, 'books': 1})."
        )
    if loaders.keys() != weights.keys() or not all(isinstance(name, str) for name in loaders):
        raise ConfigError(
            "A mixture has a weight for each loader, under the same name, a str; got the loaders "
            f"{list(loaders)} and weights of {list(weights)}."
        )
    for name, weight in weights.items():
        check_weight(name, weight)
    names: dict[int, str] = {}
    pairs = ((name, source) for name, each in loaders.items() for source in sources(each))
    for name, source in pairs:
        other = names.setdefault(id(source), name)
        if other != name:
            raise ConfigError(
                f"The loaders of a mixture are read independently; {other!r} and {name!r} are the "
                "same object, or read the same one. Give it once, with the sum of the weights, or "
                "make a second one."
            )
