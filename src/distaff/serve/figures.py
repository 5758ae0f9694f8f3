"""The figures of a server, in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = tuple(float(2**n) for n in range(11))


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.9g}"
        yield f"{name}_count {total}"


class Figures:
    """Counts requests, batches and times; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._seconds, self._rows = _Histogram(_SECONDS), _Histogram(_ROWS)
        self._shared = _Histogram(_ROWS)

    def request(self, status: int, seconds: float) -> None:
        """Counts a request for outputs."""
        with self._lock:
            self._requests[status] += 1
            self._seconds.add(seconds)

    def batch(self, rows: int, requests: int) -> None:
        """Counts a batch with its number of examples and of requests."""
        with self._lock:
            self._rows.add(rows)
            self._shared.add(requests)

    def text(self, waiting: int) -> str:
        """Returns all figures.

        Args:
            waiting: requests that wait or are computed.
        """
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines(waiting))

    def _lines(self, waiting: int) -> Iterator[str]:
        name = "distaff_requests_total"
        yield from _head(name, "counter", "Requests for outputs by status.")
        for status, count in sorted(self._requests.items()):
            yield f'{name}{{status="{status}"}} {count}'
        yield from _head("distaff_requests_waiting", "gauge", "Requests that are not answered yet.")
        yield f"distaff_requests_waiting {waiting}"
        for name, text, histogram in (
            ("distaff_request_seconds", "Time to answer a request.", self._seconds),
            ("distaff_batch_rows", "Examples in a batch, without padding.", self._rows),
            ("distaff_batch_requests", "Requests that shared a batch.", self._shared),
        ):
            yield from _head(name, "histogram", text)
            yield from histogram.lines(name)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
