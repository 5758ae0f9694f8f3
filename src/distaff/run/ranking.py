"""Ranks the models of a run, best first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from distaff.run.result import Best

Better: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any] | None], bool]
"""Returns whether new metrics are better than old ones; the old are None for the first model."""


def insert(models: Sequence[Best], new: Best, better: Better, *, is_best: bool) -> tuple[Best, ...]:
    """Returns the ranking with a new model inserted, after models of equal rank.

    Args:
        models: the ranking, best first.
        new: the model just validated.
        better: compares the metrics of two models.
        is_best: whether `new` is better than the first model. If it is not and there is no other
            model, it is not inserted.
    """
    others = [model for model in models if model.step != new.step]
    if is_best:
        return (new, *others)
    if not others:
        return ()
    place = 1
    while place < len(others) and not better(new.metrics, others[place].metrics):
        place += 1
    return (*others[:place], new, *others[place:])


def retain(
    models: Sequence[Best], number: int, steps: Collection[int] | None = None
) -> tuple[Best, ...]:
    """Returns the best models, `number` of them with a checkpoint.

    A pending checkpoint may still fail, so its model does not count. A model without a checkpoint
    is dropped once there is a newer checkpoint.

    Args:
        models: the ranking, best first.
        number: how many to retain, at least 1.
        steps: the steps with a checkpoint; None if each model has one, or the run ends.
    """
    if steps is None:
        return tuple(models[:number])
    newest = max(steps, default=-1)
    best, num_saved = [], 0
    for model in models:
        is_saved = model.step in steps
        if num_saved < number and (is_saved or model.step > newest):
            best.append(model)
            num_saved += is_saved
    return tuple(best)
