"""Limited: yields only the first batches of each epoch, to try out code on little data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import Any, Self, TypeAlias

import jax
import numpy as np

from distaff.core.config.checks import as_float, whole
from distaff.core.typing import Batch
from distaff.core.views.brief import brief, length
from distaff.data.loader import Loader, abandon, close_made, first_batch, in_order, num_batches
from distaff.errors import BatchError, ConfigError, nearest

Limit: TypeAlias = int | float | Mapping[str, int | float]
"""Most batches of an epoch: a number; a fraction, as a float; or these by the name of a loader."""

_SPLITS = ("train", "val", "test")


class Limited:
    """A loader whose epochs end after some batches; the rest of each epoch is abandoned.

    Args:
        loader: source of the batches.
        num_batches: maximal number of batches in an epoch, at least 1.

    >>> [batch.tolist() for batch in Limited(ArrayLoader(np.arange(6), batch_size=2), 2)]
    [[0, 1], [2, 3]]
    """

    def __init__(self, loader: Loader, num_batches: int) -> None:
        self.loader, self._most = loader, num_batches
        self._taken, self._is_over = 0, False
        self._resumed = self._is_behind = False

    def __repr__(self) -> str:
        return brief(self, repr(self.loader), length(self))

    def __len__(self) -> int:
        length = num_batches(self.loader)
        return self._most if length is None else min(length, self._most)

    def __iter__(self) -> Iterator[Batch]:
        # `set_state` restored the end of an epoch: the loader would continue it.
        if self._is_behind:
            abandon(self.loader)
        left = self._most - (self._taken if self._resumed else 0)
        self._taken, self._is_over = self._most - left, False
        self._is_behind, self._resumed = not left, False
        if left:
            yield from self._some(left)
        self._taken, self._is_over = 0, self._taken == self._most

    def _some(self, count: int) -> Iterator[Batch]:
        batches: Any = iter(self.loader)
        try:
            for batch in islice(batches, count):
                self._taken += 1
                yield batch
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def peek(self) -> Batch:
        """Returns the next batch without consuming it."""
        return first_batch(self.loader)

    def in_order(self) -> Self | None:
        """Returns a loader of the first batches in the order of the data; see `Loader`."""
        view = in_order(self.loader)
        return None if view is None else type(self)(view, self._most)

    def close_made(self) -> bool:
        """Closes the loaders that the loader made itself; returns whether there were any."""
        return close_made(self.loader)

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the loader, and the number of batches yielded in the epoch."""
        inner = dict(self.loader.get_state())
        return {"taken": self._taken, "is_over": int(self._is_over), "loader": inner}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position that `get_state` returned.

        Raises:
            BatchError: the position was saved by another loader.
        """
        taken, is_over = state.get("taken"), state.get("is_over")
        fits = type(taken) is int and 0 <= taken <= self._most and is_over in (0, 1)
        if state.keys() != {"taken", "is_over", "loader"} or not fits:
            raise BatchError(
                f"An epoch is limited to {self._most} batches; the saved position is "
                f"{dict(state)}. Resume with the same limit, or start a new run."
            )
        self.loader.set_state(state["loader"])
        self._taken, self._is_over = int(state["taken"]), bool(is_over)
        self._resumed, self._is_behind = not is_over, bool(is_over)


def limited(loader: Loader, num_batches: int | None) -> Loader:
    """Returns a loader whose epochs have at most `num_batches` batches; None for no limit."""
    return loader if num_batches is None else Limited(loader, num_batches)


def check_limit(name: str, value: Any) -> Limit:
    """Checks an option that is a `Limit`.

    Raises:
        ConfigError: a number is out of range, or no loader has this name.
    """
    if not isinstance(value, Mapping):
        return _check_number(name, value)
    for split in value:
        if split not in _SPLITS and not (isinstance(split, str) and split.startswith("val_")):
            raise ConfigError(f"{name} has no loader {split!r}. {nearest(str(split), _SPLITS)}")
    return {split: _check_number(f"{name}[{split!r}]", each) for split, each in value.items()}


def _check_number(name: str, value: Any) -> int | float:
    if isinstance(value, Integral) and not isinstance(value, bool) and value >= 1:
        return whole(name, value)
    if not isinstance(value, Integral) and 0 < as_float(value) <= 1:
        return as_float(value)
    raise ConfigError(
        f"{name} must be an integer, at least 1, or a fraction of the batches, such as 0.1; got "
        f"{value!r}."
    )


def check_names(limit: Limit | None, val_names: Iterable[str]) -> None:
    """Raises ConfigError if a limit names a validation loader that does not exist."""
    known = {*_SPLITS, *val_names}
    for name in limit if isinstance(limit, Mapping) else ():
        if name not in known:
            raise ConfigError(f"limit_batches has no loader {name!r}. {nearest(name, known)}")


def most_batches(limit: Limit | None, name: str, length: int | None) -> int | None:
    """Returns the most batches of a loader in an epoch; None for all.

    >>> most_batches({"train": 100, "val": 0.25}, "val_clean", 10)
    2

    Args:
        limit: a fraction is rounded down, and is at least one batch. A loader `val_clean` without a
            limit of its own has that of `val`.
        name: name of the loader.
        length: its batches in an epoch; None if unknown.

    Raises:
        ConfigError: the limit is a fraction, and the length is unknown.
    """
    of_val = name.partition("_")[0]
    share = limit.get(name, limit.get(of_val)) if isinstance(limit, Mapping) else limit
    if share is None or isinstance(share, int):
        return share
    if length is None:
        raise ConfigError(
            f"A limit of {share:g} of the {name} loader needs its length, but it has none. Give a "
            f"number of batches, such as limit_batches={{{name!r}: 100}}."
        )
    return max(1, math.floor(round(share * length, 9)))


def unlimited(loader: Loader) -> Loader:
    """Returns the loader inside a `Limited`; other loaders are returned unchanged."""
    return loader.loader if isinstance(loader, Limited) else loader


def first_batches(loader: Loader, count: int) -> list[Batch]:
    """Returns copies of the next `count` batches, or fewer, and restores the position if possible.

    A loader that cannot go back, such as a `Stream`, continues after these batches.
    """
    state = loader.get_state()
    batches = [jax.tree.map(np.array, batch) for batch in islice(loader, count)]
    try:
        loader.set_state(state)
    except BatchError:
        loader.set_state(loader.get_state())
    return batches
