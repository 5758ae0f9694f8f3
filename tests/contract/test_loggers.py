from __future__ import annotations

import csv
import itertools
import json
import math
import os
import stat
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
    with pytest.raises(MetricError, match="'loss' is not a number: 'high'"):
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


def row(step: int, **metrics: float) -> bytes:
    return json.dumps({"step": step, "epoch": 1, "time": 0.0, **metrics}).encode() + b"\n"


def test_jsonl_logger_resumes_at_a_position_or_else_by_step(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [row(20), row(40), row(40), row(20)]
    ends = list(itertools.accumulate(map(len, lines), initial=0))
    for position in (*range(ends[-1] + 3), None, "20", True, -1, 2**70):
        path.write_bytes(b"".join(lines))
        JsonlLogger(path).resume(30, position)
        right = type(position) is int and position in ends
        kept = lines[: ends.index(position)] if right else [lines[0], lines[3]]
        assert path.read_bytes() == b"".join(kept)
    assert "dropping lines by step" in caplog.text
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_jsonl_logger_knows_its_position_before_it_is_open(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert JsonlLogger(path).position() == 0
    assert not path.exists()
    path.write_bytes(row(1) + b"x" * 200_000)
    assert JsonlLogger(path).position() == len(row(1))
    logger = JsonlLogger(path, clock=lambda: 0.0)
    logger.log_metrics({}, step=2, epoch=1)
    assert logger.position() == path.stat().st_size == len(row(1) + row(2))
    logger.close("finished")


def test_jsonl_logger_resumed_by_step_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(row(1) + row(1)[:-1])
    JsonlLogger(path).resume(1)
    assert path.read_bytes() == row(1)


@pytest.mark.parametrize(
    "line", [b"\n", b"\0\n", b"{}\n", b"[]\n", b"1\n", b'{"step": true}\n', b'{"step": NaN}\n']
)
def test_jsonl_logger_names_the_lines_it_cannot_read_and_loses_nothing(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    before = row(1) + line + row(9) + line
    path.write_bytes(before)
    with pytest.raises(RunDirectoryError, match=r"2 lines of .*metrics\.jsonl.*: 2, 4\)"):
        JsonlLogger(path).resume(1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_resume_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, kind, function):
    path = tmp_path / "metrics"
    logger = kind(path)
    for step in (1, 2):
        logger.log_metrics({"loss": 0.5}, step=step, epoch=1)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        with pytest.raises(RunDirectoryError, match="No space left"):
            logger.resume(1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics"]


@pytest.mark.parametrize("kind", [JsonlLogger, CsvLogger])
def test_file_logger_resumes_only_regular_files(tmp_path, kind):
    os.mkfifo(tmp_path / "metrics")
    for call in (lambda logger: logger.resume(1), lambda logger: logger.position()):
        with pytest.raises(RunDirectoryError, match="regular files"):
            call(kind(tmp_path / "metrics"))


def test_file_loggers_write_nothing_that_everybody_can_change(tmp_path):
    previous = os.umask(0)
    try:
        for kind in (JsonlLogger, CsvLogger):
            logger = kind(tmp_path / kind.__name__)
            for step in (1, 2):
                logger.log_metrics({"loss": 0.5}, step=step, epoch=1)
            logger.resume(1)
            logger.log_metrics({"loss": 0.5}, step=2, epoch=1)
            logger.close("finished")
    finally:
        os.umask(previous)
    for path in tmp_path.iterdir():
        assert not path.stat().st_mode & stat.S_IWOTH


def test_csv_logger_resumes_as_if_later_columns_had_never_been(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path, clock=lambda: 0.0)
    logger.log_metrics({"a": 1.0}, step=1, epoch=1)
    before, position = path.read_bytes(), logger.position()
    logger.log_metrics({"b": 2.0}, step=1, epoch=1)
    logger.resume(1, position)
    assert path.read_bytes() == before
    logger.log_metrics({"b": 2.0}, step=2, epoch=1)
    logger.resume(1, 7)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"1,1,0.0\n", b"x,1,0.0,1.0\n", b"1.5,1,0.0,1.0\n"])
def test_csv_logger_names_the_rows_it_cannot_read_and_loses_nothing(tmp_path, line):
    path = tmp_path / "metrics.csv"
    before = b"step,epoch,time,a\n1,1,0.0,1.0\n" + line
    path.write_bytes(before)
    with pytest.raises(RunDirectoryError, match=r"1 rows of .*metrics\.csv.*: 2\)"):
        CsvLogger(path).resume(1)
    assert path.read_bytes() == before


def test_csv_logger_continues_a_table_with_long_cells(tmp_path):
    path = tmp_path / "metrics.csv"
    for step in (1, 2):
        logger = CsvLogger(path)
        logger.log_metrics({"a": np.arange(50_000) / 7}, step=step, epoch=1)
        logger.close("finished")
    assert CsvLogger(path).position() == 2
    path.write_bytes(b"\xff\n")
    with pytest.raises(RunDirectoryError, match="in UTF-8"):
        CsvLogger(path).log_metrics({}, step=1, epoch=1)


def test_many_loggers_resume_those_that_can_each_at_its_own_position(tmp_path):
    class ByStep(NullLogger):
        resumed: Any = None

        def resume(self, step: int) -> None:
            self.resumed = step

    by_step, memory, other = ByStep(), MemoryLogger(), MemoryLogger()
    many = ManyLoggers(NullLogger(), by_step, memory, JsonlLogger(tmp_path / "a"), other)
    many.log_metrics({"a": 1.0}, step=1, epoch=1)
    position = json.loads(json.dumps(many.position()))
    assert list(position) == ["2:MemoryLogger", "3:JsonlLogger", "4:MemoryLogger"]
    many.log_metrics({"b": 1.0}, step=1, epoch=1)
    many.log_text("c", "text", step=1)
    many.log_metrics({"d": 1.0}, step=2, epoch=1)
    del position["4:MemoryLogger"]
    many.resume(1, position)
    assert by_step.resumed == 1
    assert [record.metrics for record in memory.records] == [{"a": 1.0}]
    assert memory.media == []
    assert [list(record.metrics) for record in other.records] == [["a"], ["b"]]
    assert [record.metrics for record in read_jsonl(tmp_path / "a")] == [{"a": 1.0}]
    many.resume(0)
    assert memory.records == []


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
