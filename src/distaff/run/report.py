"""The report on a run's throughput: as lines for a reader, and as facts for a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from distaff.execution.flops import Flops
from distaff.execution.timers import PARTS, TRAINING, Throughput

_UNITS = ("", "k", "M", "G", "T", "P", "E")

_WORTH_SECONDS = 10.0
"""Seconds of training that make it worth half a second to count FLOPs and measure a peak."""

_AGAIN_SECONDS = 100.0
"""And these make it worth it once more: the machine may have been busy the last time."""

_LONG_WAIT = 0.1
"""The share of the training from which waiting for data is worth a remark."""

_FASTER_DATA = (
    "Give arrays as a data.ArrayLoader, whose batches are gathered as arrays; let a loader of "
    "your own do less per batch, do it once before the training, or have more workers."
)


class Report(NamedTuple):
    """How fast a run was, where its time went, and how much of the machine it used.

    Attributes:
        throughput: of the run.
        flops: of one step; None where they are not known.
        peak: FLOPs per second that the machine reaches; None where that is not known.
    """

    throughput: Throughput
    flops: Flops | None = None
    peak: float | None = None

    @property
    def flops_per_second(self) -> float | None:
        """FLOPs per second of the training; None where those of a step are not known."""
        if self.flops is None:
            return None
        return self.throughput.per_second(self.throughput.steps * self.flops.count)

    @property
    def share_of_peak(self) -> float | None:
        """FLOPs per second as a share of the machine's peak, also called MFU."""
        reached = self.flops_per_second
        return None if reached is None or self.peak is None else reached / self.peak

    @property
    def share_of_waiting(self) -> float:
        """The share of the training that the device had nothing to do for want of a batch."""
        return self.throughput.per_second(self.throughput.seconds["data"])

    def line(self) -> dict[str, float]:
        """Returns speed and times in seconds by name, as one line of a log."""
        read = self.throughput
        return {
            "steps_per_second": read.per_second(read.steps),
            "examples_per_second": read.per_second(read.examples),
            **{f"seconds/{part}": seconds for part, seconds in read.seconds.items()},
        }

    def facts(self) -> dict[str, Any]:
        """Returns all of it as strict JSON, times in seconds."""
        read = self.throughput
        return {
            **read._asdict(),
            "training_seconds": read.training_seconds,
            "steps_per_second": read.per_second(read.steps),
            "examples_per_second": read.per_second(read.examples),
            "seconds_per_step": {
                part: read.seconds[part] / max(read.steps, 1) for part in TRAINING
            },
            "flops_per_step": None if self.flops is None else self.flops.count,
            "flops_are_at_least": None if self.flops is None else self.flops.at_least,
            "flops_per_second": self.flops_per_second,
            "peak_flops_per_second": self.peak,
            "share_of_peak": self.share_of_peak,
        }

    def lines(self) -> list[str]:
        """Returns all of it as lines of text: speed, FLOPs if known, time, and what to do."""
        return [
            f"speed  {self._speed()}",
            *([] if self.flops is None else [f"FLOPs  {self._work(self.flops)}"]),
            f"time   {self._time()}",
            *self.remarks(),
        ]

    def remarks(self) -> list[str]:
        """Returns what to do about the speed, as lines of text; none where there is nothing."""
        return [self._waiting()] if self.share_of_waiting > _LONG_WAIT else []

    def _speed(self) -> str:
        read = self.throughput
        each = {part: 1e3 * read.seconds[part] / max(read.steps, 1) for part in TRAINING}
        total = sum(each.values())
        parts = ", ".join(
            f"{part} {share:.3g}" for part, share in each.items() if share >= 0.005 * total > 0
        )
        return (
            f"{_number(read.per_second(read.steps))} steps/s, "
            f"{_number(read.per_second(read.examples))} examples/s, {total:.3g} ms per step"
            + (f" ({parts})" if parts else "")
        )

    def _work(self, flops: Flops) -> str:
        least = "at least " if flops.at_least else ""
        text = f"{least}{_scaled(flops.count)}FLOP per step"
        text += f", {least}{_scaled(self.flops_per_second or 0.0)}FLOP/s"
        if self.peak is None or self.share_of_peak is None:
            return text
        peak = f"{_scaled(self.peak)}FLOP/s measured for float32 matrix products"
        return f"{text}: {self.share_of_peak:.1%} of the {peak}"

    def _time(self) -> str:
        read = self.throughput
        total = sum(read.seconds.values())
        others = {part: read.seconds[part] for part in PARTS if part not in TRAINING}
        shares = ", ".join(
            f"{part} {seconds / total:.0%}"
            for part, seconds in {"training": read.training_seconds, **others}.items()
            if total and seconds / total >= 0.005
        )
        return (
            f"{total:.1f} s: {shares}; "
            f"{read.programs} programs compiled, {read.cached} of them cached"
        )

    def _waiting(self) -> str:
        return f"data   {self.share_of_waiting:.0%} of the training waits for data. {_FASTER_DATA}"


def make_report(
    read: Throughput,
    count_flops: Callable[[], Flops | None],
    measure_peak: Callable[[bool], float | None],
) -> Report:
    """Makes the report on a run; FLOPs are in it if the training lasted for ten seconds.

    Args:
        read: the run's throughput.
        count_flops: of a step; called if they are worth their time.
        measure_peak: of the machine; called if the FLOPs of a step are known. It is told whether
            the run was so long that a remembered peak may be measured again.
    """
    if read.training_seconds < _WORTH_SECONDS:
        return Report(read)
    flops = count_flops()
    again = read.training_seconds > _AGAIN_SECONDS
    return Report(read, flops, None if flops is None else measure_peak(again))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _scaled(value: float) -> str:
    """Returns a number and the prefix of its unit: `1.39 M`."""
    power = 0
    while value >= 1000 and power < len(_UNITS) - 1:
        value /= 1000
        power += 1
    return f"{value:.3g} {_UNITS[power]}"
