"""Metrics as a CSV table: the file that spreadsheets and pandas open."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distaff.errors import RunDirectoryError
from distaff.loggers.disk import Location, explained, locator, replace
from distaff.loggers.protocol import JSON
from distaff.loggers.row import COLUMNS, as_row
from distaff.typing import Values


class CsvLogger:
    """Appends one row to a table per call of `log_metrics`.

    The columns are `step`, `epoch`, `time`, then the metrics in the order in which they appear. A
    new metric adds a column: the file is then written anew, whole, with empty cells in the older
    rows. Floats are written with all their digits, NaN and infinity as `nan`, `inf` and `-inf`, and
    arrays as JSON lists. The file is made by the first row; a run that goes on appends.

    Args:
        path: the file, or a function that gives it, called by the first row.
        clock: gives the Unix time in seconds.
    """

    def __init__(self, path: Location, *, clock: Callable[[], float] = time.time) -> None:
        self._locate = locator(path)
        self._clock = clock
        self._path: Path | None = None
        self._columns: list[str] = []

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Writes one row; it is in the file when the call returns.

        Raises:
            MetricError: a metric is not a number, or has the name of a column of the logger's own.
            RunDirectoryError: the file cannot be written, or is another table.
        """
        row = as_row(metrics, step=step, epoch=epoch, time=self._clock())
        path = self._path or Path(self._locate())
        with explained(path):
            if self._path is None:
                self._columns = _repaired_header(path)
                self._path = path
            new = [name for name in row if name not in self._columns]
            columns = self._columns + new
            cells = [_cell(row.get(name, "")) for name in columns]
            if new:
                older = [cells + [""] * len(new) for cells in _read(path)[1:]]
                replace(path, _encoded([columns, *older, cells]))
                self._columns = columns
            else:
                with path.open("ab") as file:
                    file.write(_encoded([cells]))

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing: a configuration is no row of this table."""

    def close(self, status: str) -> None:
        """Forgets the file, which is never left open; metrics logged afterwards find it again."""
        self._path = None


def _cell(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _encoded(rows: Iterable[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _read(path: Path) -> list[list[str]]:
    """Returns the whole rows of a table, without a last one that has no end."""
    text = path.read_bytes().decode() if path.exists() else ""
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


def _repaired_header(path: Path) -> list[str]:
    """Returns the columns of an existing table, once it is cut to its whole rows."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    rows = _read(path)
    if not rows or tuple(rows[0][: len(COLUMNS)]) != COLUMNS:
        raise RunDirectoryError(
            f"A CsvLogger appends to a table whose columns start with {', '.join(COLUMNS)}; "
            f"{str(path)!r} is another file. Choose another path."
        )
    if not path.read_bytes().endswith(b"\n"):
        replace(path, _encoded(rows))
    return rows[0]
