"""Arrow: columns of Parquet and Arrow IPC files (including Feather 2) as NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from distaff.data.formats.files import DataFile
from distaff.errors import BatchError, DataFileError

Column: TypeAlias = np.ndarray | Sequence[Any]
"""The values of a column: an array `[rows, ...]`, or a sequence with one value per row."""

_LISTS = (pa.ListType, pa.LargeListType)
_NUMBERS = (
    *(types.is_boolean, types.is_integer, types.is_floating),
    *(types.is_date, types.is_timestamp, types.is_duration),  # other types become objects, or crash
)
_OBJECTS = (
    *(types.is_string, types.is_large_string, types.is_string_view),
    *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
)


class Table:
    """A file of columns in blocks: row groups in Parquet, record batches in Arrow IPC.

    Attributes:
        sizes: number of rows in each block.
        column_types: type of each column.

    Raises:
        DataFileError: it is not a whole Parquet or Arrow IPC file, or has duplicate columns.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        start = file.read(0, 4)
        if start == b"\xff\xff\xff\xff":
            raise DataFileError(
                f"Arrow files must be in the IPC file format, for random access; {file.path} is an "
                "Arrow stream. Write it again with pyarrow.ipc.new_file."
            )
        try:
            self._metadata = pq.read_metadata(file.path) if start == b"PAR1" else None
            schema, self.sizes = self._contents()
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        self._names = schema.names
        self.column_types: Mapping[str, pa.DataType] = dict(
            zip(schema.names, schema.types, strict=True)
        )
        if len(self.column_types) < len(schema.names):
            raise DataFileError(
                f"Each column needs a unique name; {file.path} has {schema.names}. Write it again "
                "with other names."
            )

    def read(self, block: int, columns: Sequence[str], first: int) -> dict[str, Column]:
        """Returns columns of a block.

        Args:
            block: index of the block.
            columns: names of the columns.
            first: index in the file of the first row, for errors.

        Raises:
            BatchError: a value is null.
            DataFileError: the file cannot be read.
        """
        try:
            table = self._read(block, columns)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error
        return {name: self._values(name, table.column(name), first) for name in columns}

    def _values(self, name: str, column: pa.ChunkedArray, first: int) -> Column:
        """Returns the values of a column; Arrow itself cannot join more than 2 GiB."""
        parts = []
        for chunk in column.chunks:
            row = _first_null(chunk)
            if row is not None:
                raise BatchError(
                    f"Columns must not have nulls; {name!r} is null in row {first + row} of "
                    f"{self._file.path}. Fill or drop nulls, or exclude the column with "
                    "columns=[...]."
                )
            parts.append(_as_numpy(chunk))
            first += len(chunk)
        return _join([part for part in parts if len(part)])

    def _contents(self) -> tuple[pa.Schema, list[int]]:
        if self._metadata is not None:
            groups = map(self._metadata.row_group, range(self._metadata.num_row_groups))
            return self._metadata.schema.to_arrow_schema(), [group.num_rows for group in groups]
        with self._batches(None) as reader:
            schema = reader.schema
        widths = [_width(kind) for kind in schema.types]
        with self._batches([widths.index(min(widths, default=0))]) as reader:
            batches = map(reader.get_batch, range(reader.num_record_batches))
            return schema, [batch.num_rows for batch in batches]

    def _read(self, block: int, columns: Sequence[str]) -> pa.Table:
        if self._metadata is not None:
            with pq.ParquetFile(self._file.path, metadata=self._metadata) as file:
                return file.read_row_group(block, columns=list(columns))
        with self._batches([self._names.index(name) for name in columns]) as reader:
            return pa.Table.from_batches([reader.get_batch(block)])

    def _batches(self, columns: list[int] | None) -> pa.RecordBatchFileReader:
        return pa.ipc.open_file(
            pa.OSFile(str(self._file.path)), options=pa.ipc.IpcReadOptions(included_fields=columns)
        )

    def _unreadable(self, error: Exception) -> DataFileError:
        return DataFileError(
            f"{self._file.path} is not a whole Parquet or Arrow IPC file: {error}. Get or write it "
            "again."
        )


def write_parquet(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns `[rows]` to a Parquet file.

    Raises:
        OSError: the file cannot be written.
    """
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)


def is_readable(kind: pa.DataType) -> bool:
    """Returns whether values are numbers, dates, durations, texts, bytes, or lists of these."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_readable(kind.storage_type)
    if isinstance(kind, (*_LISTS, pa.FixedSizeListType, pa.DictionaryType)):
        return is_readable(kind.value_type)
    return any(of_kind(kind) for of_kind in (*_NUMBERS, *_OBJECTS))


def _first_null(values: pa.Array) -> int | None:
    """Returns the first row that is null or a list that contains null; None without one."""
    values = _plain(values)
    if values.null_count:
        return pc.index(values.is_null(), True).as_py()
    if not isinstance(values.type, (*_LISTS, pa.FixedSizeListType)):
        return None
    inner = _first_null(values.flatten())
    return None if inner is None else values.value_parent_indices()[inner].as_py()


def _plain(values: pa.Array) -> pa.Array:
    """Returns the storage of extension types, and decodes dictionaries."""
    while isinstance(values, pa.ExtensionArray):
        values = values.storage
    return values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values


def _width(kind: pa.DataType) -> float:
    """Returns the bits per number; infinity for other types."""
    return kind.bit_width if any(of_kind(kind) for of_kind in _NUMBERS) else math.inf


def _join(parts: Sequence[Column]) -> Column:
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts) and len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return list(chain.from_iterable(parts))


def _as_numpy(values: pa.Array) -> Column:
    """Returns values without nulls; lists of equal length become an axis."""
    if isinstance(values, pa.FixedShapeTensorArray):
        return values.to_numpy_ndarray()
    values = _plain(values)
    kind = values.type
    if isinstance(kind, pa.FixedSizeListType):
        bounds = np.arange(len(values) + 1) * kind.list_size
    elif isinstance(kind, _LISTS):
        offsets = values.offsets.to_numpy()
        bounds = offsets - offsets[0]
    elif any(of_kind(kind) for of_kind in _OBJECTS):
        return values.to_pylist()
    else:
        return values.to_numpy(zero_copy_only=False)
    inner = _as_numpy(values.flatten())
    lengths = np.diff(bounds)
    if isinstance(inner, np.ndarray) and len(lengths) and (lengths == lengths[0]).all():
        return inner.reshape(len(values), lengths[0], *inner.shape[1:])
    return [inner[start:stop] for start, stop in pairwise(bounds.tolist())]
