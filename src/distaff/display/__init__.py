"""How a run shows itself: live on a terminal, as plain lines in a file, or not at all."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console, RenderableType

from distaff.display.lines import rows_by_split
from distaff.display.model_table import model_table
from distaff.display.plain import PlainDisplay
from distaff.display.protocol import Display, NullDisplay
from distaff.display.terminal import TerminalDisplay

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
    """Returns anything that rich can render as plain text, at most `width` columns wide."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(content)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def make_display(enabled: bool, stream: TextIO | None = None) -> Display:
    """Returns the display that suits a stream.

    Args:
        enabled: `False` draws nothing at all.
        stream: where to draw; `None` is standard output.

    Returns:
        A live display on a terminal that can move its cursor, plain lines elsewhere.
    """
    if not enabled:
        return NullDisplay()
    stream = stream or sys.stdout
    console = Console(file=stream)
    if stream.isatty() and not console.is_dumb_terminal:
        return TerminalDisplay(console)
    return PlainDisplay(stream)
