"""Splits arrays into parts, and into the folds of a cross-validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from distaff.core import optional
from distaff.core.config.checks import whole
from distaff.core.config.other_frameworks import spelled
from distaff.core.typing import PyTree
from distaff.data.tables.frames import FrameTable
from distaff.data.whole import whole_arrays
from distaff.errors import BatchError, ConfigError


@spelled({"test_size": "parts=(0.8, 0.2)", "random_state": "seed"})
def split(
    arrays: PyTree,
    parts: Sequence[float],
    *,
    seed: int = 0,
    stratify: Any = None,
    groups: Any = None,
) -> tuple[PyTree, ...]:
    """Splits arrays into parts at random, with each row in exactly one part.

    The rows of a part keep their order. The sizes are exact: those that add up to all rows, and
    are nearest to the fractions. With `groups` they are only approximate.

    Args:
        arrays: one array, a tuple or a dict of arrays `[examples, ...]`, or a `FrameTable`.
        parts: fractions that add up to 1, such as `(0.8, 0.2)`, or numbers of rows.
        seed: seed of the choice, not negative.
        stratify: the class of each example `[examples]`, such as the labels: each part then has the
            same share of each class, up to one example.
        groups: the group of each example `[examples]`, such as a patient: all examples of a group
            are then in one part.

    Returns:
        The parts, each with the structure of `arrays`.

    Raises:
        BatchError: the arrays differ in length, or a part would be empty.
        ConfigError: the parts do not add up, or both `stratify` and `groups` are given.

    >>> train, test = split(np.arange(10), (0.8, 0.2))
    >>> len(train), len(test), sorted([*train.tolist(), *test.tolist()]) == list(range(10))
    (8, 2, True)
    """
    arrays, count = _checked(arrays)
    sizes = _sizes(parts, count)
    random = np.random.default_rng(whole("seed", seed, least=0))
    if stratify is not None and groups is not None:
        raise ConfigError(
            "split takes stratify or groups, not both. For folds that are stratified and grouped, "
            "use k_fold."
        )
    if groups is not None:
        part_of = _by_group(_codes("groups", groups, count), sizes, random)
    else:
        classes = np.zeros(count, int) if stratify is None else _codes("stratify", stratify, count)
        part_of = _by_class(classes, sizes, random)
    return tuple(_rows_of(arrays, np.flatnonzero(part_of == part)) for part in range(len(sizes)))


@spelled({"n_splits": "k", "random_state": "seed"})
def k_fold(
    arrays: PyTree, k: int, *, seed: int = 0, stratify: Any = None, groups: Any = None
) -> Iterator[tuple[PyTree, PyTree]]:
    """Returns the `k` pairs `(train, val)` of a cross-validation, by scikit-learn's splitters.

    Every row is in the `val` of exactly one pair. The splitter is `KFold`, or with `stratify` or
    `groups` `StratifiedKFold`, `GroupKFold` or `StratifiedGroupKFold`, all of which shuffle.

    Args:
        arrays: one array, a tuple or a dict of arrays `[examples, ...]`, or a `FrameTable`.
        k: number of folds, at least 2.
        seed: seed of the folds, not negative.
        stratify: the class of each example `[examples]`; see `split`.
        groups: the group of each example `[examples]`; see `split`.

    Returns:
        An iterator over the pairs `(train, val)`, each part with the structure of `arrays`.

    Raises:
        BatchError: the arrays differ in length, or have too few examples, classes or groups.
        ConfigError: `k` or `seed` is out of range.
        MissingExtraError: scikit-learn is not installed.
    """
    arrays, count = _checked(arrays)
    folds = optional.load("sklearn", extra="folds").folds
    named = {"stratify": stratify, "groups": groups}
    coded = {n: None if x is None else _codes(n, x, count) for n, x in named.items()}
    k, seed = whole("k", k, least=2), whole("seed", seed, least=0)
    try:
        rows = folds(count, k, seed, **coded)
    except ValueError as error:
        raise BatchError(f"The {count} examples cannot make {k} folds: {error}") from error
    return ((_rows_of(arrays, train), _rows_of(arrays, val)) for train, val in rows)


def _checked(arrays: PyTree) -> tuple[PyTree, int]:
    """Returns arrays to take rows of, and the number of their rows."""
    found = whole_arrays(arrays, "given")
    if found is None:
        raise BatchError(
            f"Only whole arrays can be split; got a {type(arrays).__name__}. Pass an array, a "
            "tuple (inputs, labels) or a dict of arrays."
        )
    is_table = isinstance(arrays, FrameTable)
    return arrays if is_table else found, len(jax.tree.leaves(found)[0])


def _rows_of(arrays: PyTree, rows: np.ndarray) -> PyTree:
    if isinstance(arrays, FrameTable):
        return arrays.rows(rows)
    return jax.tree.map(lambda array: array[rows], arrays)


def _codes(name: str, values: Any, count: int) -> np.ndarray:
    """Returns the classes or groups of examples as indices from 0."""
    values = np.asarray(values)
    if values.shape != (count,):
        raise BatchError(
            f"{name} must have one value per example, shape {(count,)}; got {values.shape}."
        )
    return np.unique(values, return_inverse=True)[1]


def _sizes(parts: Sequence[float], count: int) -> np.ndarray:
    """Returns the number of rows of each part.

    Raises:
        ConfigError: the parts do not add up.
        BatchError: a part is empty.
    """
    parts = tuple(parts) if hasattr(parts, "__iter__") else (parts,)
    are_counts = all(isinstance(each, int | np.integer) for each in parts)
    total = count if are_counts else 1
    if not parts or min(parts) <= 0 or not math.isclose(math.fsum(parts), total, abs_tol=1e-6):
        raise ConfigError(
            f"parts must be positive fractions that add up to 1, such as (0.8, 0.2), or numbers of "
            f"rows that add up to {count}; got {parts}."
        )
    if are_counts:
        return np.asarray(parts)
    exact = np.asarray(parts) * count
    sizes = np.floor(exact + 1e-6).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1
    if not sizes.all():
        raise BatchError(
            f"Each part must have at least one example; the parts {parts} of {count} examples have "
            f"{sizes.tolist()}. Pass more examples, or other parts."
        )
    return sizes


def _by_class(classes: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns the part of each row: the share of each class is the same, up to rounding.

    Raises:
        BatchError: a class has fewer examples than there are parts.
    """
    counts = np.bincount(classes)
    smallest = min(counts.tolist())
    if smallest < len(sizes):
        raise BatchError(
            f"Each class must have an example for each of the {len(sizes)} parts; the smallest has "
            f"{smallest}. Drop its examples, or merge it with another class."
        )
    rows = [random.permutation(np.flatnonzero(classes == each)) for each in range(len(counts))]
    part_of, used = np.full(len(classes), len(sizes) - 1), np.zeros_like(counts)
    for part, size in enumerate(sizes[:-1]):
        taken = _apportioned(size, counts - used, random)
        for each, start, number in zip(rows, used, taken, strict=True):
            part_of[each[start : start + number]] = part
        used += taken
    return part_of


def _apportioned(size: int, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Divides `size` in proportion to `counts`, by largest remainders; ties are random."""
    shares, remainders = np.divmod(size * counts, counts.sum())
    largest = np.lexsort((random.random(len(counts)), -remainders))
    shares[largest[: size - shares.sum()]] += 1
    return shares


def _by_group(groups: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns the part of each row: each group goes to the part that misses the largest share.

    Raises:
        BatchError: a part gets no group.
    """
    counts = np.bincount(groups)
    part_of, missing = np.zeros(len(counts), int), sizes.astype(float)
    for group in random.permutation(len(counts)):
        part_of[group] = np.argmax(missing / sizes)
        missing[part_of[group]] -= counts[group]
    found = np.bincount(part_of, minlength=len(sizes))
    if not found.all():
        raise BatchError(
            f"Each part must have at least one group; the {len(counts)} groups fill the parts with "
            f"{found.tolist()} groups. Pass fewer parts, or larger ones."
        )
    return part_of[groups]
