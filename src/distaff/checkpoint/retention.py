"""Which checkpoints of a run may go."""

from __future__ import annotations

from collections.abc import Iterable


def expired(steps: Iterable[int], *, keep_last: int, best: int | None) -> tuple[int, ...]:
    """Returns the steps whose checkpoints are no longer needed.

    The newest ones are always kept, so that a run can resume from where it stopped, however bad
    its last metrics are.

    Args:
        steps: the steps that have a checkpoint, in any order.
        keep_last: how many of the newest to keep, at least 1.
        best: the step of the best model, kept as well; None where no model was judged yet.

    Returns:
        The steps to remove, ascending.

    >>> expired([10, 20, 30, 40], keep_last=1, best=20)
    (10, 30)
    """
    return tuple(step for step in sorted(steps)[:-keep_last] if step != best)
