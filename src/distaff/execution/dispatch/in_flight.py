"""Flight: how many programs, and how much data, the device may still have before it."""

from __future__ import annotations

import jax

MAX_CHUNKS = 8
"""Chunks in flight, at most. Above that, simulated CPU devices may deadlock in their collectives
(seen from about 50 on); a device that has a few before it is never idle."""

MAX_BYTES = 2**27
"""Bytes in flight, about; the chunk that exceeds them is still handed over."""


class InFlightLimit:
    """Keeps the host from running ahead of the device without bound.

    Batches stay in memory until the device has used them. It waits for what was handed over half
    a flight ago, which is nearly always done.
    """

    def __init__(self) -> None:
        self._marker: jax.Array | None = None
        self._chunks = self._bytes = 0

    def add(self, output: jax.Array, num_bytes: int) -> None:
        """Counts a chunk, and waits while more would be in flight than allowed.

        Args:
            output: any output of its program that is not given away.
            num_bytes: held until it has run.
        """
        self._chunks += 1
        self._bytes += num_bytes
        if self._chunks < MAX_CHUNKS // 2 and self._bytes < MAX_BYTES // 2:
            return
        if self._marker is not None:
            self._marker.block_until_ready()
        self._marker, self._chunks, self._bytes = output, 0, 0
