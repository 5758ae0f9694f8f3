"""Makes all processes agree on when to stop or save."""

from __future__ import annotations

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

SECONDS_BETWEEN = 2.0
"""Approximate time between two exchanges. Each waits for the running steps, plus about 1.5 ms
(two processes on one CPU)."""

MAX_CALLS_BETWEEN = 256
"""Most calls between two exchanges: calls may become slower, for example in an evaluation."""


class Agreement:
    """Returns the most urgent code of all processes, in all of them at the same call.

    At every n-th call the processes exchange their codes and the seconds since the last exchange.
    Each derives the same n from the longest time. A preemption notice that only `jax.distributed`
    receives (a SIGTERM handled by its own service) counts, too.

    Args:
        preempted: code of a preemption notice from `jax.distributed`; the most urgent one.
    """

    def __init__(self, preempted: int) -> None:
        self._preempted = preempted
        self._calls = self._exchanged = 0
        self._interval = 1
        self._start = time.monotonic()
        self._has_service = True

    def __call__(self, code: int) -> int:
        """Returns the code agreed on; every process must call this equally often.

        Args:
            code: this process's code; 0 for none, larger is more urgent.

        Returns:
            `code` itself if there is one process. With several, 0 until all have agreed on the
            largest code.
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
        # float32 represents both well enough: codes are small integers.
        gathered = multihost_utils.process_allgather(np.array([code, seconds], np.float32))
        largest, longest = np.max(gathered, axis=0)
        calls = self._calls - self._exchanged
        target = int(calls * SECONDS_BETWEEN / max(float(longest), 1e-6))
        self._interval = max(1, min(target, 8 * calls, MAX_CALLS_BETWEEN))
        self._exchanged, self._start = self._calls, time.monotonic()
        return int(largest)

    def _is_preempted(self) -> bool:
        if not self._has_service:
            return False
        try:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        except RuntimeError:  # jax_enable_preemption_service is off
            self._has_service = False
            return False
