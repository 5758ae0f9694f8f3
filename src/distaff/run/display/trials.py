"""The display of a study: a table of its trials on a terminal, else a line per trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from distaff.metrics.monitor import Monitor
from distaff.run.display.lines import number
from distaff.run.display.protocol import Display

_SECONDS_PER_READ = 1.0
_FEWEST_ROWS = 4
_LINES_AROUND = 4  # title, header, the line of rows that are left out, and the prompt
_UNLIMITED = 10_000


class ShownTrial(Protocol):
    """What is shown of a trial; see `tune.Trial`."""

    @property
    def number(self) -> int:
        """The number of the trial, from 0."""
        ...

    @property
    def status(self) -> str:
        """`"running"`, or how it ended."""
        ...

    @property
    def value(self) -> float | None:
        """The monitored metric of its best model so far."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """The values of the searched options, by path."""
        ...

    @property
    def epoch(self) -> int | None:
        """Epochs up to its last validation."""
        ...

    @property
    def objectives(self) -> Mapping[str, float] | None:
        """Its objectives, if there are several."""
        ...


class TrialsTable:
    """The trials of a study as a table, which leaves out columns and rows that do not fit.

    Of the rows, the best trial, running ones and the last ones are kept; of the columns, as many
    parameters as fit.

    Args:
        trials: the trials, by number.
        monitor: the metric that ranks them.
        num_trials: trials of the whole study.
        height: lines of the terminal; None for all rows.
    """

    def __init__(
        self,
        trials: Sequence[ShownTrial],
        monitor: Monitor,
        num_trials: int,
        height: int | None = None,
    ) -> None:
        self._trials, self._monitor, self._num_trials = trials, monitor, num_trials
        self._best = best_of(trials, monitor)
        self._height = height

    def __rich_console__(self, console: Console, options: Any) -> Any:
        """Yields the table with as many columns as fit."""
        rows = self._rows()
        paths = list(dict.fromkeys(path for trial in rows for path in trial.values))
        yield Text(self._title(), style="bold", no_wrap=True, overflow="ellipsis")
        unlimited = options.update(max_width=_UNLIMITED)
        for count in range(len(paths), -1, -1):
            table = self._table(rows, paths[:count], len(paths) - count)
            if Measurement.get(console, unlimited, table).maximum <= options.max_width:
                break
        yield table
        if num_hidden := len(self._trials) - len(rows):
            yield Text(f"and {num_hidden} earlier trials", style="dim")

    def _title(self) -> str:
        statuses = [trial.status for trial in self._trials]
        counts = [f"{statuses.count(each)} {each}" for each in dict.fromkeys(statuses)]
        num_ended = len(statuses) - statuses.count("running")
        return "  ".join([f"{num_ended} of {self._num_trials} trials", ", ".join(counts)]).rstrip()

    def _rows(self) -> list[ShownTrial]:
        if self._height is None:
            return list(self._trials)
        room = max(_FEWEST_ROWS, self._height - _LINES_AROUND)
        kept = [x for x in self._trials if x.status == "running" or x is self._best][-room:]
        others = [trial for trial in reversed(self._trials) if trial not in kept]
        kept += others[: room - len(kept)]
        return [trial for trial in self._trials if trial in kept]

    def _table(self, rows: Sequence[ShownTrial], paths: Sequence[str], num_hidden: int) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        metrics = [*dict.fromkeys([self._monitor.name, *_objectives(rows)])]
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        for name in ("epoch", *metrics):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for path in _short(paths):
            table.add_column(path, no_wrap=True)
        if num_hidden:
            table.add_column(f"+{num_hidden}", no_wrap=True)
        for trial in rows:
            found = {self._monitor.name: trial.value, **(trial.objectives or {})}
            is_best = trial is self._best
            table.add_row(
                str(trial.number),
                trial.status,
                "" if trial.epoch is None else str(trial.epoch),
                *(_number(found.get(name)) for name in metrics),
                "*" if is_best else "",
                *(_text(trial.values[path]) if path in trial.values else "-" for path in paths),
                style="bold" if is_best else "dim" if trial.status in ("pruned", "failed") else "",
            )
        return table


def best_of(trials: Sequence[ShownTrial], monitor: Monitor) -> Any:
    """Returns the best trial that was not pruned; None without one."""
    best: ShownTrial | None = None
    for trial in trials:
        value = trial.value if trial.status in ("finished", "stopped") else None
        if value is not None and monitor.better(value, None if best is None else best.value):
            best = trial
    return best


def _objectives(trials: Sequence[ShownTrial]) -> list[str]:
    return next((list(trial.objectives) for trial in trials if trial.objectives), [])


def _short(paths: Sequence[str]) -> list[str]:
    """Returns the last name of each path, or the whole path if two have the same one."""
    names = [path.rpartition(".")[2] for path in paths]
    return [
        name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)
    ]


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TrialsDisplay:
    """Shows a study as a line per trial.

    Args:
        display: shows lines.
    """

    def __init__(self, display: Display) -> None:
        self._display = display

    def refresh(self, *, now: bool = False) -> None:
        """Shows what has changed, at most once per second.

        Args:
            now: whether to show it even if the last time is less than a second ago.
        """

    def ended(self, line: str) -> None:
        """Shows that a trial has ended."""
        self.print(line)

    def print(self, content: RenderableType) -> None:
        """Prints a text, above the table if there is one."""
        self._display.print(content)

    def close(self) -> None:
        """Ends the display. A second call does nothing."""
        self._display.close()


class LiveTrials(TrialsDisplay):
    """Updates a table of the trials at the bottom of a terminal, and prints all of it at the end.

    It appears with the first trial, and is drawn by the thread of the training.

    Args:
        display: prints lines while there is no table.
        console: the terminal.
        make_table: returns the table for a number of lines; None for no limit.
        clock: returns a monotonic time in seconds.
    """

    def __init__(
        self,
        display: Display,
        console: Console,
        make_table: Callable[[int | None], RenderableType],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(display)
        self._console, self._make_table, self._clock = console, make_table, clock
        self._live: Live | None = None
        self._drawn_at = 0.0

    def refresh(self, *, now: bool = False) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        elif not now and self._clock() - self._drawn_at < _SECONDS_PER_READ:
            return
        self._drawn_at = self._clock()
        self._live.update(self._make_table(self._console.height), refresh=True)

    def ended(self, line: str) -> None:
        self.refresh(now=True)

    def print(self, content: RenderableType) -> None:
        if self._live is None:
            super().print(content)
        else:
            self._console.print(content, markup=False, highlight=False)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            self._console.print(self._make_table(None))
        super().close()
