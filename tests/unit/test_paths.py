"""Paths: home directories, URLs, and names that a shell or a glob would take for patterns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distaff import Profiler, data, export_weights, tasks, zoo
from distaff.checkpoint import CheckpointStore, find
from distaff.core.paths import as_path
from distaff.errors import CheckpointError, ConfigError, DataFileError
from distaff.loggers import CsvLogger, JsonlLogger
from distaff.run.directory.run_directory import RunDirectory


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_path_is_absolute_and_begins_in_the_home_directory(home, tmp_path):
    assert as_path("~/runs", "root") == as_path(Path("~/runs"), "root") == home / "runs"
    assert as_path("runs/~", "root") == tmp_path / "elsewhere" / "runs" / "~"
    assert as_path(b"runs", "root") == tmp_path / "elsewhere" / "runs"  # ty: ignore
    for url in ("file:///a/b", "file://localhost/a/b", Path("file:///a/b")):
        assert as_path(url, "root") == Path("/a/b")
    for plain in ("lr:0.1/x", "a=b:/c", "x//y", "C:"):
        assert as_path(plain, "root") == tmp_path / "elsewhere" / plain


@pytest.mark.parametrize(
    "given",
    [
        *("gs://bucket/runs", "memory://runs", "S3://a", "new+kind://a", Path("gs://bucket/runs")),
        *("file://server/share", "~nobody-of-this-name/runs", "a\0b", None, 3),
    ],
)
def test_path_that_is_not_of_a_local_file_system_is_an_error(given):
    with pytest.raises(ConfigError, match=r"^the_option .*\. (Mount|Pass)|null"):
        as_path(given, "the_option")


def test_trainer_refuses_a_root_elsewhere_before_anything_is_written(home):
    with pytest.raises(ConfigError, match="root must be on a local or mounted file system"):
        tasks.Regressor(zoo.MLP((1,)), root="gs://bucket/runs")
    assert list(Path.cwd().iterdir()) == []


def test_home_directory_is_meant_wherever_a_path_is_taken(home):
    run = RunDirectory("~/runs", "a")
    assert run.create() == home / "runs" / "a" / "0001"
    assert RunDirectory.open("~/runs/a/0001").path == run.path
    assert CheckpointStore("~/c").directory == home / "c"
    assert Profiler(path="~/profile").path == home / "profile"
    for logger in (CsvLogger("~/m.csv"), JsonlLogger("~/m.jsonl")):
        logger.log_metrics({"a": 1.0}, step=1, epoch=1)
        logger.close("finished")
    assert export_weights("~/w.safetensors", {"a": np.ones(2)}) == home / "w.safetensors"
    assert {path.name for path in home.iterdir()} >= {"m.csv", "m.jsonl", "w.safetensors"}
    for read in (data.read_idx, data.read_cifar10):
        with pytest.raises(DataFileError, match=str(home / "x")):
            read("~/x")
    with pytest.raises(CheckpointError, match=str(home / "x")):
        find("~/x")
    assert list(Path.cwd().iterdir()) == []


def test_logger_writes_where_its_path_was_when_it_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = CsvLogger("metrics.csv")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    logger.log_metrics({"a": 1.0}, step=1, epoch=1)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.csv"]
