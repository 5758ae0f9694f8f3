"""Reads rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from distaff.core import optional
from distaff.core.typing import Batch
from distaff.data.examples.examples import stacked
from distaff.data.formats.files import BlockPlace, FileBlock, FileExamples, Paths, find_files
from distaff.data.loader import canonicalize_leaf, num_examples
from distaff.errors import ConfigError, DataFileError, nearest


class ParquetExamples(FileExamples):
    """The rows of Parquet files, or of Arrow IPC files (Feather 2), as dicts by column.

    A value is a number, a str, bytes, or, for a list, an array of numbers, whose length may differ
    between rows. Rows are copies, and can be modified. A block is a row group or a record batch.
    Memory holds the chosen columns of `blocks_in_memory` blocks, as arrays: write small row groups,
    of about 10,000 rows.

    If all columns hold numbers of one shape, `data.from_examples` gathers batches directly from
    these arrays. To transform data, prefer a `MappedLoader`, which maps whole batches; a
    `MappedExamples` is slower, since it makes a dict of each row.

    Args:
        paths: a file, a glob pattern, or several of them, all with columns of the same types.
        columns: names of the columns. None for all.
        blocks_in_memory: number of cached blocks, which a shuffled epoch mixes at a time.

    Raises:
        BatchError: there are no rows; while reading: a value is null.
        ConfigError: an option is out of range, or a column is unknown.
        DataFileError: a file is missing, damaged, or has other columns than the first; while
            reading: it has changed.
        MissingExtraError: the package `pyarrow` is not installed.
    """

    def __init__(
        self, paths: Paths, columns: Sequence[str] | None = None, *, blocks_in_memory: int = 4
    ) -> None:
        arrow = optional.load("arrow", extra="arrow")
        files = find_files(paths)
        self._tables = [arrow.Table(file) for file in files]
        kinds = self._tables[0].column_types
        if isinstance(columns, str):
            raise ConfigError(f"columns must be a list of names; got a str. Write [{columns!r}].")
        self._columns = list(kinds) if columns is None else list(columns)
        if not self._columns:
            raise ConfigError("columns must name at least one column; got none. Name one.")
        for name in self._columns:
            if name not in kinds:
                raise ConfigError(f"Unknown column {name!r}. {nearest(name, kinds)}")
            if not arrow.is_readable(kinds[name]):
                raise ConfigError(
                    "A column must hold numbers, dates, timestamps, durations, strings, bytes, or "
                    f"lists of them; {name!r} holds {kinds[name]}. Omit it with columns=[...]."
                )
            for file, table in zip(files, self._tables, strict=True):
                if table.column_types.get(name) != kinds[name]:
                    raise DataFileError(
                        f"A column must have one type in all files; {name!r} is {kinds[name]} in "
                        f"{files[0].path}, and {table.column_types.get(name, 'missing')} in "
                        f"{file.path}. Convert the files, or omit the column."
                    )
        blocks = [
            [FileBlock(number, number + 1, size) for number, size in enumerate(table.sizes)]
            for table in self._tables
        ]
        super().__init__(files, blocks, blocks_in_memory=blocks_in_memory)

    def read(self, place: BlockPlace) -> _ParquetRows:
        table = self._tables[place.file]
        return _ParquetRows(table.read(place.start, self._columns, place.first))

    def read_batch(self, indices: Sequence[int]) -> Batch:
        """Returns rows as arrays by column, `[rows, ...]`, equal to stacking them one by one.

        Raises:
            BatchError: the values of a column differ in shape, or are not numbers.
        """
        rows = np.asarray(indices)
        blocks = np.searchsorted(self.starts, rows, side="right") - 1
        batch: dict[str, np.ndarray] = {}
        # In the order of the rows, so that the blocks of a finished window are not read again.
        for block in dict.fromkeys(blocks.tolist()):
            here = blocks == block
            inside = rows[here] - self.starts[block]
            if not cast(_ParquetRows, self._block(block)).put(batch, here, inside):
                return stacked([self[index] for index in indices])
        num_examples(batch)
        return {name: canonicalize_leaf(values, (name,)) for name, values in batch.items()}


class _ParquetRows:
    """The columns of a block, as rows."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {name: _copied(values[index]) for name, values in self._columns.items()}

    def put(self, batch: dict[str, np.ndarray], here: np.ndarray, rows: np.ndarray) -> bool:
        """Copies rows into a batch; returns False if a column is not an array of the same shape.

        Args:
            batch: columns `[batch, ...]`; missing columns are added.
            here: places of the rows in the batch, bool `[batch]`.
            rows: indices of the rows in the block, int `[rows]`.
        """
        for name, values in self._columns.items():
            if not isinstance(values, np.ndarray):
                return False
            if name not in batch:
                batch[name] = np.empty((len(here), *values.shape[1:]), values.dtype)
            if batch[name].shape[1:] != values.shape[1:]:
                return False
            batch[name][here] = values[rows]
        return True


def _copied(value: Any) -> Any:
    """Returns a copy of a value that does not share memory with its block."""
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return value.copy() if isinstance(value, np.ndarray) else value
