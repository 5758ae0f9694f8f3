from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

import distaff.loggers
from distaff.errors import BatchError, ConfigError, MetricError, RunDirectoryError
from distaff.loggers import (
    ConsoleLogger,
    CsvLogger,
    FilesLogger,
    JsonlLogger,
    Logger,
    ManyLoggers,
    MemoryLogger,
    NullLogger,
    Record,
)
from distaff.testing.loggers import LoggerContract


def as_number(value: Any) -> Any:
    return value if isinstance(value, list) else float(value)


def read_jsonl(path: Path) -> list[Record]:
    """Reads strictly: a bare NaN or a torn line is an error."""
    if not path.exists():
        return []
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    return [
        Record(
            step=row.pop("step"),
            epoch=row.pop("epoch"),
            metrics={name: as_number(value) for name, value in row.items() if name != "time"},
        )
        for row in rows
    ]


def read_csv(path: Path) -> list[Record]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    return [
        Record(
            step=int(row.pop("step")),
            epoch=int(row.pop("epoch")),
            metrics={
                name: json.loads(cell) if cell.startswith("[") else float(cell)
                for name, cell in row.items()
                if name != "time" and cell
            },
        )
        for row in rows
    ]


class TestJsonlLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return JsonlLogger(directory / "run" / "metrics.jsonl")

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        return read_jsonl(directory / "run" / "metrics.jsonl")


class TestCsvLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return CsvLogger(directory / "run" / "metrics.csv")

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        return read_csv(directory / "run" / "metrics.csv")


class TestFilesLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return FilesLogger(directory)


class TestMemoryLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return MemoryLogger()

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        assert isinstance(logger, MemoryLogger)
        return logger.records


class TestManyLoggers(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return ManyLoggers(MemoryLogger(), JsonlLogger(directory / "metrics.jsonl"), MemoryLogger())

    def read_records(self, logger: Logger, directory: Path) -> list[Record]:
        assert isinstance(logger, ManyLoggers)
        first, _, last = logger.loggers
        assert isinstance(first, MemoryLogger)
        assert isinstance(last, MemoryLogger)
        assert len(first.records) == len(last.records)
        return read_jsonl(directory / "metrics.jsonl")


class TestConsoleLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return ConsoleLogger()


class TestNullLogger(LoggerContract):
    def make_logger(self, directory: Path) -> Logger:
        return NullLogger()


def test_jsonl_logger_writes_the_documented_line(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl", clock=lambda: 1767225600.0)
    logger.log_metrics({"train/loss": 0.5, "val/loss": math.nan}, step=60, epoch=3)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 60, "epoch": 3, "time": 1767225600.0, "train/loss": 0.5, "val/loss": "nan"}\n'
    )
    logger.close("finished")


def test_console_logger_writes_the_documented_line(capsys):
    ConsoleLogger().log_metrics({"train/loss": 0.31274, "curve": np.ones(3)}, step=60, epoch=3)
    assert capsys.readouterr() == ("", "step 60  epoch 3  train/loss 0.3127\n")


def test_jsonl_logger_touches_the_disk_with_the_first_line_only(tmp_path):
    logger = JsonlLogger(tmp_path / "run" / "metrics.jsonl")
    logger.log_config({"seed": 0})
    with pytest.raises(MetricError, match="'loss' is 'high'"):
        logger.log_metrics({"loss": "high"}, step=1, epoch=1)
    logger.close("failed")
    assert os.listdir(tmp_path) == []


