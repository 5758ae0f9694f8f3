"""Data frames as data: of pandas, of polars, and of a stand-in with the members that are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest

from distaff import Monitor, OptimizerConfig, data, tasks, zoo
from distaff.data import FrameCoding, FrameTable, from_frame
from distaff.errors import BatchError, ConfigError
from distaff.testing.loaders import assert_batches_equal
from scripted import Break, InterruptError


class StandInSeries:
    """A column with the members of pandas' that are used."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.dtype = values, values.dtype

    def to_numpy(self) -> np.ndarray:
        return self._values

    def isna(self) -> StandInSeries:
        return StandInSeries(np.array([x is None or x != x for x in self._values]))


class StandIn:
    """A data frame with the members that are used."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = list(columns)
        self._held = {}
        for name, values in columns.items():
            array = np.asarray(values)
            is_text = array.dtype.kind == "U"
            self._held[name] = array.astype(object) if is_text else array
        self.shape = (len(next(iter(self._held.values()))), len(columns))

    def to_numpy(self) -> np.ndarray:
        raise NotImplementedError

    def __getitem__(self, name: str) -> StandInSeries:
        return StandInSeries(self._held[name])


def make_frame(library: str, columns: dict[str, Any]) -> Any:
    if library == "stand-in":
        return StandIn(columns)
    return pytest.importorskip(library).DataFrame(columns)


@pytest.fixture(params=["stand-in", "pandas", "polars"])
def frame(request: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda columns: make_frame(request.param, columns)


CITIES = ["Rome", "Bonn", "Oslo"]


def columns(count: int = 60) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    area, rooms = rng.uniform(20, 200, count), rng.integers(1, 6, count)
    city = [CITIES[i] for i in rng.integers(0, 3, count)]
    price = area * 2 + rooms * 10 + np.array([CITIES.index(each) for each in city]) * 50
    kind = ["flat" if each < 90 else "house" for each in area]
    return {"area": area, "rooms": rooms, "city": city, "price": price, "kind": kind}


class Mixed(nn.Module):
    """Embeds the city, alongside the numbers."""

    outputs: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        city = nn.Embed(3, 2)(x["city"])
        return nn.Dense(self.outputs)(jnp.concatenate([x["numbers"] / 100, city], axis=1))


def options(**more: Any) -> dict[str, Any]:
    adam = OptimizerConfig("adam", learning_rate=0.05, schedule="constant")
    quiet = {"root": None, "enable_progress_bar": False, "tune_process": False}
    return {**quiet, "optimizer": adam, **more}


def params(trainer: Any) -> Any:
    return jax.tree.map(np.asarray, trainer.state.params)


def test_columns_become_leaves(frame):
    held = columns()
    table = from_frame(frame(held), target="price", columns=["rooms", "area"])
    assert (len(table), set(table.arrays)) == (60, {"x", "y"})
    np.testing.assert_array_equal(table["x"], np.stack([held["rooms"], held["area"]], axis=1))
    np.testing.assert_array_equal(table["y"], held["price"])
    assert table.coding == FrameCoding(("rooms", "area"), {}, "price")


def test_all_columns_but_the_target_are_inputs(frame):
    held = columns()
    table = from_frame(frame(held), target="price")
    assert table.coding.numbers == ("area", "rooms")
    assert table.coding.categories == {"city": ("Bonn", "Oslo", "Rome"), "kind": ("flat", "house")}
    assert set(table["x"]) == {"numbers", "city", "kind"}
    np.testing.assert_array_equal(
        table["x"]["city"], [("Bonn", "Oslo", "Rome").index(each) for each in held["city"]]
    )
    assert table["x"]["city"].dtype == np.int32


def test_targets_may_be_labels_bools_and_several_columns(frame):
    held = {**columns(), "is_large": columns()["area"] > 100}
    labels = from_frame(frame(held), target="kind", columns=["area"])
    assert labels.coding.labels == ("flat", "house")
    np.testing.assert_array_equal(labels["y"], [each == "house" for each in held["kind"]])
    bools = from_frame(frame(held), target="is_large", columns=["area"])
    assert (bools.coding.labels, bools["y"].dtype) == ((False, True), np.int32)
    several = from_frame(frame(held), target=["price", "rooms"], columns=["area"])
    np.testing.assert_array_equal(several["y"], np.stack([held["price"], held["rooms"]], axis=1))
    assert set(from_frame(frame(held), columns=["area"]).arrays) == {"x"}


def test_integers_may_be_categories(frame):
    table = from_frame(
        frame({"code": [53113, 10115, 53113], "y": [7, 9, 7]}),
        target="y",
        categories=["code", "y"],
    )
    assert table.coding.categories == {"code": (10115, 53113)}
    assert table["x"]["code"].tolist() == [1, 0, 1]
    assert (table.coding.labels, table["y"].tolist()) == ((7, 9), [0, 1, 0])


def test_bools_are_numbers(frame):
    table = from_frame(frame({"a": [True, False], "b": [2, 3]}))
    np.testing.assert_array_equal(table["x"], [[1, 2], [0, 3]])


def test_new_frame_is_coded_alike(frame):
    coding = from_frame(frame(columns()), target="price").coding
    new = {"kind": ["house"], "city": ["Rome"], "more": [0], "rooms": [2], "area": [50.0]}
    found = coding.encoded(frame(new), with_target=False)
    assert found["x"]["city"].tolist() == [2]
    np.testing.assert_array_equal(found["x"]["numbers"], [[50, 2]])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"city": ["Rome", "Paris"]}, r"'city' has the unknown category 'Paris', first in row 1"),
        ({"city": ["Rome", None]}, r"'city' has 1 missing values, first in row 1.*drop_nulls"),
        ({"area": [np.nan, 1.0]}, r"'area' has 1 missing values, first in row 0.*dropna"),
        ({"area": [np.inf, 1.0]}, "'area' has an infinite value in row 0"),
        ({"area": ["a", "b"]}, "'area' must hold numbers; it holds str"),
        ({"city": [1, 2]}, "'city' has the unknown category 1"),
        ({"area": None}, "val data must have the column 'area'; they have"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_wrong_column_of_a_new_frame_is_named(frame, change, complaint):
    coding = from_frame(frame(columns()), target="price", columns=["area", "city"]).coding
    held = {**{name: values[:2] for name, values in columns().items()}, **change}
    new = frame({name: values for name, values in held.items() if values is not None})
    with pytest.raises(BatchError, match=complaint):
        coding.encoded(new, name="val")


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"target": "prize"}, BatchError, "column 'prize'.*Did you mean 'price'"),
        ({"columns": "area"}, ConfigError, r"columns must be a list.*\['name', ...\]"),
        ({"target": "price", "columns": ["price", "area"]}, ConfigError, "other than the target"),
        ({"columns": []}, ConfigError, "must be a list of columns"),
        (
            {"target": ["price", "kind"], "columns": ["area"]},
            BatchError,
            "'kind' must hold numbers",
        ),
        ({"columns": ["area"], "categories": ["city"]}, ConfigError, "categories must be among"),
        ({"columns": ["area"], "categories": ["area"]}, BatchError, r"types \['float'\]"),
        ({"columns": ["none"]}, BatchError, "'none' has 60 missing values"),
        ({"columns": ["area", "city", "area"]}, ConfigError, r"got \['area'\] more than once"),
        ({"target": ["price", "price"]}, ConfigError, r"got \['price'\] more than once"),
    ],
)
def test_wrong_arguments_are_named(frame, arguments, error, complaint):
    with pytest.raises(error, match=complaint):
        from_frame(frame({**columns(), "none": [None] * 60}), **arguments)


def test_a_frame_without_rows_has_no_coding(frame):
    with pytest.raises(BatchError, match="The data frame has no rows"):
        from_frame(frame({"area": np.zeros(0), "city": np.zeros(0, object)}), target="area")


def test_only_data_frames_are_taken():
    with pytest.raises(ConfigError, match=r"got a ndarray\. Pass arrays as they are"):
        from_frame(np.ones((3, 2)))
    with pytest.raises(ConfigError, match="got a Table"):
        from_frame(pyarrow.table({"a": [1, 2]}))
    polars = pytest.importorskip("polars")
    with pytest.raises(ConfigError, match=r"got a LazyFrame\. Call collect"):
        from_frame(polars.DataFrame(columns()).lazy())


def test_column_must_not_be_named_as_the_matrix(frame):
    with pytest.raises(ConfigError, match="must not be named 'numbers'"):
        from_frame(frame({"numbers": ["a", "b"], "x": [1, 2]}))


def test_types_of_categories_keep_their_order():
    pandas = pytest.importorskip("pandas")
    sizes = pandas.Categorical(["L", "S"], categories=["S", "M", "L"])
    counts = pandas.Categorical([3, 1])
    table = from_frame(pandas.DataFrame({"size": sizes, "count": counts}))
    assert table.coding.categories == {"size": ("S", "M", "L"), "count": (1, 3)}
    assert table["x"]["size"].tolist() == [2, 0]
    other = pandas.DataFrame({"size": ["M"], "count": [3]})
    assert table.coding.encoded(other)["x"]["size"].tolist() == [1]


def test_types_of_categories_of_polars_keep_their_order():
    polars = pytest.importorskip("polars")
    sizes = polars.Series(["L", "S"], dtype=polars.Enum(["S", "M", "L"]))
    names = polars.Series(["b", "a"], dtype=polars.Categorical)
    table = from_frame(polars.DataFrame({"size": sizes, "name": names}))
    assert table.coding.categories == {"size": ("S", "M", "L"), "name": ("a", "b")}


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_columns_of_dates_and_lists_are_named(library):
    times = np.array(["2020-01-01", "2020-01-02"], "datetime64[us]")
    with pytest.raises(BatchError, match=r"Column 't' must hold numbers or categories.*dates"):
        from_frame(make_frame(library, {"t": times, "a": [1, 2]}))
    with pytest.raises(BatchError, match="Column 'l' must hold numbers or categories"):
        from_frame(make_frame(library, {"l": [[1], [1, 2]], "a": [1, 2]}))


def test_nullable_columns_of_pandas_are_read():
    pandas = pytest.importorskip("pandas")
    whole = {"i": pandas.array([1, 2], dtype="Int64"), "b": pandas.array([True, False], "boolean")}
    table = from_frame(pandas.DataFrame(whole))
    np.testing.assert_array_equal(table["x"], [[1, 1], [2, 0]])
    for values in (pandas.array([1, None], "Int64"), pandas.array([True, None], "boolean")):
        with pytest.raises(BatchError, match="'i' has 1 missing values, first in row 1"):
            from_frame(pandas.DataFrame({**whole, "i": values}))
    with pytest.raises(BatchError, match="have 2 columns 'a'"):
        from_frame(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_columns_are_arrays(library):
    held = make_frame(library, columns())
    run = tasks.Classifier(zoo.MLP((6,)), **options())
    run.train_model((held["area"].to_numpy()[:, None], held["rooms"]), num_epochs=1)
    with pytest.raises(BatchError, match="'1' is a Series"):
        run.train_model((held["area"].to_numpy()[:, None], held["city"]), num_epochs=1)


def trained(frame: Any, root: Any = None, **more: Any) -> tasks.Regressor:
    table = from_frame(frame(columns()), target=["price"], columns=["area", "rooms", "city"])
    scale = data.Standardize.fit(table)
    run = tasks.Regressor(
        Mixed(), **options(coding=table.coding, standardize=scale, root=root, **more)
    )
    train, val = data.split(table, (0.8, 0.2), seed=0)
    run.train_model(train, val, num_epochs=2)
    return run


@pytest.mark.slow
def test_trainer_reads_tables_and_frames(frame):
    run = trained(frame)
    table = from_frame(frame(columns()), target=["price"], columns=["area", "rooms", "city"])
    direct = tasks.Regressor(Mixed(), **options(coding=table.coding))
    by_frame = tasks.Regressor(Mixed(), **options(coding=table.coding))
    direct.train_model(table.arrays, num_epochs=1)
    by_frame.train_model(frame(columns()), num_epochs=1)
    assert_batches_equal(params(direct), params(by_frame))
    inputs = {name: values for name, values in columns().items() if name != "price"}
    np.testing.assert_array_equal(run.predict(frame(inputs)), run.predict(table))
    assert run.eval_model(frame(columns())) == run.eval_model(table)
    with pytest.raises(BatchError, match="evaluate data must have the column 'price'"):
        run.eval_model(frame(inputs))


@pytest.mark.slow
def test_coding_is_saved_with_the_model(frame):
    run = trained(frame, root="runs")
    loaded = tasks.Regressor.load_from_checkpoint(run.last_run.path)
    assert loaded.config.coding == run.config.coding
    new = frame({"city": ["Oslo", "Rome"], "area": [50.0, 60.0], "rooms": [2, 3]})
    np.testing.assert_array_equal(loaded.predict(new), run.predict(new))
    with pytest.raises(BatchError, match="unknown category 'Paris'"):
        loaded.predict(frame({"city": ["Paris"], "area": [50.0], "rooms": [2]}))
    record = json.loads(Path(str(run.last_run.path), "config.json").read_text())
    assert record["options"]["coding"]["categories"] == {"city": ["Bonn", "Oslo", "Rome"]}


@pytest.mark.slow
def test_labels_name_predictions(frame):
    table = from_frame(frame(columns()), target="kind", columns=["area", "rooms"])
    scale = data.Standardize.fit(table)
    run = tasks.Classifier(
        zoo.MLP((2,)), **options(coding=table.coding, standardize=scale, batch_size=8)
    )
    run.train_model(table, table, num_epochs=30)
    names = np.asarray(table.coding.labels)[run.predict(frame(columns())).argmax(axis=1)]
    assert np.mean(names == np.asarray(columns()["kind"])) > 0.9


def test_several_validation_sets_may_be_frames(frame):
    table = from_frame(frame(columns()), target="kind", columns=["area", "rooms"])
    run = tasks.Classifier(zoo.MLP((2,)), **options(coding=table.coding))
    run.monitor = Monitor("val_a/accuracy", mode="max")
    result = run.train_model(table, {"a": table, "b": frame(columns())}, num_epochs=1)
    assert result.metrics["val_a/accuracy"] == result.metrics["val_b/accuracy"]


def test_coding_must_be_that_of_the_trainer(frame):
    table = from_frame(frame(columns()), target="price", columns=["city"])
    other = from_frame(
        frame({**columns(), "city": ["Rome"] * 60}), target="price", columns=["city"]
    )
    run = tasks.Regressor(Mixed(), **options())
    with pytest.raises(
        ConfigError, match=r"coding of columns that the trainer does not.*coding=table"
    ):
        run.train_model(table, num_epochs=1)
    with pytest.raises(ConfigError, match="train data are a data frame, and the trainer has no"):
        run.train_model(frame(columns()), num_epochs=1)
    run = tasks.Regressor(Mixed(), **options(coding=table.coding))
    with pytest.raises(ConfigError, match="Pass the frame itself"):
        run.train_model(table, other, num_epochs=1)
    with pytest.raises(BatchError, match="tuple with a data frame"):
        run.train_model((frame(columns()), table["y"]), num_epochs=1)
    with pytest.raises(
        ConfigError, match=r"coding must be .*from_frame\(...\).coding; got a FrameTable"
    ):
        tasks.Regressor(Mixed(), **options(coding=table))


def test_parts_of_a_table_are_tables(frame):
    table = from_frame(frame(columns()), target="price")
    train, val = data.split(table, (0.75, 0.25), stratify=table["x"]["city"])
    assert (type(train), len(train), len(val)) == (FrameTable, 45, 15)
    assert val.coding is table.coding
    folds = list(data.k_fold(table, 3, groups=table["x"]["city"]))
    assert [len(val) + len(train) for train, val in folds] == [60] * 3


@pytest.mark.slow
def test_run_on_a_table_resumes_bit_for_bit(frame):
    def started(step: int | None, root: str) -> Any:
        return trained(frame, root=root, callbacks=[Break(step)], save_every=1e-9)

    whole = started(None, "whole")
    with pytest.raises(InterruptError):
        started(2, "cut")
    resumed = started(None, "cut")
    assert resumed.last_run.path.name == "0001"
    assert_batches_equal(params(whole), params(resumed))


def test_block_of_the_page_runs():
    pytest.importorskip("pandas")
    page = (Path(__file__).parents[2] / "docs" / "howto" / "data-frames.md").read_text()
    block = page.partition("<!-- no-run: needs pandas")[2].partition("```python\n")[2]
    names = {"data": data, "tasks": tasks, "jnp": jnp}
    exec(block.partition("```")[0], names)
    assert names["prices"].predict(names["new"]).shape == (1, 1)
