"""Displays of a run: live on a terminal, plain lines in a file, or nothing."""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType

from distaff.run.display.current import CurrentDisplay
from distaff.run.display.lines import rows_by_split
from distaff.run.display.model_table import model_table
from distaff.run.display.plain import PlainDisplay
from distaff.run.display.protocol import Display, NullDisplay
from distaff.run.display.stream import SteadyStream
from distaff.run.display.terminal import TerminalDisplay

__all__ = [
    "Display",
    "NullDisplay",
    "PlainDisplay",
    "TerminalDisplay",
    "as_text",
    "make_display",
    "model_table",
    "rows_by_split",
]


def as_text(content: RenderableType, width: int = 140) -> str:
    """Returns plain text, at most `width` columns wide, of anything that rich can render."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, force_terminal=False).print(content)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def make_display(enabled: bool, stream: Any = None) -> Display:
    """Returns the display for a stream. It never raises and never blocks a run.

    Args:
        enabled: whether to show anything.
        stream: the output; None for standard output, looked up when a run begins.

    Returns:
        A live display for a terminal that can move its cursor, plain lines for other streams, and
        `NullDisplay` if there is no standard output.
    """
    if not enabled:
        return NullDisplay()
    return CurrentDisplay(lambda: _suited(sys.stdout)) if stream is None else _suited(stream)


def _suited(stream: Any) -> Display:
    if stream is None:  # a program without a console
        return NullDisplay()
    steady = SteadyStream(stream)
    console = Console(file=cast("TextIO", steady))
    if steady.isatty() and not console.is_dumb_terminal:
        return TerminalDisplay(console, finish=steady.finish)
    return PlainDisplay(cast("TextIO", steady), finish=steady.finish)