def test_jsonl_logger_appends_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 1, "time": 0.0}\n{"step": 2, "ep')
    logger = JsonlLogger(path)
    logger.log_metrics({}, step=2, epoch=1)
    logger.close("finished")
    logger.log_metrics({}, step=3, epoch=1)
    logger.close("finished")
    assert [record.step for record in read_jsonl(path)] == [1, 2, 3]


def test_jsonl_logger_asks_for_its_path_whenever_it_opens(tmp_path):
    paths = iter([tmp_path / "0001.jsonl", tmp_path / "0002.jsonl"])
    logger = JsonlLogger(lambda: next(paths))
    for step in (1, 2):
        logger.log_metrics({}, step=step, epoch=1)
        logger.close("finished")
    assert [record.step for record in read_jsonl(tmp_path / "0002.jsonl")] == [2]


def test_jsonl_logger_writes_one_number_per_run_of_a_population(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    losses = jnp.array([0.5, jnp.inf])
    logger.log_metrics({"loss": losses}, step=1, epoch=1)
    logger.close("finished")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == [0.5, "inf"]


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
@pytest.mark.parametrize("name", ["step", "epoch", "time"])
def test_file_logger_refuses_a_metric_named_like_its_own_columns(tmp_path, kind, name):
    logger = kind(tmp_path / "metrics")
    with pytest.raises(MetricError, match=f"a metric is named '{name}'"):
        logger.log_metrics({name: 1.0}, step=1, epoch=1)


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
def test_file_logger_names_a_path_it_cannot_write(tmp_path, kind):
    (tmp_path / "run").write_text("a file where a directory is needed")
    logger = kind(tmp_path / "run" / "metrics")
    with pytest.raises(RunDirectoryError, match=r"run/metrics' cannot be written"):
        logger.log_metrics({"loss": 1.0}, step=1, epoch=1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_jsonl_logger_reports_a_full_disk_in_write_and_close():
    logger = JsonlLogger("/dev/full")
    with pytest.raises(RunDirectoryError, match=r"'/dev/full'.*No space left"):
        logger.log_metrics({"loss": 1.0}, step=1, epoch=1)
    with pytest.raises(RunDirectoryError, match="'/dev/full'"):
        logger.close("failed")
    logger.close("failed")


def test_memory_logger_keeps_config_and_first_status():
    logger = MemoryLogger()
    logger.log_config({"seed": 7})
    logger.close("stopped")
    logger.close("failed")
    assert (logger.config, logger.status) == ({"seed": 7}, "stopped")


def test_memory_logger_gives_numbers_as_series():
    logger = MemoryLogger()
    logger.log_metrics({"train/loss": 0.5, "step/loss": 1.0}, step=2, epoch=1)
    logger.log_metrics({"train/loss": np.float32(0.25), "val/f1": np.ones(3)}, step=4, epoch=2)
    assert logger.series("train/", "val/") == {"train/loss": [(1, 0.5), (2, 0.25)]}
    assert list(logger.series()) == ["train/loss", "step/loss"]
    assert logger.series("test/") == {}


def test_many_loggers_close_all_then_raise_the_first_failure():
    class Broken(NullLogger):
        def __init__(self, name: str):
            self.name = name

        def close(self, status: str) -> None:
            raise ValueError(self.name)

    last = MemoryLogger()
    with pytest.raises(ValueError, match="first"):
        ManyLoggers(Broken("first"), Broken("second"), last).close("finished")
    assert last.status == "finished"


def test_csv_logger_writes_the_documented_table(tmp_path):
    logger = CsvLogger(tmp_path / "m.csv", clock=lambda: 1767225600.5)
    logger.log_metrics({"train/loss": 0.1 + 0.2}, step=60, epoch=3)
    logger.log_metrics({"a,b": math.nan, "train/loss": -math.inf}, step=80, epoch=4)
    logger.log_metrics({"matrix": np.array([[1, np.nan]])}, step=90, epoch=4)
    logger.log_metrics({"train/loss": 1}, step=99, epoch=4)
    assert (tmp_path / "m.csv").read_text().splitlines() == [
        'step,epoch,time,train/loss,"a,b",matrix',
        "60,3,1767225600.5,0.30000000000000004,,",
        "80,4,1767225600.5,-inf,nan,",
        '90,4,1767225600.5,,,"[[1.0, ""nan""]]"',
        "99,4,1767225600.5,1.0,,",
    ]
    assert os.listdir(tmp_path) == ["m.csv"]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=4).map("m/{}".format),
            st.floats(allow_nan=False),
            max_size=4,
        ),
        max_size=6,
    ),
    restart=st.booleans(),
)
def test_csv_logger_loses_nothing(tmp_path_factory, rows, restart):
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    logger = CsvLogger(path)
    for step, metrics in enumerate(rows):
        logger.log_metrics(metrics, step=step, epoch=1)
        if restart:
            logger.close("finished")
    expected = [Record(step=step, epoch=1, metrics=metrics) for step, metrics in enumerate(rows)]
    assert read_csv(path) == expected


