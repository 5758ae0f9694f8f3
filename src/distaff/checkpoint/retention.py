"""Which checkpoints of a run may go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from distaff.checkpoint.protocol import Store
from distaff.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """How many checkpoints of a run are kept.

    Args:
        keep_last: how many of the newest, at least 1.
        keep_best: how many of the best, at least 1; None keeps all that are named as best.
        keep_every: those whose step is a multiple of it, at least 1; None keeps none for that
            reason.

    Raises:
        ConfigError: one of them is less than 1.
    """

    keep_last: int = 2
    keep_best: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(
                f"A run keeps at least its newest checkpoint, or it could not resume; "
                f"keep_last is {self.keep_last}. Pass 1 or more, or a NullStore to keep none."
            )
        if self.keep_best is not None and self.keep_best < 1:
            raise ConfigError(
                f"A run keeps at least its best checkpoint, which it ends with; keep_best is "
                f"{self.keep_best}. Pass 1 or more, or None to keep all that are named as best."
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(
                f"The checkpoints that are kept lie a number of steps apart; keep_every is "
                f"{self.keep_every}. Pass 1 or more, or None to keep none for that reason."
            )

    def expired(
        self, steps: Set[int], info: Mapping[str, Any], provisional: Set[int] = frozenset()
    ) -> tuple[int, ...]:
        """Returns what is no longer needed.

        Args:
            steps: those that have a checkpoint.
            info: of the newest one. Of the best steps that it names, those that are there count: a
                save that has failed, or that waits, takes the place of none.
            provisional: steps whose checkpoints go as soon as there is a newer one.
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
    """Returns the steps whose checkpoints are no longer needed.

    The newest ones are always kept, so that a run can resume from where it stopped, however bad
    its last metrics are.

    Args:
        steps: the steps that have a checkpoint, in any order.
        keep_last: how many of the newest to keep, at least 1.
        best: the steps of the best models, kept as well; empty where none was judged yet.
        keep_every: the multiples of it are kept as well; None keeps none for that reason.

    Returns:
        The steps to remove, ascending.

    >>> expired([10, 20, 30, 40, 50], keep_last=1, best=[20], keep_every=40)
    (10, 30)
    """
    return tuple(
        step
        for step in sorted(steps)[:-keep_last]
        if step not in best and not (keep_every and step % keep_every == 0)
    )


def best_steps(info: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the steps of the best models, best first, that an info names.

    Args:
        info: of a checkpoint. `best_steps` is a list; without it, `best_step` is one step or None.
    """
    named = info.get("best_steps", [info.get("best_step")])
    return tuple(step for step in named if type(step) is int) if isinstance(named, list) else ()


def named_best(store: Store) -> tuple[int | None, tuple[int, ...]]:
    """Returns the newest checkpoint whose info can be read, and the best ones that it names.

    Args:
        store: of the run.

    Returns:
        Its step, None where there is no checkpoint; and of the best steps those that have a
        checkpoint, best first.

    Raises:
        CheckpointError: there are checkpoints, and none can be read; it is that of the newest.
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
