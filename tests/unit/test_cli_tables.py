"""Tables, CSV or Parquet, as the arrays that a model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distaff import data
from distaff.cli.files import arrays
from distaff.cli.files.selection import select
from distaff.cli.files.tables import numbers, read_table
from distaff.errors import BatchError, ConfigError, DataFileError

EXAMPLE = {"x": np.zeros((1, 2, 1), np.float32), "label": np.zeros(1, np.int32)}


def csv(text: str) -> Any:
    Path("data.csv").write_text(text)
    return read_table(Path("data.csv"))


def test_columns_have_the_names_of_entries():
    table = csv('\ufefflabel, x_1,id,x_0\n1,0.5,a,2e3\n\n0,-1,"b,\nc", 7 \n')
    found = select(table, EXAMPLE, None, (), with_targets=True)
    np.testing.assert_array_equal(found.batch["x"], np.float32([[[2e3], [0.5]], [[7], [-1]]]))
    np.testing.assert_array_equal(found.batch["label"], [1, 0])
    assert {name: each.dtype.name for name, each in found.batch.items()} == {
        "x": "float32",
        "label": "int32",
    }
    assert found.unused == ["id"]
    found = select(table, EXAMPLE, None, (), with_targets=False)
    assert (set(found.batch), found.unused) == ({"x"}, ["label", "id"])


def test_columns_of_other_names_are_chosen_in_their_order():
    table = csv("b1,a,b0\n1,2,3\n")
    for columns, values in (((("a", "b1"), [2, 1])), (("b*",), [1, 3]), (("b0", "b*"), [3, 1])):
        found = select(table, EXAMPLE, None, columns, with_targets=False)
        assert found.batch["x"].ravel().tolist() == values
    found = select(table, (np.zeros((1, 3)), np.zeros(1)), None, ("*",), with_targets=False)
    assert found.batch["x"].tolist() == [[1, 2, 3]]


def test_parquet_has_columns_of_lists_and_numbers():
    table = {"x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "label": [1, 2, 3], "day": ["a"] * 3}
    pq.write_table(pa.table(table), "data.parquet", row_group_size=2)
    found = select(read_table(Path("data.parquet")), EXAMPLE, None, (), with_targets=True)
    assert found.batch["x"].ravel().tolist() == [1, 2, 3, 4, 5, 6]
    assert (found.batch["label"].dtype, found.batch["label"].tolist()) == (np.int32, [1, 2, 3])
    with pytest.raises(DataFileError, match=r"'day' of 'data.parquet' .* row 0 has 'a'"):
        numbers(read_table(Path("data.parquet")), "day", np.float32)


def test_null_of_a_parquet_file_is_named():
    pq.write_table(pa.table({"x_0": [1.0, 2.0], "x_1": [1.0, None]}), "data.parquet")
    with pytest.raises(BatchError, match="'x_1' is null in row 1"):
        select(read_table(Path("data.parquet")), EXAMPLE, None, (), with_targets=False)


def test_columns_of_a_data_frame_are_coded_as_in_training():
    coding = data.FrameCoding(
        ("area",), {"floor": (1, 2), "city": ("Bonn", "Rome")}, "sold", (False, True)
    )
    columns = {"area": [1.5, 2], "floor": [2, 1], "city": ["Rome", "Bonn"], "sold": [True, False]}
    pq.write_table(pa.table(columns), "data.parquet")
    Path("data.csv").write_text("id,area,floor,city,sold\n7,1.5,2,Rome,True\n7,2,1,Bonn,false\n")
    for file, unused in (("data.csv", ["id"]), ("data.parquet", [])):
        found = select(read_table(Path(file)), None, coding, (), with_targets=True)
        assert found.unused == unused
        assert found.batch["y"].tolist() == [1, 0]
        read = {name: values.tolist() for name, values in found.batch["x"].items()}
        assert read == {"floor": [1, 0], "city": [1, 0], "numbers": [[1.5], [2]]}
    with pytest.raises(BatchError, match=r"'city' has the unknown category 'Oslo', first in row 1"):
        select(csv("area,floor,city\n1,2,Rome\n1,2,Oslo\n"), None, coding, (), with_targets=False)
    found = select(
        csv("area,floor,city\nTrue,1,Rome\nfalse,2,Bonn\n"), None, coding, (), with_targets=False
    )
    assert found.batch["x"]["numbers"].tolist() == [[1.0], [0.0]]  # as pandas writes bools
    with pytest.raises(ConfigError, match="Leave out --columns"):
        select(csv("area\n1\n"), None, coding, ("area",), with_targets=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x_0,x_1\n1,2\n3,abc\n", r"Column 'x_1' .* row 1 \(line 3\) has 'abc'"),
        ("x_0,x_1\n\n1,\n", r"Column 'x_1' .* row 0 \(line 3\) has ''"),
        ("x_0,x_1\n1,nan\n", "finite numbers.* has 'nan'"),
        ("x_0,x_1\n1,1e39\n", r"finite numbers \(float32\).* has '1e39'"),
        ("x_0,x_1,label\n1,1,0.5\n", r"whole numbers \(int32\).* has '0.5'"),
        ("x_0,x_1,label\n1,1,2147483648\n", "whole numbers.* has '2147483648'"),
        ("x_0,x_1\n1,2\n3\n", "line 3 of 'data.csv' has 1 values for 2 columns"),
        ("x_0,x_0\n1,2\n", "several columns \\['x_0'\\]"),
        ("x_0,x_1\n", "no rows"),
        ("", "no columns"),
        ('x_0,x_1\n1,"2\n', "cannot be read as CSV"),
    ],
)
def test_wrong_tables_name_the_column_and_the_row(text, message):
    with pytest.raises(DataFileError, match=message):
        select(csv(text), EXAMPLE, None, (), with_targets=True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            (),
            r"No column .* takes 'x' with 2 values per row, 'label'; the columns are \['a', 'b'\]",
        ),
        (("a",), r"'x' with 2 values per row; the columns \['a'\] .* have 1 value"),
        (("a", "c"), "no column 'c'"),
    ],
)
def test_columns_that_do_not_fit_are_errors(columns, message):
    with pytest.raises(ConfigError, match=message):
        select(csv("a,b\n1,2\n"), EXAMPLE, None, columns, with_targets=True)


def test_missing_part_of_an_input_is_named():
    with pytest.raises(ConfigError, match="no column 'x_1'"):
        select(csv("x_0,y\n1,2\n"), EXAMPLE, None, (), with_targets=True)


def test_written_numbers_are_read_back_exactly():
    random = np.random.default_rng(0)
    written = {
        "single": random.normal(size=(5, 2)).astype(np.float32),
        "double": random.normal(size=5),
        "whole": np.array([2**62 + 1, -1, 0, 1, 2]),
        "flag": np.array([True, False, True, True, False]),
    }
    for file in ("out.csv", "out.parquet"):
        arrays.write(Path(file), written)
        table = read_table(Path(file))
        assert table.names == ["single_0", "single_1", "double", "whole", "flag"]
        for name in table.names:
            expected = written[name] if name in written else written["single"][:, int(name[-1])]
            np.testing.assert_array_equal(numbers(table, name, expected.dtype), expected)


def test_outputs_whose_columns_have_one_name_are_errors():
    with pytest.raises(ConfigError, match="'a_1'"):
        arrays.write(Path("out.csv"), {"a": np.zeros((3, 2)), "a_1": np.zeros(3)})
    assert list(Path().iterdir()) == []
