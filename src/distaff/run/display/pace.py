"""How fast a run goes: a stopwatch that can be held, and examples per second read from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Stopwatch:
    """Counts seconds since it was made, except while it is held.

    Its whole state is one tuple, replaced at once: another thread may read it at any time.

    Args:
        clock: gives a time in seconds that never goes back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs_since: tuple[bool, float] = (True, clock())

    def run(self, runs: bool) -> None:
        """Lets the stopwatch run, or holds it."""
        seconds = self.seconds()
        self._runs_since = (True, self._clock() - seconds) if runs else (False, seconds)

    def seconds(self) -> float:
        """Returns the seconds counted so far."""
        runs, value = self._runs_since
        return self._clock() - value if runs else value


class Pace:
    """Examples per second since it was made, without the time between `hold` and `release`.

    Args:
        clock: gives a time in seconds that never goes back.
        window_seconds: how far back `recent` looks.
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
        """Counts time again, unless another reason still holds it."""
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
