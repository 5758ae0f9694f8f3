"""Displays of a run: live on a terminal or in a notebook, plain lines in a file, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO, cast

from rich.console import Console

from distaff.core import optional
from distaff.metrics.monitor import Monitor
from distaff.run.display.current import CurrentDisplay
from distaff.run.display.lines import rows_by_split
from distaff.run.display.model_table import model_table
from distaff.run.display.notebook import NotebookDisplay
from distaff.run.display.plain import PlainDisplay
from distaff.run.display.protocol import Display, NullDisplay
from distaff.run.display.stream import SteadyStream
from distaff.run.display.terminal import TerminalDisplay
from distaff.run.display.text import as_text
from distaff.run.display.trials import (
    LiveTrials,
    ShownTrial,
    TrialsDisplay,
    TrialsTable,
    best_of,
)

__all__ = [
    "Display",
    "NotebookDisplay",
    "NullDisplay",
    "PlainDisplay",
    "TerminalDisplay",
    "TrialsDisplay",
    "as_text",
    "best_of",
    "make_display",
    "make_trials_display",
    "model_table",
    "rows_by_split",
    "terminal",
]


def make_display(enabled: bool, stream: Any = None) -> Display:
    """Returns the display for a stream. It never raises and never blocks a run.

    Args:
        enabled: whether to show anything.
        stream: the output; None for standard output, looked up when a run begins.

    Returns:
        A live display for a terminal that can move its cursor and for the cell of a notebook, plain
        lines for other streams, and `NullDisplay` if there is no standard output.
    """
    if not enabled:
        return NullDisplay()
    return CurrentDisplay(lambda: _suited(sys.stdout)) if stream is None else _suited(stream)


def make_trials_display(
    enabled: bool,
    read: Callable[[], Sequence[ShownTrial]],
    monitor: Monitor,
    num_trials: int,
) -> TrialsDisplay:
    """Returns the display of a study: a table on a terminal, else a line per trial.

    Args:
        enabled: whether to show anything.
        read: returns the trials, also those that are running.
        monitor: the metric that ranks trials.
        num_trials: trials of the whole study.
    """
    display = make_display(enabled)
    console = terminal(sys.stdout) if enabled else None
    if console is None:
        return TrialsDisplay(display)
    return LiveTrials(
        display, console, lambda height: TrialsTable(read(), monitor, num_trials, height)
    )


def terminal(stream: Any) -> Console | None:
    """Returns the console of a terminal that can move its cursor; None for other streams."""
    if stream is None:
        return None
    steady = SteadyStream(stream)
    console = Console(file=cast("TextIO", steady))
    return console if steady.isatty() and not console.is_dumb_terminal else None


def _suited(stream: Any) -> Display:
    if stream is None:  # a program without a console
        return NullDisplay()
    if "ipykernel" in sys.modules:
        ipython = optional.load("notebook.ipython", extra="notebook")
        if ipython.is_in_cell(stream):
            return NotebookDisplay(ipython.CellOutput)
    steady = SteadyStream(stream)
    console = Console(file=cast("TextIO", steady))
    if steady.isatty() and not console.is_dumb_terminal:
        return TerminalDisplay(console, finish=steady.finish)
    return PlainDisplay(cast("TextIO", steady), finish=steady.finish)
