"""The tables of `docs/support.md`: what tests find out must be what they say.

    DISTAFF_SUPPORT=write .venv/bin/pytest -n 0 tests/contract/test_support.py

writes what is found into the page instead. Rows of what is not installed stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "support.md"

Table = dict[str, dict[str, str]]


def tables(page: str) -> dict[str, Table]:
    """Returns the tables of a page: cells by column, by row, by what the first column is called."""
    found: dict[str, Table] = {}
    header: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
            found[header[0]] = {}
        elif set(line) - set("|-: "):
            found[header[0]][cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    return found


def check(name: str, row: str, found: Mapping[str, str]) -> None:
    """Compares what was found with a row of the table, or writes it there.

    Args:
        name: of the table, which is that of its first column.
        row: its first cell.
        found: the other cells by column.

    Raises:
        AssertionError: the page says something else.
    """
    page = PAGE.read_text()
    if os.environ.get("DISTAFF_SUPPORT") == "write":
        PAGE.write_text(_written(page, name, [row, *found.values()]))
        return
    assert tables(page)[name].get(row) == dict(found), (
        f"{PAGE.name} says something else of {row}; tests/support.py says how it is rewritten"
    )


def _written(page: str, name: str, cells: Sequence[str]) -> str:
    """Returns the page with a row in the place of that of the same name, or as the last one."""
    lines = page.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {name} |"))
    end = next((n for n in range(first, len(lines)) if not lines[n].startswith("|")), len(lines))
    place = next((n for n in range(first, end) if lines[n].startswith(f"| {cells[0]} |")), end)
    lines[place : place + (place < end)] = [f"| {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"
