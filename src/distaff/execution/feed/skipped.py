"""Batches that a run goes on without, after it has gone back from a bad step."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import NamedTuple


class SkippedBatches(NamedTuple):
    """Consecutive batches of one epoch.

    Attributes:
        epoch: counted from 1.
        start: the first of them, counted from 0 in the order of that epoch.
        stop: the first one after them; it may lie behind the epoch's end.
        back_to: the step that the run has gone back to because of them.
    """

    epoch: int
    start: int
    stop: int
    back_to: int


def skipped_batches(stretches: Iterable[SkippedBatches], epoch: int) -> Set[int]:
    """Returns which batches of an epoch are in one of the stretches."""
    ranges = (range(each.start, each.stop) for each in stretches if each.epoch == epoch)
    return {batch for batches in ranges for batch in batches}


def num_drawn(steps: int, without: Set[int]) -> int:
    """Returns how many batches of an epoch have been drawn, up to the last one trained on.

    Args:
        steps: how many of them have been trained on.
        without: which batches are left out.
    """
    drawn = steps
    for batch in sorted(without):
        drawn += batch < drawn
    return drawn


_RELAPSE = 128
"""After so many batches without a bad one, the next bad one is other trouble."""


def relapses(
    stretches: Iterable[SkippedBatches], epoch: int, batch: int, length: int | None
) -> int:
    """Returns how many stretches a bad batch comes shortly after.

    Args:
        stretches: that are left out already.
        epoch: of the bad batch.
        batch: which one of that epoch, counted from 0.
        length: batches in an epoch; None if that is not known.
    """
    known = [each for each in stretches if each.epoch == epoch or length is not None]
    since = ((epoch - each.epoch) * (length or 0) + batch - each.stop for each in known)
    return sum(batches <= _RELAPSE for batches in since)
