"""Prints the tables of a results file as Markdown, for `docs/speed.md`.

    .venv/bin/python -m benchmarks.table benchmarks/results/2026-11-24_120000.json [docs/speed.md]

With a second file it writes them there, between the two comments that mark their place.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.report import markdown

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def place(page: str, tables: str) -> str:
    """Returns a page with the tables between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> None:
    """Prints, or writes into a page."""
    tables = markdown(json.loads(Path(sys.argv[1]).read_text()))
    if len(sys.argv) > 2:
        page = Path(sys.argv[2])
        page.write_text(place(page.read_text(), tables))
    else:
        print(tables)


if __name__ == "__main__":
    main()
