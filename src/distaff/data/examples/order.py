"""Order: the order in which an epoch reads examples, which may lie in blocks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_SLICE = 4096
"""Indices converted to Python ints at once: an int takes four times the memory of an int64."""


class Order:
    """The order of an epoch: a function of `(seed, epoch)` alone, which can start anywhere.

    Without blocks, all examples are shuffled. With blocks, which are read whole, first the blocks
    are shuffled, and then the examples within each window of blocks, so that an epoch never needs
    more than `window` blocks at once.

    Args:
        num_examples: number of examples.
        shuffle: whether each epoch has a new order.
        seed: seed of the orders, not negative.
        starts: index of the first example of each block, then the number of examples, int64
            `[blocks + 1]`. None if there are no blocks.
        window: number of blocks that are shuffled together.
        fingerprint: fingerprint of the data, or None.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        shuffle: bool,
        seed: int,
        starts: np.ndarray | None = None,
        window: int = 1,
        fingerprint: int | None = None,
    ) -> None:
        self.num_examples = num_examples
        self._fingerprint = fingerprint
        self._shuffle, self._seed, self._starts, self._window = shuffle, seed, starts, window

    def epoch(self, epoch: int, start: int = 0) -> Iterator[int]:
        """Yields the indices of the examples of an epoch, without the first `start` ones."""
        if not self._shuffle:
            yield from range(start, self.num_examples)
            return
        for window in self._windows(epoch):
            size = self._size(window)
            if start < size:
                order = self._shuffled(epoch, window)
                for first in range(start, size, _SLICE):
                    yield from order[first : first + _SLICE].tolist()
            start = max(start - size, 0)

    def identity(self) -> Mapping[str, Any]:
        """Returns the JSON values that must be equal to restore a position."""
        facts = {"num_examples": self.num_examples, "shuffle": self._shuffle, "seed": self._seed}
        if self._fingerprint is not None:
            facts["fingerprint"] = self._fingerprint
        if self._starts is None or not self._shuffle:
            return facts
        return {**facts, "window": self._window, "blocks": zlib.crc32(self._starts.tobytes())}

    def _windows(self, epoch: int) -> Iterator[np.ndarray]:
        """Yields the windows of blocks, in order."""
        num_blocks = 1 if self._starts is None else len(self._starts) - 1
        blocks = np.random.default_rng([self._seed, epoch]).permutation(num_blocks)
        for first in range(0, num_blocks, self._window):
            yield blocks[first : first + self._window]

    def _size(self, blocks: np.ndarray) -> int:
        if self._starts is None:
            return self.num_examples
        return int((self._starts[blocks + 1] - self._starts[blocks]).sum())

    def _shuffled(self, epoch: int, blocks: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch, int(blocks[0])])
        if self._starts is None:
            return rng.permutation(self.num_examples)
        runs = [np.arange(self._starts[block], self._starts[block + 1]) for block in blocks]
        return rng.permutation(np.concatenate(runs))
