"""Retention: which checkpoints of a run to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from distaff.checkpoint.protocol import Store
from distaff.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """The number of checkpoints to keep.

    Args:
        keep_last: number of newest checkpoints, at least 1.
        keep_best: number of best checkpoints, at least 1; None for all that are named as best.
        keep_every: also keep checkpoints whose step is a multiple of this, at least 1; None to
            disable.

    Raises:
        ConfigError: a number is less than 1.
    """

    keep_last: int = 2
    keep_best: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(
                f"A run keeps at least its newest checkpoint, in order to resume; "
                f"keep_last is {self.keep_last}. Pass 1 or more, or a NullStore to keep none."
            )
        if self.keep_best is not None and self.keep_best < 1:
            raise ConfigError(
                f"A run keeps at least its best checkpoint, which it loads at the end; keep_best "
                f"is {self.keep_best}. Pass 1 or more, or None to keep all that are named as best."
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(
                f"keep_every is a number of steps between checkpoints; keep_every is "
                f"{self.keep_every}. Pass 1 or more, or None to disable it."
            )

    def expired(
        self, steps: Set[int], info: Mapping[str, Any], provisional: Set[int] = frozenset()
    ) -> tuple[int, ...]:
        """Returns the steps whose checkpoints are no longer needed.

        Args:
            steps: the steps that have a checkpoint.
            info: the info of the newest one. Best steps without a checkpoint do not count.
            provisional: steps whose checkpoints expire as soon as there is a newer one.
        """
        lasting = steps - provisional
        passed = (steps & provisional) - {max(steps, default=0)}
        best = [step for step in best_steps(info) if step in steps][: self.keep_best]
        gone = expired(lasting, keep_last=self.keep_last, best=best, keep_every=self.keep_every)
        return (*passed, *gone)


def expired(
    steps: Iterable[int],
    *,
    keep_last: int,
    best: Sequence[int] = (),
    keep_every: int | None = None,
) -> tuple[int, ...]:
    """Returns the steps whose checkpoints are no longer needed, ascending.

    The newest are always kept, so that a run can resume where it stopped.

    Args:
        steps: the steps that have a checkpoint, in any order.
        keep_last: number of newest steps to keep, at least 1.
        best: the steps of the best models, which are kept.
        keep_every: multiples of this are kept; None to disable.

    >>> expired([10, 20, 30, 40, 50], keep_last=1, best=[20], keep_every=40)
    (10, 30)
    """
    return tuple(
        step
        for step in sorted(steps)[:-keep_last]
        if step not in best and not (keep_every and step % keep_every == 0)
    )


def best_steps(info: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the steps of the best models, best first, in the info of a checkpoint.

    `info["best_steps"]` is a list; without it, `info["best_step"]` is one step or None.
    """
    named = info.get("best_steps", [info.get("best_step")])
    return tuple(step for step in named if type(step) is int) if isinstance(named, list) else ()


def named_best(store: Store) -> tuple[int | None, tuple[int, ...]]:
    """Returns the newest checkpoint whose info can be read, and the best ones that it names.

    Returns:
        Its step, None without any checkpoint; and the best steps that have a checkpoint, best
        first.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    steps, unread = store.steps(), []
    for step in reversed(steps):
        try:
            return step, tuple(best for best in best_steps(store.info(step)) if best in steps)
        except CheckpointError as error:
            unread.append(error)
    if unread:
        raise unread[0]
    return None, ()
