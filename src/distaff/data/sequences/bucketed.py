"""Bucketing: batches of sequences of similar length, padded to one of a few lengths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distaff.core.config.checks import whole
from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data.examples.examples import Examples, make_order, stacked
from distaff.data.loader import drops_remainder
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
    """Returns a loader of batches of sequences of similar length.

    Each sequence is padded at its end to the smallest boundary that fits, and waits in that bucket
    until a batch is full. So batches have at most `len(boundaries)` lengths, and a step compiles
    once for each. An epoch has one order of examples, a function of `(seed, epoch)`, and contains
    every example once, except those omitted by `remainder` and `overlong`.

    Args:
        examples: dicts of arrays `[length, ...]`, all of one length per example, and scalars, which
            are stacked. Or tokens alone, int `[length]`, which become the entry `tokens`.
        boundaries: increasing lengths of the batches. The last one is the maximal length of a
            sequence.
        batch_size: examples in a batch; or one number per boundary, such as more for shorter
            sequences.
        shuffle: whether each epoch has a new order.
        seed: seed of the orders, not negative.
        remainder: what to do with short batches, at most one per bucket, at the end of an epoch:
            `"keep"` yields them at their own sizes (an evaluation pads and masks them, a training
            step compiles again for each size); `"drop"`, the default when shuffling, omits them.
            If a bucket then yields no batch at all, a warning is issued.
        overlong: what to do with sequences longer than the last boundary: raise an error, cut them,
            or drop them.
        pad_value: padding value of numbers; bools are padded with False.

    Returns:
        A loader of the examples' entries, `[batch, boundary, ...]`, with `tokens` in int32, and of
        `mask`, bool `[batch, boundary]`, which is False for padding, and where the `mask` of an
        example is False.

    Raises:
        BatchError: the examples have no length; while reading: one is not a sequence or too long,
            or they fill no batch.
        ConfigError: an option is out of range.

    >>> loader = bucketed([np.arange(n) for n in (2, 7, 3, 8)], boundaries=(4, 8), batch_size=2)
    >>> [batch["tokens"].shape for batch in loader]
    [(2, 4), (2, 8)]
    """
    boundaries, sizes = _checked(boundaries, batch_size)
    check_overlong(overlong, ("error", "cut", "drop"))
    order = make_order(examples, min(sizes), shuffle=shuffle, seed=seed)
    buckets = _Buckets(boundaries, sizes, overlong, drops_remainder(remainder, shuffle), pad_value)
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
    """A grouping with one group per boundary."""

    boundaries: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    overlong: str
    drop: bool
    pad_value: float

    def empty(self) -> list[Group]:
        return [Group() for _ in self.boundaries]

    def parts(self, index: int, example: Any) -> list[SequencePart]:
        parts = parts_of(example, index, self.boundaries[-1], self.overlong)
        return [part._replace(leaves=_with_mask(part, index)) for part in parts]

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
                    f"The epoch omits all {len(group.pieces)} examples of the bucket of "
                    f"{self.boundaries[bucket]}, since its batch_size is "
                    f"{self.batch_sizes[bucket]}. Lower it, use fewer boundaries, or set "
                    "remainder='keep'.",
                    stacklevel=2,
                )

    def _batch(self, groups: list[Group], bucket: int) -> Batch:
        group, length = groups[bucket], self.boundaries[bucket]
        groups[bucket] = Group(num_batches=group.num_batches + 1)
        return stacked([padded(piece.part, length, self.pad_value) for piece in group.pieces])


def _with_mask(part: SequencePart, index: int) -> dict[str, Any]:
    mask = part.leaves.get("mask", np.ones(part.length, bool))
    if getattr(mask, "shape", None) != (part.length,) or mask.dtype != bool:
        raise BatchError(
            "The `mask` of an example must be bool [length]; that of example "
            f"{index} is {mask!r}. Convert it, or rename the entry."
        )
    return {**part.leaves, "mask": mask}


def _checked(
    boundaries: Sequence[int], batch_size: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    given = boundaries if isinstance(boundaries, Iterable) else ()
    lengths = tuple(whole("each of boundaries", boundary) for boundary in given)
    if not lengths or list(lengths) != sorted(set(lengths)):
        raise ConfigError(
            f"boundaries must be increasing lengths; got {boundaries!r}. Write, for example, "
            "(64, 128, 256)."
        )
    each = batch_size if isinstance(batch_size, Sequence) else (batch_size,) * len(lengths)
    if len(each) != len(lengths):
        raise ConfigError(
            "batch_size must be one integer, or one per boundary; got "
            f"batch_size={batch_size!r} for {len(lengths)} boundaries."
        )
    return lengths, tuple(whole("batch_size", size) for size in each)
