"""Parquet and Arrow files, against pyarrow's own values."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff import data
from distaff.data.examples.examples import stacked
from distaff.errors import BatchError, ConfigError, DataFileError
from distaff.testing.loaders import assert_batches_equal

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
arrow = pytest.importorskip("distaff.integrations.arrow")

ROWS = 23
COLUMNS: dict[str, Any] = {
    "int": pa.array(range(ROWS), pa.int64()),
    "byte": pa.array(range(ROWS), pa.uint8()),
    "double": pa.array(np.linspace(0, 1, ROWS)),
    "half": pa.array(np.arange(ROWS, dtype=np.float16)),
    "flag": pa.array([row % 3 == 0 for row in range(ROWS)]),
    "fixed": pa.array([[row, -row] for row in range(ROWS)], pa.list_(pa.int32(), 2)),
    "even": pa.array([[row, 1, 2] for row in range(ROWS)], pa.list_(pa.float32())),
    "matrix": pa.array(
        [[[row, 1], [2, 3], [4, 5]] for row in range(ROWS)], pa.list_(pa.list_(pa.int16(), 2), 3)
    ),
    "ragged": pa.array([list(range(row % 4)) for row in range(ROWS)], pa.large_list(pa.int64())),
    "text": pa.array([f"\u00e9{row}" for row in range(ROWS)]),
    "bytes": pa.array([b"\xff" * row for row in range(ROWS)]),
    "word": pa.array(["ab"[row % 2] for row in range(ROWS)]).dictionary_encode(),
    "words": pa.array([["a", "b"][: row % 3] for row in range(ROWS)]),
    "time": pa.array(range(ROWS), pa.timestamp("s")),
}
NUMBERS = ["int", "byte", "double", "half", "flag", "fixed", "even", "matrix"]


def write(path: Path, table: Any, rows_per_block: int = 5) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows_per_block)
    else:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, table.schema, options=options) as writer,
        ):
            writer.write_table(table, max_chunksize=rows_per_block)
    return path


@pytest.fixture(params=["parquet", "arrow"])
def path(request, tmp_path) -> Path:
    return write(tmp_path / f"a.{request.param}", pa.table(COLUMNS))


def test_rows_are_those_of_arrow(path):
    examples = data.ParquetExamples([path, path], blocks_in_memory=2)
    assert len(examples) == 2 * ROWS
    assert np.diff(examples.starts).tolist() == [5, 5, 5, 5, 3] * 2
    expected = pa.table(COLUMNS).to_pylist() * 2
    for index in range(2 * ROWS):
        row = examples[index]
        assert list(row) == list(COLUMNS)
        row["time"] = row["time"].item()
        found = {name: getattr(value, "tolist", lambda v=value: v)() for name, value in row.items()}
        assert found == expected[index]
    assert examples[3]["fixed"].dtype == np.int32
    assert examples[3]["matrix"].shape == (3, 2)
    assert examples[3]["ragged"].dtype == np.int64


@settings(deadline=None)
@given(
    indices=st.lists(st.integers(0, 2 * ROWS - 1), min_size=1, max_size=12),
    columns=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4, unique=True),
    blocks_in_memory=st.integers(1, 3),
)
def test_a_batch_is_what_stacking_rows_gives(tmp_path_factory, indices, columns, blocks_in_memory):
    path = tmp_path_factory.getbasetemp() / "batch.parquet"
    if not path.exists():
        write(path, pa.table(COLUMNS))
    examples = data.ParquetExamples([path, path], columns, blocks_in_memory=blocks_in_memory)
    assert_batches_equal(
        examples.read_batch(indices), stacked([examples[index] for index in indices])
    )


def test_an_epoch_reads_each_block_once(path):
    reads = []

    class Counted(data.ParquetExamples):
        def read(self, place):
            reads.append(place)
            return super().read(place)

    examples = Counted([path, path, path], ["int"], blocks_in_memory=4)
    loader = data.from_examples(examples, 7, shuffle=True, remainder="keep")
    found = np.concatenate([batch["int"] for batch in loader])
    assert sorted(found.tolist()) == sorted([*range(ROWS)] * 3)
    assert len(reads) == 15


def test_no_more_blocks_are_in_memory_than_are_kept(path):
    blocks, most = [], 0

    class Watched(data.ParquetExamples):
        def read(self, place):
            nonlocal most
            found = super().read(place)
            blocks.append(weakref.ref(found))
            most = max(most, sum(block() is not None for block in blocks))
            return found

    examples = Watched([path, path], ["int"], blocks_in_memory=3)
    list(data.from_examples(examples, 7, shuffle=True))
    assert most == 3


def test_a_batch_may_have_rows_of_blocks_of_different_forms(tmp_path):
    rows = [[1, 2], [3, 4], [5, 6], [7]]
    path = write(tmp_path / "a.parquet", pa.table({"x": rows}), rows_per_block=2)
    loader = data.from_examples(data.ParquetExamples(path), 3)
    assert next(iter(loader))["x"].tolist() == rows[:3]
    longer = pa.table({"x": [[1, 2], [3, 4], [5, 6, 7], [8, 9, 0]]})
    path = write(tmp_path / "b.parquet", longer, rows_per_block=2)
    with pytest.raises(BatchError, match=r"'x' has \[\(2,\), \(3,\)\]"):
        next(iter(data.from_examples(data.ParquetExamples(path), 3)))


def test_a_row_that_is_changed_stays_as_it_is_in_the_file(tmp_path):
    table = pa.table(
        {
            "flags": [[True, False]] * 2,
            "numbers": [[1.0, 2.0]] * 2,
            "ragged": [[1], [2, 3]],
            "nested": [[[1], [2, 3]], [[4]]],
            "words": [["a"], ["b", "c"]],
        }
    )
    examples = data.ParquetExamples(write(tmp_path / "a.parquet", table))
    row, expected = examples[0], table.to_pylist()[0]
    for name in ("flags", "numbers", "ragged"):
        row[name][0] = 0
    row["nested"][0][0] = 0
    row["words"][0] = "z"
    row = examples[0]
    found = {name: row[name].tolist() for name in ("flags", "numbers", "ragged")}
    nested = [each.tolist() for each in row["nested"]]
    assert {**found, "nested": nested, "words": row["words"]} == expected


def test_integers_beyond_32_bits_are_refused(path):
    column = pa.array([2**40, *range(ROWS - 1)])
    write(path, pa.table({"int": column}))
    with pytest.raises(BatchError, match="'int' has values from 0 to 1099511627776"):
        next(iter(data.from_examples(data.ParquetExamples(path), 4)))


def test_columns_may_come_in_chunks(path, monkeypatch):
    expected = [data.ParquetExamples(path)[index] for index in range(ROWS)]
    read = arrow.Table._read

    def in_chunks(self, block, columns):
        whole = [column.chunk(0) for column in read(self, block, columns).columns]
        parts = [pa.chunked_array([each[:1], each[1:1], each[1:]]) for each in whole]
        return pa.table(parts, names=columns)

    def overflow(arrays):
        raise pa.ArrowInvalid("offset overflow while concatenating arrays")

    monkeypatch.setattr(arrow.Table, "_read", in_chunks)
    monkeypatch.setattr(pa, "concat_arrays", overflow)
    examples = data.ParquetExamples(path)
    found = [examples[index] for index in range(ROWS)]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    columns = arrow.Table(examples.files[0]).read(0, NUMBERS, 0)
    assert all(isinstance(values, np.ndarray) for values in columns.values())
    column = pa.array([1, 2, None])
    examples = data.ParquetExamples(write(path.with_stem("b"), pa.table({"x": column})))
    with pytest.raises(BatchError, match="null in row 2 of"):
        assert examples[0]


def test_rows_of_arrow_are_counted_by_the_narrowest_column(tmp_path, monkeypatch):
    names = ["text", "even", "word", "int", "byte", "double"]
    path = write(tmp_path / "a.arrow", pa.table({name: COLUMNS[name] for name in names}))
    read, batches = [], arrow.Table._batches

    def counted(self, columns):
        read.append(columns)
        return batches(self, columns)

    monkeypatch.setattr(arrow.Table, "_batches", counted)
    assert len(data.ParquetExamples(path)) == ROWS
    assert read == [None, [names.index("byte")]]


@pytest.mark.parametrize("name", ["ragged", "text", "bytes", "time", "words"])
def test_what_fills_no_batch(path, name):
    loader = data.from_examples(data.ParquetExamples(path, [name]), 4)
    said = "must have one shape|must hold numbers|one structure"
    with pytest.raises(BatchError, match=said):
        list(loader)


@pytest.mark.parametrize(
    ("values", "row"),
    [
        (pa.array([1, 2, 3, None]), 3),
        (pa.array([[1], None, [2]], pa.list_(pa.int8())), 1),
        (pa.array([[1], [], [2, None], [3]]), 2),
        (pa.array([[1, 2], [3, None]], pa.list_(pa.int8(), 2)), 1),
        (pa.array([["a"], ["b", None]]), 1),
        (pa.array(["a", None]).dictionary_encode(), 1),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_null_names_column_and_row(tmp_path, values, row, kind):
    path = write(tmp_path / f"a.{kind}", pa.table({"x": values}), rows_per_block=1)
    examples = data.ParquetExamples(path)
    with pytest.raises(BatchError, match=f"'x' is null in row {row} of"):
        assert examples[row]
    path = write(tmp_path / f"b.{kind}", pa.table({"x": values}), rows_per_block=9)
    with pytest.raises(BatchError, match=f"'x' is null in row {row} of"):
        assert data.ParquetExamples(path)[0]


def test_tensors_keep_their_values(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    path = write(tmp_path / "a.parquet", pa.table({"x": column}), rows_per_block=3)
    batch = next(iter(data.from_examples(data.ParquetExamples(path), 4)))
    np.testing.assert_array_equal(batch["x"], values)


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.list_(pa.int8(), 2)])
def test_lists_may_begin_behind_the_start_of_their_values(kind):
    values = pa.array([[0, 1], [2, 3], [4, 5]], kind)[1:]
    np.testing.assert_array_equal(arrow._as_numpy(values), [[2, 3], [4, 5]])


def duplicated(path: Path) -> Path:
    return write(path, pa.table([COLUMNS["int"], COLUMNS["int"]], names=["x", "x"]))


def cut(path: Path) -> Path:
    path.write_bytes(write(path, pa.table(COLUMNS)).read_bytes()[:-20])
    return path


def streamed(path: Path) -> Path:
    table = pa.table(COLUMNS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


TIMES = pa.array([[1], [2]], pa.list_(pa.time32("s")))


def test_intervals_are_refused(tmp_path):
    column = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    path = write(tmp_path / "a.arrow", pa.table({"x": column}))
    with pytest.raises(ConfigError, match="'x' holds month_day_nano_interval"):
        data.ParquetExamples(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda path: data.ParquetExamples(path.parent / "none"), DataFileError, "is not a file"),
        (lambda path: data.ParquetExamples(path, ["inn"]), ConfigError, "Did you mean 'int'"),
        (lambda path: data.ParquetExamples(path, []), ConfigError, "at least one column"),
        (lambda path: data.ParquetExamples(path, blocks_in_memory=0), ConfigError, "in_memory"),
        (lambda path: data.ParquetExamples(cut(path)), DataFileError, "not a whole Parquet"),
        (lambda path: data.ParquetExamples(duplicated(path)), DataFileError, "unique name"),
        (
            lambda path: data.ParquetExamples(write(path, pa.table({"x": [{"a": 1}]}))),
            ConfigError,
            "'x' holds struct",
        ),
        (lambda path: data.ParquetExamples(path, "int"), ConfigError, r"Write \['int'\]"),
        (lambda path: data.ParquetExamples(streamed(path)), DataFileError, "ipc.new_file"),
        (
            lambda path: data.ParquetExamples(write(path, pa.table({"x": TIMES}))),
            ConfigError,
            "'x' holds list<.*time32",
        ),
        (
            lambda path: data.ParquetExamples(write(path, pa.table(COLUMNS).slice(0, 0))),
            BatchError,
            "at least one example",
        ),
        (
            lambda path: data.ParquetExamples(
                [path, write(path.with_stem("b"), pa.table({"int": [1.0]}))], ["int"]
            ),
            DataFileError,
            "'int' is int64 in .*a.*, and double in .*b",
        ),
    ],
)
def test_what_is_refused(tmp_path, kind, make, error, said):
    path = write(tmp_path / f"a.{kind}", pa.table(COLUMNS))
    with pytest.raises(error, match=said):
        make(path)


def test_changed_file_is_noticed(path):
    examples = data.ParquetExamples(path, blocks_in_memory=1)
    assert examples[0]["int"] == 0
    write(path, pa.table(COLUMNS).slice(2))
    with pytest.raises(DataFileError, match="has changed"):
        assert examples[9]


def test_damaged_values_are_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": np.arange(1000)}), rows_per_block=1000)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    examples = data.ParquetExamples(path)
    with pytest.raises(DataFileError, match="not a whole Parquet"):
        assert examples[0]
