"""Packing: several sequences per row, to minimize padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.data.examples.examples import Examples, joined, make_order, stacked
from distaff.data.loader import drops_remainder
from distaff.data.positioned import Positioned
from distaff.data.sequences.grouped import Group, Grouped, Piece
from distaff.data.sequences.sequences import SequencePart, check_overlong, padded, parts_of
from distaff.errors import BatchError, leaf_name

_ROWS_PER_BATCH_ROW = 4
_OWN = ("segment_ids", "positions")


def packed(
    examples: Examples,
    length: int,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    remainder: Literal["keep", "drop"] | None = None,
    overlong: Literal["error", "cut", "drop", "split"] = "error",
    open_rows: int | None = None,
) -> Positioned:
    """Returns a loader whose rows contain several sequences each, one after the other.

    A sequence is added to the first open row with enough room. If no row has, and no more rows
    may be open, the fullest `batch_size` rows become a batch, and the sequence begins a new row.
    The number of batches in a shuffled epoch depends on its order: pass `steps_per_epoch` if a
    schedule needs their number.

    Args:
        examples: tokens, int `[n]`, or dicts of arrays of one length, `[n, ...]`, such as
            `{"tokens": ..., "mask": ...}`. Empty examples are omitted.
        length: length of a row. A language model predicts `length - 1` of its tokens.
        batch_size: rows in a batch.
        shuffle: whether each epoch has a new order.
        seed: seed of the orders, not negative.
        remainder: what to do with a short last batch: `"keep"` yields it at its own size (an
            evaluation pads and masks it); `"drop"`, the default when shuffling, omits it.
        overlong: what to do with sequences longer than a row: raise an error, cut them, drop them,
            or split them into several sequences.
        open_rows: maximal number of open rows, at least `batch_size`; default: four times
            `batch_size`. More rows need less padding and more memory.

    Returns:
        A loader of the examples' entries, `[batch, length, ...]`, with `tokens` in int32, and zero
        as padding. It adds `segment_ids`, int32 `[batch, length]`, which numbers the sequences of a
        row from 1 and is 0 for padding, and `positions`, int32 `[batch, length]`, which counts from
        0 in each sequence.

    Raises:
        BatchError: the examples have no length; while reading: one is not a sequence or too long,
            or they fill no batch.
        ConfigError: an option is out of range.

    >>> loader = packed([np.array([5, 6]), np.array([7, 8, 9]), np.array([4])], 4, batch_size=2)
    >>> batch = next(iter(loader))
    >>> batch["tokens"].tolist(), batch["segment_ids"].tolist()
    ([[5, 6, 4, 0], [7, 8, 9, 0]], [[1, 1, 2, 0], [1, 1, 1, 0]])
    """
    check_overlong(overlong, ("error", "cut", "drop", "split"))
    order = make_order(examples, batch_size, shuffle=shuffle, seed=seed)
    num_rows = _ROWS_PER_BATCH_ROW * batch_size if open_rows is None else open_rows
    rows = _PackedRows(
        whole("length", length),
        whole("batch_size", batch_size),
        whole("open_rows", num_rows, least=batch_size),
        overlong,
        drops_remainder(remainder, shuffle),
    )
    identity = {**order.identity(), **rows._asdict()}
    options: Any = {"remainder": "keep", "overlong": overlong, "open_rows": open_rows}
    return Positioned(
        Grouped(examples, order, rows),
        identity=identity,
        in_order=lambda: packed(examples, length, batch_size, **options),
    )


class _PackedRows(NamedTuple):
    """A grouping whose groups are rows, in order of their first sequence."""

    length: int
    batch_size: int
    open_rows: int
    overlong: str
    drop: bool

    def empty(self) -> list[Group]:
        return []

    def parts(self, index: int, example: Any) -> list[SequencePart]:
        parts = parts_of(example, index, self.length, self.overlong)
        return [part for part in parts if part.length]

    def put(self, groups: list[Group], piece: Piece) -> Batch | None:
        most = self.length - piece.part.length
        row = next((row for row in groups if row.length <= most), None)
        full = self._fullest(groups) if row is None and len(groups) == self.open_rows else []
        if row is None:
            row = Group()
            groups.append(row)
        row.add(piece)
        return self._batch(full) if full else None

    def rest(self, groups: list[Group]) -> Iterator[Batch]:
        while len(groups) >= self.batch_size or (groups and not self.drop):
            yield self._batch(self._fullest(groups))

    def _fullest(self, groups: list[Group]) -> list[Group]:
        """Removes and returns the fullest rows, as many as a batch has, in order."""
        by_length = sorted(range(len(groups)), key=lambda row: -groups[row].length)
        taken = sorted(by_length[: self.batch_size])
        rows = [groups[row] for row in taken]
        for row in reversed(taken):
            del groups[row]
        return rows

    def _batch(self, rows: Sequence[Group]) -> Batch:
        return stacked([padded(_concatenated(row.pieces), self.length, 0) for row in rows])


def _concatenated(pieces: Sequence[Piece]) -> SequencePart:
    """Concatenates the parts of a row, and adds `segment_ids` and `positions`."""
    lengths = [piece.part.length for piece in pieces]
    leaves = joined(_concatenated_leaf, [piece.part.leaves for piece in pieces])
    own = [name for name in _OWN if name in leaves]
    if own:
        raise BatchError(
            f"Packing adds the entries {_OWN}; the examples already have {own}. Rename these "
            "(data.MappedExamples)."
        )
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    leaves |= {"segment_ids": segment_ids, "positions": positions}
    return SequencePart(sum(lengths), leaves)


def _concatenated_leaf(path: tuple[Any, ...], leaves: Sequence[Any]) -> np.ndarray:
    shapes = {leaf.shape[1:] if leaf.ndim else None for leaf in leaves}
    if None in shapes or len(shapes) > 1:
        raise BatchError(
            "Packed leaves must be arrays [length, ...], of one shape after the first axis; "
            f"{leaf_name(path)!r} has the shapes {sorted({leaf.shape for leaf in leaves})}. Drop "
            "it, or repeat a scalar along the sequence (data.MappedExamples)."
        )
    return np.concatenate(leaves)
