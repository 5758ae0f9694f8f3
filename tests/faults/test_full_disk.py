"""A disk that is full, for one file or for all, at any time: the run ends as ever, and warns."""

from __future__ import annotations

import errno
import json
import logging
import os
import warnings

import pytest

from distaff import Callback, data, tasks, zoo
from distaff.loggers import JsonlLogger, MemoryLogger, disk, jsonl
from distaff.run.directory import run_directory

FILES = (
    *("config.json", "env.json", "status.json", "model.txt", "log.txt", "metrics.jsonl"),
    *("throughput.jsonl", "metrics/val_epoch_0001.json", "texts/note_1.txt"),
)


class Disk:
    """Takes no write to the files that are named, as long as it is full."""

    def __init__(self, monkeypatch):
        self.full_for: tuple[str, ...] = ()
        self.refused: set[str] = set()
        self.write_whole, self.append = run_directory.write_whole, jsonl._append_all
        for module in (run_directory, disk):
            monkeypatch.setattr(module, "write_whole", self.whole)
        monkeypatch.setattr(jsonl, "_append_all", self.line)
        emit = logging.StreamHandler.emit
        monkeypatch.setattr(logging.StreamHandler, "emit", lambda *args: self.log(emit, *args))

    def check(self, path):
        for name in self.full_for:
            if str(path).endswith(name):
                self.refused.add(name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def whole(self, target, content, **options):
        self.check(target)
        self.write_whole(target, content, **options)

    def line(self, file, content):
        self.check(file.name)
        self.append(file, content)

    def log(self, emit, handler, record):
        try:
            self.check(getattr(handler, "baseFilename", ""))
        except OSError:
            handler.handleError(record)
        else:
            emit(handler, record)


class Phases(Callback):
    """Fills the disk, and frees it, at the events of a run."""

    disk: Disk | None = None
    fills, frees = "", ""

    def at(self, event):
        if self.disk is not None and event in (self.fills, self.frees):
            self.disk.full_for = FILES if event == self.fills else ()

    def on_training_start(self, info):
        self.at("start")

    def on_epoch_end(self, info):
        self.at(f"epoch {info.epoch}")

    def on_training_end(self, info):
        self.at("end")


class Notes(tasks.Classifier):
    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        self.last_run.logger.log_text("note", "a text", step=self.step)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Notes(
        zoo.MLP((2, 10)),
        root=tmp_path_factory.mktemp("runs"),
        callbacks=[Phases()],
        on_failed_save="warn",
        enable_progress_bar=False,
        resume="never",
    )


@pytest.fixture
def disk_of(trainer, monkeypatch):
    """The disk of a run; nothing may be printed about it but warnings."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    phases = trainer.callbacks.callbacks[0]
    phases.disk, phases.fills, phases.frees = Disk(monkeypatch), "", ""
    yield phases.disk
    phases.disk = None


def trained(trainer):
    train, val, test = data.digits(batch_size=512)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = trainer.train_model(train, val, test, num_epochs=2, steps_per_epoch=1)
    return result, [str(each.message) for each in found]


@pytest.mark.slow_but("metrics.jsonl")
@pytest.mark.parametrize("name", FILES)
def test_file_that_the_disk_never_takes_ends_no_run(name, trainer, disk_of, capsys):
    step = 1 + (trainer.step or 0)
    disk_of.full_for = (name, f"texts/note_{step}.txt") if name.startswith("texts") else (name,)
    if name.startswith("metrics/"):
        disk_of.full_for = (f"metrics/val_epoch_{trainer.epoch + 1:04d}.json",)
    result, found = trained(trainer)
    assert result.status == "finished"
    assert disk_of.refused
    named = [text for text in found if "No space left" in text]
    assert len(named) == (name != "log.txt"), found
    assert all("on_failed_save" in text for text in named)
    assert capsys.readouterr().err == ""
    for other in ("status.json", "config.json", "env.json"):
        if other != name:
            assert json.loads((result.path / other).read_text())
    if name not in ("metrics.jsonl", "status.json"):
        assert len(MemoryLogger.read(result.path / "metrics.jsonl").records) >= 3
        assert json.loads((result.path / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("fills", "frees"), [("start", ""), ("start", "epoch 2"), ("epoch 1", "end"), ("end", "")]
)
def test_disk_that_is_full_for_a_while_loses_nothing_that_can_be_written_later(
    fills, frees, trainer, disk_of
):
    phases = trainer.callbacks.callbacks[0]
    first = trainer.epoch
    renamed = {f"epoch {n}": f"epoch {first + n}" for n in (1, 2)}
    phases.fills, phases.frees = renamed.get(fills, fills), renamed.get(frees, frees)
    result, found = trained(trainer)
    assert result.status == "finished"
    assert any("No space left" in text for text in found)
    if frees:
        rows = MemoryLogger.read(result.path / "metrics.jsonl").records
        assert {row.epoch for row in rows} == {first + 1, first + 2}
        assert json.loads((result.path / "status.json").read_text())["status"] == "finished"
        assert len(list((result.path / "metrics").iterdir())) == 3


def test_without_that_option_a_full_disk_is_an_error(tmp_path, monkeypatch):
    trainer = Notes(zoo.MLP((2, 10)), root=tmp_path, enable_progress_bar=False)
    full = Disk(monkeypatch)
    full.full_for = ("metrics/val_epoch_0001.json",)
    with pytest.raises(run_directory.RunDirectoryError, match="No space left"):
        trained(trainer)
    assert isinstance(trainer.last_run.logger.loggers[0], JsonlLogger)