def test_csv_logger_appends_after_a_torn_row(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,time,loss\n1,1,0.0,0.5\n2,1,0.0,0.2")
    CsvLogger(path).log_metrics({"loss": 0.25}, step=2, epoch=1)
    assert [record.metrics["loss"] for record in read_csv(path)] == [0.5, 0.25]


def test_csv_logger_keeps_the_table_whole_when_a_column_cannot_be_added(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path)
    logger.log_metrics({"a": 1.0}, step=1, epoch=1)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(RunDirectoryError, match="No space left"):
            logger.log_metrics({"b": 2.0}, step=2, epoch=1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.csv"]
    logger.log_metrics({"b": 2.0}, step=2, epoch=1)
    assert [record.metrics for record in read_csv(path)] == [{"a": 1.0}, {"b": 2.0}]


def test_csv_logger_refuses_a_table_of_something_else(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text("name,age\nAda,36\n")
    with pytest.raises(RunDirectoryError, match=r"start with step, epoch, time; .*people\.csv"):
        CsvLogger(path).log_metrics({"loss": 0.5}, step=1, epoch=1)
    assert path.read_text() == "name,age\nAda,36\n"


def drawing() -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    return figure


def test_files_logger_writes_figure_image_and_text(tmp_path):
    logger = FilesLogger(lambda: tmp_path)
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    logger.log_figure("val/curve", drawing(), step=7)
    logger.log_image("rgb", image, step=7)
    logger.log_text("sample", "häßlich", step=7)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["figures/val/curve_7.png", "images/rgb_7.png", "texts/sample_7.txt"]
    assert imread(tmp_path / "figures/val/curve_7.png").shape == (150, 150, 4)
    assert np.array_equal(np.round(imread(tmp_path / "images/rgb_7.png") * 255), image)
    assert (tmp_path / "texts/sample_7.txt").read_text() == "häßlich"


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (3, 5, 4)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_files_logger_writes_float_images_of_every_kind(tmp_path, shape, dtype):
    image = np.linspace(0, 1, math.prod(shape)).reshape(shape).astype(dtype)
    FilesLogger(tmp_path).log_image("x", image, step=1)
    read = imread(tmp_path / "images" / "x_1.png")
    np.testing.assert_allclose(read, np.squeeze(image.astype(np.float32)), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((2, 4, 4, 3)), r"got shape \[2, 4, 4, 3\]"),
        (np.zeros((3, 4, 5)), r"got shape \[3, 4, 5\]"),
        (np.full((4, 4), 2.0), "got float64 from 2.0 to 2.0"),
        (np.full((4, 4), np.nan), "from nan to nan"),
        (np.zeros((4, 4), int), "got int64"),
    ],
)
def test_log_image_refuses_what_is_no_image(tmp_path, image, complaint):
    with pytest.raises(BatchError, match=complaint):
        FilesLogger(tmp_path).log_image("x", image, step=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "", "a\nb"])
def test_files_logger_refuses_a_name_that_is_no_file(tmp_path, name):
    with pytest.raises(ConfigError, match="simple components"):
        FilesLogger(tmp_path).log_text(name, "text", step=1)


def test_many_loggers_hand_media_to_those_that_take_them(tmp_path):
    memory = MemoryLogger()
    many = ManyLoggers(NullLogger(), FilesLogger(tmp_path), CsvLogger(tmp_path / "m.csv"), memory)
    figure, values = drawing(), np.ones(3)
    many.log_figure("a", figure, step=1)
    many.log_image("b", np.ones((2, 2)), step=2)
    many.log_histogram("c", values, step=3)
    many.log_text("d", "text", step=4)
    values[0] = 0
    logged = [(medium.kind, medium.name, medium.step) for medium in memory.media]
    assert logged == [
        ("figure", "a", 1),
        ("image", "b", 2),
        ("histogram", "c", 3),
        ("text", "d", 4),
    ]
    assert memory.media[0].content is figure
    assert memory.media[2].content.tolist() == [1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["figures", "images", "texts"]


def test_loggers_name_the_closest_logger():
    with pytest.raises(AttributeError, match="Did you mean 'WandbLogger'"):
        _ = distaff.loggers.WandBLogger
