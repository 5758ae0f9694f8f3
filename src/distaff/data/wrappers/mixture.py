"""Mixture: mixes several loaders by weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.data.loader import (
    canonicalize,
    first_batch,
    in_order,
    num_batches,
    num_examples,
    num_shapes,
)
from distaff.data.stream import Stream
from distaff.data.wrappers.proportions import check_weights, shares, turns
from distaff.data.wrappers.row_reader import Reader
from distaff.errors import BatchError, ChangedBatchesError, ConfigError, leaf_name, nearest

_SOURCE = "source"
_POSITION = {"loader", "used", "fingerprint"}


class Mixture:
    """A loader that mixes rows of several loaders in the proportions of their weights.

    The loader of each row depends on the weights alone: after any number of rows, each loader has
    contributed its share to within one row. Each loader keeps its own order, and starts its next
    epoch when it runs out, independently of the others. Do not iterate over a loader elsewhere
    while a mixture reads it.

    An epoch of the mixture is a number of batches. The next epoch continues where the last one
    stopped, even if that one was abandoned or failed. Every evaluation reads the first epoch. To
    evaluate every example once, pass the loaders by name, `val_loader={"web": ...}`, which gives a
    loss for each.

    Args:
        loaders: loaders, or data that `as_loader` accepts, by name; usually two or more.
        weights: a positive number for each name; only their proportions matter.
        by: `"example"` mixes rows within a batch; all loaders must then yield leaves of the same
            names, dtypes (after JAX's cast from 64 to 32 bits) and shapes after the first axis.
            `"batch"` yields whole batches, unchanged, each from one loader; the weights then count
            batches.
        batch_size: rows in every batch, with `by="example"`; default: the size of the first batch
            of the first loader.
        num_batches: batches in an epoch. Default: with `by="example"`, the rows of all loaders,
            estimated from their first batches, divided by `batch_size`; with `by="batch"`, the
            batches of all loaders. If a loader has no length, an epoch is endless: pass
            `steps_per_epoch` to the trainer.
        with_source: whether to add the entry `source` to each batch, a dict: the index of each
            row's loader, int32 `[batch]`.

    Raises:
        BatchError: an entry of `loaders` is not a loader.
        ConfigError: an option is out of range, names differ, or two names share a loader.

    >>> web, books = [np.arange(3)] * 2, [np.arange(10, 12)]
    >>> mixture = Mixture({"web": web, "books": books}, {"web": 3, "books": 1}, batch_size=4)
    >>> [batch.tolist() for batch in mixture]
    [[0, 1, 10, 2], [0, 1, 11, 2]]
    """

    def __init__(
        self,
        loaders: Mapping[str, Any],
        weights: Mapping[str, float],
        *,
        by: Literal["example", "batch"] = "example",
        batch_size: int | None = None,
        num_batches: int | None = None,
        with_source: bool = False,
    ) -> None:
        check_weights(loaders, weights)
        if by not in ("example", "batch"):
            raise ConfigError(f"Unknown by={by!r}. {nearest(str(by), ('example', 'batch'))}")
        batch_size = None if batch_size is None else whole("batch_size", batch_size)
        num_batches = None if num_batches is None else whole("num_batches", num_batches)
        if by == "batch" and batch_size is not None:
            raise ConfigError(
                f"With by='batch', the loaders determine the batch size; got {batch_size=}. Set it "
                "in the loaders, or mix by='example'."
            )
        self._by, self._batch_size, self._num_batches = by, batch_size, num_batches
        self._with_source = with_source
        self._shares = shares([weights[name] for name in loaders])
        self._readers = [
            Reader(each, name=name, whole=by == "batch") for name, each in loaders.items()
        ]
        self._taken = [0] * len(self._readers)
        self._batch, self._resumed = 0, False
        self._ahead: tuple[Batch, dict[str, Any]] | None = None

    def __len__(self) -> int:
        if self._plan.num_batches is None:
            raise TypeError(
                "The number of batches of a loader in the mixture is unknown: pass num_batches=... "
                "to Mixture, or steps_per_epoch."
            )
        return self._plan.num_batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._batch = 0
        self._resumed = False
        while self._batch != self._plan.num_batches:
            batch, self._ahead = self.peek(), None
            self._batch += 1
            yield batch
        self._batch = 0

    def peek(self) -> Batch:
        """Returns the next batch without consuming it.

        Raises:
            BatchError: a loader is empty, or its leaves differ from the first loader's.
        """
        if self._ahead is None:
            place = self._place()
            self._ahead = self._draw(), place
        return self._ahead[0]

    @property
    def loaders(self) -> tuple[Any, ...]:
        """The mixed loaders."""
        return tuple(reader.loader for reader in self._readers)

    @property
    def num_shapes(self) -> int:
        """Number of distinct shapes of the batches; see `distaff.data.num_shapes`."""
        return self._plan.num_shapes

    def in_order(self) -> Any:
        """Returns the first epoch of a mixture of the loaders in the order of their data.

        Each loader contributes its share of the rows, as in training: rows of a small loader may be
        repeated, and rows of a large one omitted. To evaluate every example once, pass the loaders
        by name.
        """
        if any(in_order(loader) is None for loader in self.loaders):
            return None
        return Stream(lambda: iter(_in_order(self)), length=self._plan.num_batches)

    def abandon(self) -> None:
        """Makes the next `iter()` begin a new epoch, which continues with the next rows."""
        self._resumed = False

    def close_made(self) -> bool:
        """Closes the loaders made from iterables, here or in inner loaders.

        Closed loaders start again; the others keep their positions.

        Returns:
            Whether any loader was closed.
        """
        closed = [reader.close_made() for reader in self._readers]
        if not any(closed):
            return False
        if self._ahead is not None:
            place, self._ahead = self._ahead[1], None
            self._taken = list(place["taken"])
            places = zip(self._readers, place["loaders"], closed, strict=True)
            for reader, position in ((each, at) for each, at, is_closed in places if not is_closed):
                with suppress(BatchError):  # a Stream cannot go back, and continues
                    reader.seek(position)
        return True

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last yielded batch, as JSON values.

        For each loader it has the position before its current batch, and the number of rows used of
        that batch.
        """
        place = self._place() if self._ahead is None else self._ahead[1]
        return {**self.identity(), "batch": self._batch, **place}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a position; the next `iter()` yields the rest of that epoch.

        If a loader cannot restore its position, all loaders keep theirs.

        Args:
            state: the result of `get_state` of a mixture with the same arguments.

        Raises:
            BatchError: the state is of another mixture, or a loader does not accept its position.
            ChangedBatchesError: a loader yields other batches than before.
        """
        here, changed = self.get_state(), None
        self._check(state)
        if any(state[name] != here[name] for name in ("taken", "loaders")):
            changed = self._seek(state["loaders"])
            self._ahead, self._taken = None, list(state["taken"])
        self._batch, self._resumed = state["batch"], True
        if changed:
            raise changed

    @cached_property
    def _plan(self) -> _Plan:
        """Checks the first batches of all loaders, and plans the epochs."""
        batches = [first_batch(each.loader, name=each.name) for each in self._readers]
        firsts = [canonicalize(batch) for batch in batches]
        rows = [num_examples(first) for first in firsts]
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), firsts[0])
        plan = _Plan(self._batch_size or rows[0], self._num_batches, example)
        if self._by == "example":
            for reader, first in zip(self._readers, firsts, strict=True):
                self._check_form(reader.name, first, plan.example)
        else:
            shapes = [str(jax.tree.map(lambda x: (x.shape, x.dtype), first)) for first in firsts]
            counts = {s: num_shapes(r.loader) for s, r in zip(shapes, self._readers, strict=True)}
            plan = plan._replace(num_shapes=sum(counts.values()))
        lengths = [num_batches(each.loader) for each in self._readers]
        known = [length for length in lengths if length is not None]
        if self._num_batches or len(known) < len(lengths):
            return plan
        if self._by == "batch":
            return plan._replace(num_batches=sum(known))
        total = sum(length * size for length, size in zip(known, rows, strict=True))
        return plan._replace(num_batches=max(1, total // plan.batch_size))

    def _draw(self) -> Batch:
        """Returns the next batch; if a loader fails, all loaders keep their positions."""
        plan, is_whole = self._plan, self._by == "batch"
        whose = turns(self._shares, self._taken, 1 if is_whole else plan.batch_size)
        taken = self._taken + np.bincount(whose, minlength=len(self._readers))
        if is_whole:
            batch, size = self._readers[whose[0]].look_at_batch()
            whose = whose.repeat(size)
        else:
            batch = self._mixed(whose)
        if self._with_source:
            batch = self._labelled(batch, whose)
        rows = np.bincount(whose, minlength=len(self._readers)).tolist()
        for reader, count in zip(self._readers, rows, strict=True):
            reader.take(count)
        self._taken = taken.tolist()
        return batch

    def _mixed(self, whose: np.ndarray) -> Batch:
        """Returns a batch of the next rows; `whose` is the loader of each row, int `[batch]`."""
        places, parts = [], []
        for index, reader in enumerate(self._readers):
            rows = np.flatnonzero(whose == index)
            for part in reader.look(len(rows)):
                self._check_form(reader.name, part, self._plan.example)
                size = num_examples(part)
                places.append(rows[:size])
                parts.append(part)
                rows = rows[size:]

        def mixed(*leaves: np.ndarray) -> np.ndarray:
            found = np.empty((len(whose), *leaves[0].shape[1:]), leaves[0].dtype)
            for rows, leaf in zip(places, leaves, strict=True):
                found[rows] = leaf
            return found

        return jax.tree.map(mixed, *parts)

    def _labelled(self, batch: Batch, whose: np.ndarray) -> Batch:
        if not isinstance(batch, dict) or _SOURCE in batch:
            found = f"the keys {list(batch)}" if isinstance(batch, dict) else type(batch).__name__
            raise BatchError(
                f"with_source adds the entry {_SOURCE!r} to batches, which must be dicts without "
                f"it; got {found}. Map the loaders to such dicts (data.MappedLoader), or omit "
                "with_source."
            )
        return {**batch, _SOURCE: whose}

    def _check_form(self, name: str, batch: Batch, example: Batch) -> None:
        if _form(batch) == _form(example):
            return
        first = self._readers[0].name
        raise BatchError(
            "The loaders of a mixture by example must yield the same leaves, with rows of the same "
            f"shape and dtype; {name!r} and {first!r} differ in {_difference(batch, example)}. "
            "Convert them (data.MappedLoader), or mix whole batches: by='batch'."
        )

    def identity(self) -> dict[str, Any]:
        """Returns the values that must be equal to restore a position."""
        return {
            "names": [reader.name for reader in self._readers],
            "shares": list(self._shares),
            "by": self._by,
            "batch_size": self._plan.batch_size if self._by == "example" else None,
            "num_batches": self._plan.num_batches,
        }

    def _place(self) -> dict[str, Any]:
        loaders = [reader.position() for reader in self._readers]
        return {"taken": list(self._taken), "loaders": loaders}

    def _check(self, state: Mapping[str, Any]) -> None:
        own, most = self.identity(), self._plan.num_batches
        saved = {name: state.get(name) for name in own}
        fits = saved == own and _is_place(state, len(self._readers))
        if not fits or (most is not None and state["batch"] > most):
            raise BatchError(
                "A position can only be restored in a mixture with the same loaders and options; "
                f"saved: {saved}, this mixture: {own}. Make it with the saved loaders, weights and "
                "options, or start a new run."
            )

    def _seek(self, positions: Sequence[Any]) -> ChangedBatchesError | None:
        """Moves all loaders; returns the error of one that yielded other batches on the way."""
        before = [reader.position() for reader in self._readers]
        changed = None
        try:
            for reader, position in zip(self._readers, positions, strict=True):
                changed = reader.seek(position) or changed
        except Exception:
            for reader, position in zip(self._readers, before, strict=True):
                with suppress(Exception):  # a Stream cannot go back
                    reader.seek(position)
            raise
        return changed


def _in_order(mixture: Mixture) -> Mixture:
    """Returns a mixture of the loaders in the order of their data, at its start."""
    view: Any = copy.copy(mixture)
    whole = mixture._by == "batch"
    view._readers = [
        Reader(in_order(reader.loader), name=reader.name, whole=whole)
        for reader in mixture._readers
    ]
    view._taken, view._batch = [0] * len(view._readers), 0
    view._resumed, view._ahead = False, None
    return view


class _Plan(NamedTuple):
    """The epochs and batches of a mixture, planned from the first batches of the loaders.

    `num_batches` is None for an endless epoch. `example` has the shapes and dtypes of the first
    loader. In `num_shapes`, loaders with equal first batches count once.
    """

    batch_size: int
    num_batches: int | None
    example: Batch
    num_shapes: int = 1


def _form(batch: Batch) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def _difference(batch: Batch, example: Batch) -> str:
    """Returns the first leaf in which two batches differ, with both dtypes and shapes."""
    found, expected = (
        {
            leaf_name(path): f"{leaf.dtype} [batch{''.join(f', {n}' for n in leaf.shape[1:])}]"
            for path, leaf in jax.tree.leaves_with_path(each)
        }
        for each in (batch, example)
    )
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            return f"{name!r}: {found.get(name, 'none')} and {expected.get(name, 'none')}"
    return f"structure: {jax.tree.structure(batch)} and {jax.tree.structure(example)}"


def _is_place(state: Mapping[str, Any], count: int) -> bool:
    """Whether a state holds valid positions of `count` loaders."""
    batch, taken, loaders = (state.get(name) for name in ("batch", "taken", "loaders"))
    if not isinstance(taken, list) or not isinstance(loaders, list):
        return False
    if not all(isinstance(each, Mapping) and each.keys() == _POSITION for each in loaders):
        return False
    counts = [batch, *taken, *(each["used"] for each in loaders)]
    are_counts = all(type(each) is int and each >= 0 for each in counts)
    return are_counts and len(taken) == len(loaders) == count
