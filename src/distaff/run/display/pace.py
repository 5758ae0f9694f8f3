"""The speed of a run in examples per second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Stopwatch:
    """Counts seconds since its creation, except while it is paused.

    Its state is one tuple, replaced atomically, so another thread can read it at any time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs_since: tuple[bool, float] = (True, clock())

    def run(self, runs: bool) -> None:
        """Runs or pauses the stopwatch."""
        seconds = self.seconds()
        self._runs_since = (True, self._clock() - seconds) if runs else (False, seconds)

    def seconds(self) -> float:
        """Returns the seconds counted so far."""
        runs, value = self._runs_since
        return self._clock() - value if runs else value


class Pace:
    """Examples per second, not counting the time between `hold` and `release`.

    Args:
        clock: returns a monotonic time in seconds.
        window_seconds: length of the window of `recent`.
    """

    def __init__(self, clock: Callable[[], float], *, window_seconds: float = 5.0) -> None:
        self.examples = 0
        self._stopwatch = Stopwatch(clock)
        self._window_seconds = window_seconds
        self._holds: set[str] = set()
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._lap_start = (0.0, 0)

    def hold(self, reason: str) -> None:
        """Stops counting time until `release` is called with the same reason."""
        self._holds.add(reason)
        self._stopwatch.run(False)

    def release(self, reason: str) -> None:
        """Counts time again, unless it is held for another reason."""
        self._holds.discard(reason)
        self._stopwatch.run(not self._holds)

    def recent(self) -> float:
        """Returns examples per second since the oldest call within the window; 0 at first."""
        now = (self._stopwatch.seconds(), self.examples)
        if now != self._samples[-1]:
            self._samples.append(now)
        while len(self._samples) > 2 and self._samples[1][0] < now[0] - self._window_seconds:
            self._samples.popleft()
        return _rate(self._samples[0], now)

    def lap(self) -> float:
        """Returns examples per second since the last lap, and begins the next one."""
        now = (self._stopwatch.seconds(), self.examples)
        start, self._lap_start = self._lap_start, now
        return _rate(start, now)


def _rate(start: tuple[float, int], now: tuple[float, int]) -> float:
    seconds = now[0] - start[0]
    return (now[1] - start[1]) / seconds if seconds > 0 else 0.0
