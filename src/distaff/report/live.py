"""Shows a run that another process trains, in the display of its own terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from distaff.errors import RunDirectoryError
from distaff.loggers.row import COLUMNS
from distaff.report.follow import ENDED, Event, Follower, printable
from distaff.report.outline import Outline
from distaff.run.display import Display, rows_by_split
from distaff.run.display.lines import EpochLine
from distaff.step.norms import is_norm

_SECONDS = 0.5
"""Seconds between two looks at the files."""

_MOST_EPOCHS = 20
"""Most epochs of the past to show."""

_GOOD = ("finished", "stopped", "pruned")
"""Statuses of runs that ended as they should."""


class Clock:
    """The time of the last row, in seconds: a display measures in the time of the run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class View:
    """Shows what a run writes into its files.

    Args:
        run: the run.
        display: shows it.
        clock: the clock of the display.

    Attributes:
        run: the run.
        step: the last step in its log.
    """

    def __init__(self, run: Follower, display: Display, clock: Clock) -> None:
        self.run, self._display, self._clock = run, display, clock
        self._outline = Outline.of({})
        self._starts: list[float] = []
        self.step, self._epoch_since = 0, 0.0
        self._best: float | None = None
        self._has_legend = False

    def catch_up(self) -> None:
        """Shows the last epochs so far, and where the run stands."""
        events, self._starts = self.run.events(), self.run.starts()
        ends = [i for i, event in enumerate(events) if event.is_epoch]
        first = ends[-_MOST_EPOCHS - 1] + 1 if len(ends) > _MOST_EPOCHS else 0
        self._outline = Outline.of(self.run.config())
        for event in events[:first]:
            self._pass(event)
        self._begin(self._clock.now or min(self._starts, default=0.0))
        if first:
            self._display.print(f"{len(ends) - _MOST_EPOCHS} earlier lines are not shown")
        last = max(ends, default=-1)
        for i, event in enumerate(events[first:], first):
            if event.row is None or event.is_epoch or i > last:
                self._show(event, is_past=True)

    def show_news(self) -> None:
        """Shows what the run has written since.

        Raises:
            RunDirectoryError: the run was removed.
        """
        if not self.run.path.is_dir():
            raise RunDirectoryError(f"The run {str(self.run.path)!r} was removed.")
        events = self.run.events()
        if events:
            self._starts = self.run.starts()
        for event in events:
            self._show(event)

    def show_end(self, status: Mapping[str, Any]) -> None:
        """Shows the metrics of a run that has ended, and how it ended."""
        best, given = status.get("best"), status.get("metrics")
        titles = {"train": f"train, epoch {status.get('epoch')}", "test": "test"}
        if isinstance(best, Mapping):
            titles["val"] = f"val, epoch {best.get('epoch')} (best)"
        if rows := rows_by_split(_scalars(given if isinstance(given, Mapping) else {}), titles):
            self._display.table(rows)
        end = f"{status.get('status')} at step {status.get('step')}"
        reason = status.get("reason")
        self.say(f"{end}: {reason}" if reason else end)

    def say(self, text: str) -> None:
        """Shows a line."""
        self._display.print(printable(text))

    def _begin(self, at: float) -> None:
        """Begins to show the run from one of its starts."""
        self._outline = Outline.of(self.run.config())
        self._clock.now = self._epoch_since = at
        self._display.start(self._outline.num_epochs, self._outline.steps_per_epoch)

    def _pass(self, event: Event) -> None:
        """Notes a row that is not shown."""
        if event.row is not None:
            self._clock.now, self.step = event.row["time"], event.row["step"]
            self._is_best(_scalars(event.row))

    def _show(self, event: Event, *, is_past: bool = False) -> None:
        row = event.row
        if row is None:
            self._display.print(event.text)
            return
        step, epoch, now = row["step"], row["epoch"], row["time"]
        begun = max((start for start in self._starts if start <= now), default=0.0)
        if begun > self._clock.now or not self._clock.now:
            self._begin(begun or now)
        examples = max(0, step - self.step) * self._outline.batch_size
        self.step = step
        if not is_past:  # else a line of progress could precede that of the epoch
            self._clock.now = now
        self._display.advance(step, epoch, examples)
        self._clock.now = now
        metrics = _scalars(row)
        if event.is_epoch:
            self._show_epoch(epoch, metrics)
        else:
            self._display.update({n: x for n, x in metrics.items() if n.startswith("step/")})

    def _show_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        is_best, last = self._is_best(metrics), self._outline.num_epochs
        short = {name: value for name, value in metrics.items() if not is_norm(name)}
        seconds, self._epoch_since = self._clock.now - self._epoch_since, self._clock.now
        line = EpochLine(epoch, last, self.step, short, seconds, is_best)
        self._display.epoch_line(line)
        if is_best and not self._has_legend:
            self._has_legend = True
            self._display.print("* best model so far")

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        monitor = self._outline.monitor
        if monitor is None or monitor.name not in metrics:
            return False
        value = metrics[monitor.name]
        is_best = monitor.better(value, self._best)
        self._best = value if is_best else self._best
        return is_best


def follow(view: View, *, wait: bool, pause: Callable[[float], None] = time.sleep) -> int:
    """Shows a run until it ends; returns the exit status.

    Args:
        view: shows the run.
        wait: whether to wait for a run that has not finished to be resumed.
        pause: waits between two looks at the files.

    Raises:
        RunDirectoryError: the run was removed.
    """
    view.catch_up()
    told = None
    while True:
        status, is_gone = view.run.status(), view.run.is_gone()  # before the rows of its end
        view.show_news()
        has_ended = status.get("status") in ENDED
        ending = (is_gone, status) if is_gone or has_ended else None
        if ending is not None and ending != told:
            _show_ending(view, status, is_gone)
            if status.get("status") in _GOOD or not wait:
                return 0 if status.get("status") in _GOOD else 1
            view.say("Waiting for it to be resumed.")
        told = ending
        pause(_SECONDS)


def _show_ending(view: View, status: Mapping[str, Any], is_gone: bool) -> None:
    if not is_gone:
        view.show_end(status)
        return
    view.say(
        f"Its process is gone; the last step in its log is {view.step}. Run the same command again "
        "to resume."
    )


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a row that are numbers, by printable names."""
    found = {}
    for name, value in row.items():
        if name not in COLUMNS and isinstance(value, (int, float, str)):
            with contextlib.suppress(ValueError):
                found[printable(name)] = float(value)
    return found
