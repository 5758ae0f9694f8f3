"""Bucketing: sequences of about the same length make a batch, padded to one of a few lengths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data.examples.examples import Examples, make_order, stacked
from distaff.data.loader import drops
from distaff.data.positioned import Positioned
from distaff.data.sequences.grouped import Group, Grouped, Piece
from distaff.data.sequences.sequences import SequencePart, check_overlong, padded, parts_of
from distaff.errors import BatchError, ConfigError


def bucketed(
    examples: Examples,
    boundaries: Sequence[int],
    batch_size: int | Sequence[int],
    *,
    shuffle: bool = False,
    seed: int = 0,
    remainder: Literal["keep", "drop"] | None = None,
    overlong: Literal["error", "cut", "drop"] = "error",
    pad_value: float = 0,
) -> Positioned:
    """Returns a loader whose batches hold sequences of about the same length.

    Each sequence is padded at its end to the least boundary that holds it, and waits in that bucket
    until there are enough for a batch. So batches have at most `len(boundaries)` lengths, and a
    step compiles once for each. An epoch has one order of examples, a function of `(seed, epoch)`,
    and holds each whole example once, but for what `remainder` and `overlong` leave out.

    Args:
        examples: dicts, all of whose arrays are sequences along their first axis, of one length,
            `[length, ...]`; scalars are not, and are stacked as they are. Or tokens alone,
            int `[length]`, which become the entry `tokens`.
        boundaries: lengths of the batches, in rising order. Sequences are at most as long as the
            last one.
        batch_size: examples in a batch; or one number for each boundary, such as more of the
            shorter ones.
        shuffle: whether each epoch has a new order.
        seed: makes the orders, not negative.
        remainder: what becomes of the short batches, at most one of each bucket, at the end of an
            epoch: `"keep"`, at their own sizes, which an evaluation pads and masks and for each of
            which a training step compiles once more; or `"drop"`, by default where it shuffles. A
            bucket with fewer examples than a batch has then gives none, which is warned of.
        overlong: what becomes of sequences beyond the last boundary: an error, or they are cut, or
            left out.
        pad_value: what numbers are padded with; bools are padded with False.

    Returns:
        A loader of the examples' entries, `[batch, boundary, ...]`; `tokens` in int32. With them
        comes `mask`, bool `[batch, boundary]`: what is no padding and, where examples have a
        `mask` of their own, true there.

    Raises:
        BatchError: the examples have no length; while it reads, one is no sequence or too long, or
            they fill no batch.
        ConfigError: an option is out of range.

    >>> loader = bucketed([np.arange(n) for n in (2, 7, 3, 8)], boundaries=(4, 8), batch_size=2)
    >>> [batch["tokens"].shape for batch in loader]
    [(2, 4), (2, 8)]
    """
    boundaries, sizes = _checked(boundaries, batch_size)
    check_overlong(overlong, ("error", "cut", "drop"))
    order = make_order(examples, min(sizes), shuffle=shuffle, seed=seed)
    buckets = _Buckets(boundaries, sizes, overlong, drops(remainder, shuffle), pad_value)
    identity = {
        **order.identity(),
        **buckets._asdict(),
        "boundaries": [*boundaries],
        "batch_sizes": [*sizes],
        "pad_value": repr(pad_value),  # NaN does not equal itself
    }
    source = Grouped(examples, order, buckets)
    options: Any = {"remainder": "keep", "overlong": overlong, "pad_value": pad_value}
    return Positioned(
        source,
        identity=identity,
        num_shapes=len(boundaries),
        in_order=lambda: bucketed(examples, boundaries, sizes, **options),
    )


class _Buckets(NamedTuple):
    """One group for each boundary."""

    boundaries: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    overlong: str
    drop: bool
    pad_value: float

    def empty(self) -> list[Group]:
        return [Group() for _ in self.boundaries]

    def parts(self, index: int, example: Any) -> list[SequencePart]:
        parts = parts_of(example, index, self.boundaries[-1], self.overlong)
        return [part._replace(leaves=_masked(part, index)) for part in parts]

    def put(self, groups: list[Group], piece: Piece) -> Batch | None:
        bucket = bisect_left(self.boundaries, piece.part.length)
        groups[bucket].add(piece)
        is_full = len(groups[bucket].pieces) == self.batch_sizes[bucket]
        return self._batch(groups, bucket) if is_full else None

    def rest(self, groups: list[Group]) -> Iterator[Batch]:
        for bucket, group in enumerate(groups):
            if group.pieces and not self.drop:
                yield self._batch(groups, bucket)
            elif group.pieces and not group.num_batches:
                warn(
                    f"All {len(group.pieces)} examples of the bucket of {self.boundaries[bucket]} "
                    f"are left out of the epoch: its batches have {self.batch_sizes[bucket]}. Give "
                    "it a smaller batch_size, fewer boundaries, or remainder='keep'.",
                    stacklevel=2,
                )

    def _batch(self, groups: list[Group], bucket: int) -> Batch:
        group, length = groups[bucket], self.boundaries[bucket]
        groups[bucket] = Group(num_batches=group.num_batches + 1)
        return stacked([padded(piece.part, length, self.pad_value) for piece in group.pieces])


def _masked(part: SequencePart, index: int) -> dict[str, Any]:
    mask = part.leaves.get("mask", np.ones(part.length, bool))
    if getattr(mask, "shape", None) != (part.length,) or mask.dtype != bool:
        raise BatchError(
            "The `mask` of an example tells which of its entries count, bool [length]; that of "
            f"example {index} is {mask!r}. Give it another name, or make it such an array."
        )
    return {**part.leaves, "mask": mask}


def _checked(
    boundaries: Sequence[int], batch_size: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    given = boundaries if isinstance(boundaries, Iterable) else ()
    lengths = tuple(whole("each of boundaries", boundary) for boundary in given)
    if not lengths or list(lengths) != sorted(set(lengths)):
        raise ConfigError(
            f"boundaries are lengths in rising order; got {boundaries!r}. Write for example "
            "(64, 128, 256)."
        )
    each = batch_size if isinstance(batch_size, Sequence) else (batch_size,) * len(lengths)
    if len(each) != len(lengths):
        raise ConfigError(
            "batch_size is one number, or one for each boundary; got "
            f"batch_size={batch_size!r} for {len(lengths)} boundaries."
        )
    return lengths, tuple(whole("batch_size", size) for size in each)
