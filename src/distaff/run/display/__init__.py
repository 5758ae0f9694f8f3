"""Displays of a run: live on a terminal or in a notebook, plain lines in a file, or nothing."""

from __future__ import annotations

import sys
from typing import Any, TextIO, cast

from rich.console import Console

from distaff.core import optional
from distaff.run.display.current import CurrentDisplay
from distaff.run.display.lines import rows_by_split
from distaff.run.display.model_table import model_table
from distaff.run.display.notebook import NotebookDisplay
from distaff.run.display.plain import PlainDisplay
from distaff.run.display.protocol import Display, NullDisplay
from distaff.run.display.stream import SteadyStream
from distaff.run.display.terminal import TerminalDisplay
from distaff.run.display.text import as_text

__all__ = [
    "Display",
    "NotebookDisplay",
    "NullDisplay",
    "PlainDisplay",
    "TerminalDisplay",
    "as_text",
    "make_display",
    "model_table",
    "rows_by_split",
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
