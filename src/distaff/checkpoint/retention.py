"""Which checkpoints of a run may go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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
