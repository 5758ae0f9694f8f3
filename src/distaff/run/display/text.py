"""Renders tables as plain text."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def as_text(content: RenderableType, width: int = 140) -> str:
    """Returns plain text, at most `width` columns wide, of anything that rich can render."""
    text = io.StringIO()
    console = Console(
        file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False
    )
    console.print(content)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
