"""Agreement: several processes act at the same call, though each hears of reasons by itself."""

from __future__ import annotations

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

SECONDS_BETWEEN = 2.0
"""About how long two exchanges lie apart: each waits for the steps underway, and then for 1.5 ms
(two processes on one CPU)."""

MAX_CALLS_BETWEEN = 256
"""Calls between two exchanges, at most: how fast they come may change, as in an evaluation."""


class Agreement:
    """Gives all processes the most urgent of their codes, at the same call.

    Every so many calls they exchange their codes, and how long these calls took; from the longest
    each finds the same next call. What `jax.distributed` hears of by itself, a SIGTERM in a process
    whose handler is its own, is heard too.

    Args:
        preempted: the code of a notice by `jax.distributed`, the most urgent one.
    """

    def __init__(self, preempted: int) -> None:
        self._preempted = preempted
        self._calls = self._exchanged = 0
        self._interval = 1
        self._start = time.monotonic()
        self._hears_preemption = True

    def __call__(self, code: int) -> int:
        """Returns what is agreed on; every process must call it equally often.

        Args:
            code: of this process: 0 for nothing, more for what is more urgent.

        Returns:
            `code` where there is one process; else 0, until all have agreed on the largest.
        """
        if jax.process_count() == 1:
            return code
        self._calls += 1
        if self._is_preempted():
            return self._preempted
        if self._calls - self._exchanged < self._interval:
            return 0
        return self._exchange(code)

    def _exchange(self, code: int) -> int:
        seconds = time.monotonic() - self._start
        # float32 holds both: codes are few.
        all_of_them = multihost_utils.process_allgather(np.array([code, seconds], np.float32))
        largest, longest = np.max(all_of_them, axis=0)
        calls = self._calls - self._exchanged
        aim = int(calls * SECONDS_BETWEEN / max(float(longest), 1e-6))
        self._interval = max(1, min(aim, 8 * calls, MAX_CALLS_BETWEEN))
        self._exchanged, self._start = self._calls, time.monotonic()
        return int(largest)

    def _is_preempted(self) -> bool:
        if not self._hears_preemption:
            return False
        try:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        except RuntimeError:  # jax_enable_preemption_service is off
            self._hears_preemption = False
            return False
