"""Notices when steps take much longer than before."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

from distaff.execution.timers import Throughput, Timers

_SECONDS, _CALLS = 0.5, 32
"""A measurement spans at least so many seconds and programs: the host dispatches a few programs
ahead of the device, so the time of a single one is unknown."""

_KEPT, _NEEDED = 64, 8
"""Measurements in the running median: most, and least to judge by."""

_TIMES_SLOWER = 2.0
_SECONDS_BETWEEN_LINES = 600.0


class SlowSteps(NamedTuple):
    """Measurements in which a step took more than twice the running median.

    Attributes:
        number: slow measurements.
        measured: all measurements; each spans half a second or more of training.
        seconds: seconds that they took longer than the median in total.
    """

    number: int
    measured: int
    seconds: float


class StepTimes:
    """Compares the time per step with its running median.

    Only the time of the device and of dispatching counts: waiting for data, evaluation,
    checkpoints, logging and callbacks are left out, and measurements with a compile are dropped.

    Args:
        timers: of the run.

    Attributes:
        due_at: time on the clock of `timers` before which there is nothing to measure.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers, self._last, self._calls = timers, timers.read(), 0
        self._times: deque[float] = deque(maxlen=_KEPT)
        self._number = self._measured = 0
        self._seconds, self._line_due_at = 0.0, -math.inf
        self.due_at = timers.since + _SECONDS

    @property
    def slow(self) -> SlowSteps:
        """The slow measurements so far."""
        return SlowSteps(self._number, self._measured, self._seconds)

    def measure(self, step: int) -> str:
        """Measures the steps since the last measurement, if they are enough.

        Args:
            step: completed steps, for the line.

        Returns:
            A line about slow steps, at most one in ten minutes; empty if steps are not slow.
        """
        timers = self._timers
        if timers.calls - self._calls < _CALLS:
            return ""
        self.due_at = timers.since + _SECONDS
        read = timers.read()
        lap, self._last, self._calls = read.since(self._last), read, timers.calls
        return "" if lap.programs else self._judge(lap, step)

    def _judge(self, lap: Throughput, step: int) -> str:
        seconds, usual = (lap.seconds["device"] + lap.seconds["host"]) / lap.steps, math.inf
        self._measured += 1
        if len(self._times) >= _NEEDED:
            usual = median(self._times)
        self._times.append(seconds)
        if seconds <= _TIMES_SLOWER * usual:
            return ""
        self._number += 1
        self._seconds += (seconds - usual) * lap.steps
        if self._timers.since < self._line_due_at:
            return ""
        self._line_due_at = self._timers.since + _SECONDS_BETWEEN_LINES
        return (
            f"slow steps: {1e3 * seconds:.3g} ms per step in steps {step - lap.steps + 1} to "
            f"{step}, {seconds / usual:.1f} x the usual {1e3 * usual:.3g} ms. Another program may "
            "be using the machine, or the device may be throttled."
        )
