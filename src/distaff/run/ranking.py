"""The ranking of a run's models: the best ones so far, best first, each with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from distaff.run.result import Best

Better: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any] | None], bool]
"""Tells whether the metrics of a new model are better than those of an old one."""


def placed(models: Sequence[Best], new: Best, better: Better, *, is_best: bool) -> tuple[Best, ...]:
    """Returns a ranking with a new model where it belongs: behind those that are as good.

    Args:
        models: best first.
        new: the model just validated.
        better: compares two validations.
        is_best: whether it is better than the first of them; that is not asked again. The first
            model of a run may be refused, and is then not taken.
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


def kept(
    models: Sequence[Best], number: int, steps: Collection[int] | None = None
) -> tuple[Best, ...]:
    """Returns the best models, of which `number` have a checkpoint.

    A checkpoint that is being written may fail. Until it is there, its model takes the place of
    none; where it will never be, because there is a newer one, the model is dropped.

    Args:
        models: best first.
        number: how many, at least 1.
        steps: those that have a checkpoint; None where each model has one, or the run ends.
    """
    if steps is None:
        return tuple(models[:number])
    newest = max(steps, default=-1)
    best, num_there = [], 0
    for model in models:
        is_there = model.step in steps
        if num_there < number and (is_there or model.step > newest):
            best.append(model)
            num_there += is_there
    return tuple(best)
