"""Rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from distaff import _optional
from distaff.data.examples import stacked
from distaff.data.files import Block, FileExamples, Paths, Place, find_files
from distaff.data.loader import as_held_by_jax, num_examples
from distaff.errors import ConfigError, DataFileError, nearest
from distaff.typing import Batch


class ParquetExamples(FileExamples):
    """The rows of Parquet files, or of Arrow IPC files (Feather 2), as dicts by column.

    A value is a number, an array of numbers for a list, a str, or bytes; rows whose lists differ
    in their lengths have arrays of different lengths. A block is a row group, or a record batch.
    In memory are the chosen columns of `blocks_in_memory` of them, as arrays: write row groups
    that are small enough, of some 10,000 rows.

    `data.from_examples` gathers batches from these arrays, without rows in between, where all
    columns hold numbers of one shape. A `MappedLoader` around it changes whole batches; a
    `MappedExamples` makes each row a dict first, and is slower.

    Args:
        paths: a file, a glob pattern, or several of them; all have the columns, of one type.
        columns: their names. None: all.
        blocks_in_memory: how many blocks are kept. A shuffled epoch mixes so many at a time.

    Raises:
        BatchError: there is no row; while it is read, a value is null.
        ConfigError: an option is out of range, or a column is unknown.
        DataFileError: a file is missing, damaged, or has other columns than the first; while it
            is read, it has changed.
        MissingExtraError: the package `pyarrow` is not installed.
    """

    def __init__(
        self, paths: Paths, columns: Sequence[str] | None = None, *, blocks_in_memory: int = 4
    ) -> None:
        arrow = _optional.load("arrow", extra="arrow")
        files = find_files(paths)
        self._tables = [arrow.Table(file) for file in files]
        kinds = self._tables[0].column_types
        self._columns = list(kinds) if columns is None else list(columns)
        if not self._columns:
            raise ConfigError("columns must name at least one column; got none. Name one.")
        for name in self._columns:
            if name not in kinds:
                raise ConfigError(f"Unknown column {name!r}. {nearest(name, kinds)}")
            if not arrow.is_readable(kinds[name]):
                raise ConfigError(
                    "A column must hold numbers, times, texts, bytes, or lists of them; "
                    f"{name!r} holds {kinds[name]}. Leave it out with columns=[...]."
                )
            for file, table in zip(files, self._tables, strict=True):
                if table.column_types.get(name) != kinds[name]:
                    raise DataFileError(
                        f"All files must have one type of each column; {name!r} is {kinds[name]} "
                        f"in {files[0].path}, and {table.column_types.get(name, 'missing')} in "
                        f"{file.path}. Write them alike, or leave the column out."
                    )
        blocks = [
            [Block(number, number + 1, size) for number, size in enumerate(table.sizes)]
            for table in self._tables
        ]
        super().__init__(files, blocks, blocks_in_memory=blocks_in_memory)

    def read(self, place: Place) -> _Rows:
        table = self._tables[place.file]
        return _Rows(table.read(place.start, self._columns, place.first))

    def read_batch(self, indices: Sequence[int]) -> Batch:
        """Returns rows as arrays by column, `[rows, ...]`, like stacking them one by one.

        Raises:
            BatchError: the values of a column differ in their shapes, or are no numbers.
        """
        rows = np.asarray(indices)
        blocks = np.searchsorted(self.starts, rows, side="right") - 1
        # In the order of the rows: the blocks of a window that ends are not read again.
        parts = {
            block: cast(_Rows, self._kept(block)).columns
            for block in dict.fromkeys(blocks.tolist())
        }
        forms = {tuple(_form(values) for values in columns.values()) for columns in parts.values()}
        first = next(iter(parts.values()))
        if len(forms) > 1 or not all(isinstance(values, np.ndarray) for values in first.values()):
            return stacked([self[index] for index in indices])
        batch = {
            name: np.empty((len(rows), *values.shape[1:]), values.dtype)
            for name, values in first.items()
        }
        for block, columns in parts.items():
            here = blocks == block
            for name, values in columns.items():
                batch[name][here] = values[rows[here] - self.starts[block]]
        num_examples(batch)
        return jax.tree.map(as_held_by_jax, batch)


class _Rows:
    """Columns of a block, read row by row."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


def _form(values: Any) -> tuple[Any, ...] | None:
    return (values.dtype, values.shape[1:]) if isinstance(values, np.ndarray) else None
