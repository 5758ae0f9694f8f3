"""Batches that a run skips after it rolled back from a bad step."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import NamedTuple


class SkippedBatches(NamedTuple):
    """Consecutive batches of one epoch.

    Attributes:
        epoch: counted from 1.
        start: the first batch to skip, counted from 0 in the order of that epoch.
        stop: the first batch after them; may exceed the length of the epoch.
        back_to: the step to which the run rolled back because of them.
    """

    epoch: int
    start: int
    stop: int
    back_to: int


def skipped_batches(skipped: Iterable[SkippedBatches], epoch: int) -> Set[int]:
    """Returns the batches of an epoch to skip, counted from 0."""
    ranges = (range(each.start, each.stop) for each in skipped if each.epoch == epoch)
    return {batch for batches in ranges for batch in batches}


def num_drawn(steps: int, without: Set[int]) -> int:
    """Returns the number of batches drawn in an epoch, up to the last one trained on.

    Args:
        steps: batches trained on.
        without: batches to skip, counted from 0.
    """
    drawn = steps
    for batch in sorted(without):
        drawn += batch < drawn
    return drawn


_RELAPSE = 128
"""A bad batch after more batches than this is considered a new problem."""


def relapses(skipped: Iterable[SkippedBatches], epoch: int, batch: int, length: int | None) -> int:
    """Returns how often batches were skipped shortly before a bad batch.

    Args:
        skipped: the batches skipped so far.
        epoch: epoch of the bad batch.
        batch: its index in that epoch, counted from 0.
        length: batches per epoch; None if unknown.
    """
    known = [each for each in skipped if each.epoch == epoch or length is not None]
    since = ((epoch - each.epoch) * (length or 0) + batch - each.stop for each in known)
    return sum(batches <= _RELAPSE for batches in since)
