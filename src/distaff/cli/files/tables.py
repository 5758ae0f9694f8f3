"""Reads the columns of tables, CSV or Parquet, as arrays."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distaff.core import optional
from distaff.data.formats.files import find_files
from distaff.errors import DataFileError

ENDINGS = (".csv", ".parquet", ".arrow", ".feather")
"""Endings of the files that hold tables."""

_WORDS = {"true": "1", "false": "0"}


class ColumnFile(Protocol):
    """A file of columns.

    Attributes:
        path: its path.
        names: the names of its columns.
    """

    path: Path
    names: Sequence[str]

    def column(self, name: str) -> Any:
        """Returns the values of a column: an array `[rows, ...]`, or a list of texts."""
        ...

    def place(self, row: int) -> str:
        """Returns where a row is, for errors."""
        ...


class Csv:
    """A CSV file in UTF-8 whose first line has the names of the columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                rows = [(reader.line_num, row) for row in reader if row]
        except (OSError, ValueError, csv.Error) as error:
            raise DataFileError(
                f"{str(path)!r} cannot be read as CSV in UTF-8: {error}. Write it again, with "
                "commas and a line of column names."
            ) from error
        self.names: Sequence[str] = [name.strip() for name in rows[0][1]] if rows else []
        self._lines = [line for line, _ in rows[1:]]
        _check_names(path, self.names, len(rows) - 1)
        for line, row in rows:
            if len(row) != len(self.names):
                raise DataFileError(
                    f"Each row of a table must have a value per column; line {line} of "
                    f"{str(path)!r} has {len(row)} values for {len(self.names)} columns. "
                    "Correct the line."
                )
        self._columns = dict(
            zip(self.names, zip(*(row for _, row in rows[1:]), strict=True), strict=True)
        )

    def column(self, name: str) -> list[str]:
        """Returns the texts of a column.

        Raises:
            DataFileError: one is empty.
        """
        texts = [text.strip() for text in self._columns[name]]
        if "" in texts:
            raise wrong_value(self, name, texts.index(""), "", "a value in each row")
        return texts

    def place(self, row: int) -> str:
        """Returns where a row is, for errors."""
        return f"row {row} (line {self._lines[row]})"


class Parquet:
    """A Parquet or Arrow IPC file."""

    def __init__(self, path: Path) -> None:
        arrow = optional.load("arrow", extra="arrow")
        self.path = path
        (file,) = find_files(path)
        self._table = arrow.Table(file)
        self._is_readable = arrow.is_readable
        self.names: Sequence[str] = list(self._table.column_types)
        _check_names(path, self.names, sum(self._table.sizes))

    def column(self, name: str) -> Any:
        """Returns the values of a column.

        Raises:
            BatchError: a value is null.
            DataFileError: the values are not numbers or texts, or the file cannot be read.
        """
        kind = self._table.column_types[name]
        if not self._is_readable(kind):
            raise DataFileError(
                f"A column must hold numbers or texts; {name!r} of {str(self.path)!r} holds {kind}."
                " Convert it, or leave it out."
            )
        parts, first = [], 0
        for block, size in enumerate(self._table.sizes):
            parts.append(self._table.read(block, [name], first)[name])
            first += size
        if all(isinstance(part, np.ndarray) for part in parts):
            return np.concatenate(parts)
        return [value for part in parts for value in part]

    def place(self, row: int) -> str:
        """Returns where a row is, for errors."""
        return f"row {row}"


def read_table(path: Path) -> ColumnFile:
    """Opens a table by its ending.

    Raises:
        DataFileError: the file is missing or damaged, has no rows, or has two columns of one name.
        MissingExtraError: it is not CSV, and the package `pyarrow` is not installed.
    """
    return Csv(path) if path.suffix == ".csv" else Parquet(path)


def numbers(table: ColumnFile, name: str, dtype: Any, *, bools: bool = False) -> np.ndarray:
    """Returns a column as an array of this dtype, `[rows, ...]`.

    Args:
        table: the table.
        name: the column.
        dtype: the dtype of the array.
        bools: whether the texts true and false are the numbers 1 and 0.

    Raises:
        DataFileError: a value is not a finite number of this dtype.
    """
    dtype = np.dtype(dtype)
    values = table.column(name)
    bools = bools or dtype.kind == "b"
    found = _converted(values, dtype, bools)
    if found is not None:
        return found
    kind = {"i": "whole numbers", "u": "whole numbers", "b": "true or false"}.get(dtype.kind)
    for row, value in enumerate(values):
        if _converted([value], dtype, bools) is None:
            raise wrong_value(table, name, row, value, f"{kind or 'finite numbers'} ({dtype})")
    raise DataFileError(
        f"Column {name!r} of {str(table.path)!r} must hold values of one shape. Write lists of "
        "equal length."
    )


def wrong_value(table: ColumnFile, name: str, row: int, value: Any, rule: str) -> DataFileError:
    """Returns the error for a value of a table."""
    return DataFileError(
        f"Column {name!r} of {str(table.path)!r} must hold {rule}; {table.place(row)} has "
        f"{value if isinstance(value, np.generic | np.ndarray) else repr(value)}. Correct it, or "
        "remove the row."
    )


def _check_names(path: Path, names: Sequence[str], num_rows: int) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if not names or twice or num_rows < 1:
        what = f"several columns {twice}" if twice else "no rows" if names else "no columns"
        raise DataFileError(
            "A table must have a name for each column, and at least one row; "
            f"{str(path)!r} has {what}. Write it again."
        )


def _converted(values: Any, dtype: np.dtype, bools: bool) -> np.ndarray | None:
    """Returns values as an array of a dtype; None if one of them is not such a number."""
    with np.errstate(all="ignore"):
        try:
            read = np.asarray(values)
            if read.dtype.kind == "U" and bools:
                read = np.asarray([_WORDS.get(text.lower(), text) for text in read.tolist()])
            if read.dtype.kind in "UO":
                read = _parsed(read, whole=dtype.kind in "iub")
            array = read.astype(dtype)
        except (TypeError, ValueError, OverflowError):
            return None
        is_exact = array == read if dtype.kind in "iub" else np.isfinite(array)
    return array if np.all(is_exact) else None


def _parsed(texts: np.ndarray, *, whole: bool) -> np.ndarray:
    if whole:
        try:
            return texts.astype(np.int64)
        except ValueError:  # such as 3.0
            pass
    return texts.astype(np.float64)
