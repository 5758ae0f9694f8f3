"""A checkpoint on request: by SIGUSR1, or by a file in the run directory."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from distaff import checkpoint
from distaff.callbacks import Callback
from distaff.run.supervision.interruption import Interruption
from line import Line, loader


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_signal_requests_a_checkpoint_and_no_stop(capfd):
    with Interruption() as interruption:
        assert interruption.clock() < interruption.due_at or interruption.agreed() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.clock() >= interruption.due_at
        assert interruption.agreed() is None
        assert interruption.is_save_due
        interruption.saved()
        assert interruption.agreed() is None
        assert not interruption.is_save_due
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert "SIGUSR1: the run is saved" in capfd.readouterr().err


def test_a_handler_of_your_own_stays():
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        own = signal.getsignal(signal.SIGUSR1)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGUSR1) is own
            assert not interruption.is_save_requested
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_file_requests_a_checkpoint_within_a_second(tmp_path):
    clock = Clock()
    interruption = Interruption(clock=clock)
    interruption.save_file = tmp_path / "save-now"
    interruption.agreed()
    interruption.save_file.touch()
    clock.now = 0.5
    assert clock.now < interruption.due_at  # not looked at yet
    clock.now = 1.0
    assert clock.now >= interruption.due_at
    assert interruption.agreed() is None
    assert interruption.is_save_due
    assert not interruption.save_file.exists()


def test_a_save_file_that_cannot_be_deleted_requests_one_checkpoint_and_is_named(tmp_path, capfd):
    interruption = Interruption(clock=Clock())
    interruption.save_file = tmp_path / "save-now"

    def is_requested():
        interruption.saved()
        interruption.clock.now += 1
        interruption.agreed()
        return interruption.is_save_due

    (tmp_path / "save-now").mkdir()
    (tmp_path / "save-now" / "notes.txt").touch()
    assert [is_requested() for _ in range(3)] == [True, False, False]
    printed = capfd.readouterr().err
    assert printed.count("\n") == 2
    assert f"{tmp_path / 'save-now'} cannot be deleted (Directory not empty)" in printed
    (tmp_path / "save-now" / "notes.txt").unlink()
    assert is_requested()  # it may be a new one
    assert not (tmp_path / "save-now").exists()
    (tmp_path / "save-now").symlink_to(tmp_path)
    assert is_requested()
    assert tmp_path.exists()


def test_without_a_run_directory_nothing_is_due():
    interruption = Interruption(clock=Clock())
    interruption.agreed()
    assert interruption.due_at == float("inf")


class Request(Callback):
    """Requests a checkpoint after step 2 of 8, and looks for it after step 4."""

    def __init__(self, request):
        self.request, self.trainer, self.saved = request, None, []

    def on_step_end(self, info):
        if info.step == 2:
            self.request(self.trainer.last_run.path)
        if info.step == 4:
            self.trainer.last_run.checkpointer.settle()
            folder = self.trainer.last_run.path / "checkpoints"
            self.saved = checkpoint.CheckpointStore(folder).steps()


REQUESTS = {
    "signal": lambda path: signal.raise_signal(signal.SIGUSR1),
    "file": lambda path: (path / "save-now").touch(),
    "folder": lambda path: (path / "save-now").mkdir(),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("way", REQUESTS)
def test_a_run_saves_on_request_and_computes_the_same(way, monkeypatch):
    monkeypatch.setattr("distaff.run.supervision.interruption._SAVE_FILE_SECONDS", 0.0)
    asks = Request(REQUESTS[way])
    asks.trainer = Line(callbacks=[asks])
    result = asks.trainer.train_model(loader(), num_epochs=2)
    plain = Line(name="plain")
    plain.train_model(loader(), num_epochs=2)
    np.testing.assert_array_equal(asks.trainer.state.params["w"], plain.state.params["w"])
    assert (2 in asks.saved) == (way != "nothing")
    line = "saved at step 2, as requested"
    assert (result.path / "log.txt").read_text().count(line) == (way != "nothing")
    assert not (result.path / "save-now").exists()
