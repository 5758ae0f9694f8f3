"""Pieces of HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["details", "escape", "preformatted", "table"]

_CELL = "padding:0 12px 0 0;text-align:{}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """Returns a table; its cells are text, escaped here.

    Args:
        header: the names of the columns.
        rows: the cells of each row.
        left: the number of first columns that are aligned to the left, the others to the right.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        styles = [_CELL.format("left" if n < left else "right") for n in range(len(cells))]
        filled = [
            f'<{tag} style="{style}">{escape(cell)}</{tag}>'
            for style, cell in zip(styles, cells, strict=True)
        ]
        return f"<tr>{''.join(filled)}</tr>"

    head = f"<thead>{row(header, 'th')}</thead>" if any(header) else ""
    return f"<table>{head}<tbody>{''.join(row(cells, 'td') for cells in rows)}</tbody></table>"


def details(summary: str, content: str) -> str:
    """Returns HTML that opens on a click on its summary, which is text, escaped here."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def preformatted(text: str, *, wraps: bool = False) -> str:
    """Returns lines of text as they are, escaped; long ones wrap, or scroll."""
    style = "margin:0;line-height:1.25;background:transparent;"
    style += "white-space:pre-wrap" if wraps else "white-space:pre;overflow-x:auto"
    return f'<pre style="{style}">{escape(text)}</pre>'
