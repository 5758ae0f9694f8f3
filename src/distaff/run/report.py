"""Reports the throughput of a run, as lines of text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from distaff.data import ArrayLoader, sources, unlimited
from distaff.execution.flops import Flops
from distaff.execution.step_times import SlowSteps
from distaff.execution.timers import PARTS, TRAINING, Throughput

_UNITS = ("", "k", "M", "G", "T", "P", "E")

_WORTH_SECONDS = 10.0
"""Least seconds of training to spend half a second on counting FLOPs and measuring the peak."""

_AGAIN_SECONDS = 100.0
"""Least seconds of training to measure a cached peak again, as the machine may have been busy."""

_LONG_WAIT = 0.1
"""Least share of training time spent waiting for data that is reported."""

_LONG_WAIT_SECONDS = 1.0
"""Least seconds spent waiting for data that are reported."""

_SLOW_SECONDS = 1.0
"""Least seconds lost to slow steps that are reported."""

_CUSTOM = "do less work per batch, preprocess once before the training, or use more workers."
_FASTER_DATA = (
    f"Pass arrays as a data.ArrayLoader, which gathers each batch at once. In a custom loader, "
    f"{_CUSTOM}"
)


def faster_data(loader: Any) -> str:
    """Returns how a loader can be made faster: what it does not do already."""
    loader = unlimited(loader)
    if not all(isinstance(each, ArrayLoader) for each in sources(loader)):
        return _FASTER_DATA
    if isinstance(loader, ArrayLoader):
        return "A larger batch_size gathers more rows at once, and needs fewer steps."
    return f"In the functions that change batches, {_CUSTOM}"


class Report(NamedTuple):
    """The speed of a run, where its time went, and how much of the machine it used.

    Attributes:
        throughput: counts and times of the run.
        flops: FLOPs of one step; None if unknown.
        peak: peak FLOPs per second of the machine; None if unknown.
        advice: how to make the data faster, if the training waits for it.
        slow: measurements of slow steps; None if the steps were not measured.
    """

    throughput: Throughput
    flops: Flops | None = None
    peak: float | None = None
    advice: str = _FASTER_DATA
    slow: SlowSteps | None = None

    @property
    def flops_per_second(self) -> float | None:
        """FLOPs per second of training time; None if the FLOPs of a step are unknown."""
        if self.flops is None:
            return None
        return self.throughput.per_second(self.throughput.steps * self.flops.count)

    @property
    def share_of_peak(self) -> float | None:
        """FLOPs per second as a share of the machine's peak (MFU)."""
        reached = self.flops_per_second
        return None if reached is None or self.peak is None else reached / self.peak

    def line(self) -> dict[str, float]:
        """Returns the speed, and the times in seconds, for `throughput.jsonl`."""
        read = self.throughput
        return {
            "steps_per_second": read.per_second(read.steps),
            "examples_per_second": read.per_second(read.examples),
            **{f"seconds/{part}": seconds for part, seconds in read.seconds.items()},
        }

    def facts(self) -> dict[str, Any]:
        """Returns the report as strict JSON, with times in seconds."""
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
            "slow": None if self.slow is None else self.slow._asdict(),
        }

    def lines(self) -> list[str]:
        """Returns the report as lines of text: speed, FLOPs if known, time, and remarks."""
        return [
            f"speed  {self._speed()}",
            *([] if self.flops is None else [f"FLOPs  {self._work(self.flops)}"]),
            f"time   {self._time()}",
            *self.remarks(),
        ]

    def remarks(self) -> list[str]:
        """Returns advice on the speed, as lines of text."""
        lines, seconds = [], self.throughput.seconds["data"]
        waiting = self.throughput.per_second(seconds)
        if waiting > _LONG_WAIT and seconds >= _LONG_WAIT_SECONDS:
            share = f"{waiting:.0%} of training time was spent waiting for data"
            lines.append(f"data   {share}. {self.advice}")
        if self.slow is not None and self.slow.seconds >= _SLOW_SECONDS:
            number, measured, extra = self.slow
            lines.append(
                f"slow   in {number} of {measured} measurements a step took more than twice the "
                f"median, {extra:.1f} s longer in total. Another program may use the machine."
            )
        return lines

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


def make_report(
    read: Throughput,
    count_flops: Callable[[], Flops | None],
    measure_peak: Callable[[bool], float | None],
) -> Report:
    """Returns the report on a run, with FLOPs if the training took ten seconds or more.

    Args:
        read: the throughput of the run.
        count_flops: returns the FLOPs of a step.
        measure_peak: returns the peak FLOPs per second, given whether to measure a cached value
            again; called if the FLOPs of a step are known.
    """
    if read.training_seconds < _WORTH_SECONDS:
        return Report(read)
    flops = count_flops()
    again = read.training_seconds > _AGAIN_SECONDS
    return Report(read, flops, None if flops is None else measure_peak(again))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _scaled(value: float) -> str:
    """Formats a number with an SI prefix: `1.39 M`."""
    power = 0
    while value >= 1000 and power < len(_UNITS) - 1:
        value /= 1000
        power += 1
    return f"{value:.3g} {_UNITS[power]}"
