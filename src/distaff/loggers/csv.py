"""Metrics as a CSV table, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distaff.core.typing import Values
from distaff.errors import RunDirectoryError
from distaff.loggers.disk import Location, explained, is_file, locator, open_private, replace
from distaff.loggers.protocol import JSON
from distaff.loggers.row import COLUMNS, as_row


class CsvLogger:
    """Appends one row to a CSV file per call of `log_metrics`.

    The columns are `step`, `epoch`, `time`, then the metrics in the order in which they appear. A
    new metric adds a column: the file is then rewritten with empty cells in the older rows. Floats
    are written with all their digits, NaN and infinity as `nan`, `inf` and `-inf`, and arrays as
    JSON lists. The first row creates the file; a resumed run appends to it.

    Args:
        path: the file, or a function that returns it, called at the first row.
        clock: returns the Unix time in seconds.
    """

    def __init__(self, path: Location, *, clock: Callable[[], float] = time.time) -> None:
        self._locate = locator(path)
        self._clock = clock
        self._path: Path | None = None
        self._columns: list[str] = []
        self._rows = 0

    def log_metrics(self, metrics: Values, *, step: int, epoch: int) -> None:
        """Writes one row; it is in the file when the call returns.

        Raises:
            MetricError: a metric is not a number, or has a reserved name: `step`, `epoch`, `time`.
            RunDirectoryError: the file cannot be written, or is another table.
        """
        row = as_row(metrics, step=step, epoch=epoch, time=self._clock())
        path = self._path or Path(self._locate())
        with explained(path):
            if self._path is None:
                self._columns, self._rows = _repair(path)
                self._path = path
            new = [name for name in row if name not in self._columns]
            columns = self._columns + new
            cells = [_cell(row.get(name, "")) for name in columns]
            if new:
                older = [cells + [""] * len(new) for cells in _read(path)[1:]]
                replace(path, _encode([columns, *older, cells]))
                self._columns = columns
            else:
                with open(path, "ab", opener=open_private) as file:
                    file.write(_encode([cells]))
            self._rows += 1

    def log_config(self, config: Mapping[str, JSON]) -> None:
        """Does nothing: the table holds metrics only."""

    def close(self, status: str) -> None:
        """Resets the path; the file is never left open, and later metrics append to it."""
        self._path = None

    def position(self) -> int:
        """Returns the number of rows; a new column would shift byte offsets."""
        if self._path is not None:
            return self._rows
        path = Path(self._locate())
        with explained(path):
            return max(0, len(_read(path)) - 1)

    def resume(self, step: int, position: JSON = None) -> None:
        """Drops later rows, and columns that are then empty; see `ResumingLogger`.

        Raises:
            RunDirectoryError: rows cannot be read, or the file cannot be written; the file is
                unchanged.
        """
        self.close("interrupted")
        path = Path(self._locate())
        with explained(path):
            if not is_file(path) or path.stat().st_size == 0:
                return
            columns, *rows = _table(path)
            by_row = type(position) is int and 0 <= position <= len(rows)
            rows = rows[:position] if by_row else rows
            kept = _rows_up_to(path, columns, rows, None if by_row else step)
            used = [i for i in range(len(columns)) if i < len(COLUMNS) or any(r[i] for r in kept)]
            replace(path, _encode([[row[i] for i in used] for row in (columns, *kept)]))


def _rows_up_to(
    path: Path, columns: list[str], rows: list[list[str]], step: int | None
) -> list[list[str]]:
    """Returns the rows up to a step; None for all."""
    kept, unreadable = [], []
    for number, row in enumerate(rows, 1):
        try:
            if len(row) != len(columns):
                raise ValueError
            if step is None or int(row[0]) <= step:
                kept.append(row)
        except ValueError:
            unreadable.append(str(number))
    if unreadable:
        raise RunDirectoryError(
            f"Each row must have a step, and a cell for each of the {len(columns)} columns; "
            f"{len(unreadable)} rows of {str(path)!r} do not (the first: "
            f"{', '.join(unreadable[:10])}). The file is unchanged. Repair or remove these rows."
        )
    return kept


def _cell(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _encode(rows: Iterable[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _read(path: Path) -> list[list[str]]:
    """Returns the complete rows of a table, without an incomplete last one.

    Raises:
        RunDirectoryError: the file is not a CSV table in UTF-8.
    """
    content = path.read_bytes() if is_file(path) else b""
    limit = csv.field_size_limit(2**31 - 1)  # an array may be a long cell
    try:
        text = content[: content.rfind(b"\n") + 1].decode()
        return list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunDirectoryError(
            f"A CsvLogger appends to a table in UTF-8; {str(path)!r} is not one: {error}. "
            f"Repair it, or choose another path."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _table(path: Path) -> list[list[str]]:
    """Returns the header and the rows of a table that a CsvLogger wrote.

    Raises:
        RunDirectoryError: it is another file.
    """
    rows = _read(path)
    if not rows or tuple(rows[0][: len(COLUMNS)]) != COLUMNS:
        raise RunDirectoryError(
            f"A CsvLogger appends to a table whose columns start with {', '.join(COLUMNS)}; "
            f"{str(path)!r} is another file. Choose another path."
        )
    return rows


def _repair(path: Path) -> tuple[list[str], int]:
    """Cuts an existing table to complete rows; returns its columns and number of rows."""
    if not path.exists() or path.stat().st_size == 0:
        return [], 0
    rows = _table(path)
    if not path.read_bytes().endswith(b"\n"):
        replace(path, _encode(rows))
    return rows[0], len(rows) - 1
