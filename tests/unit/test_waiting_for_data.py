"""What a loader costs and leaves behind: errors with their place, and no process or thread."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import Callback, data

BATCH = {"x": np.ones((4, 3), np.float32), "y": np.ones(4, np.float32)}


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def trainer(**options: Any) -> Regression:
    options = {"root": None, "enable_progress_bar": False, "tune_process": False, **options}
    return Regression(nn.Dense(1), steps_per_call=1, **options)


class WithWorker:
    """Batches that a process of their own brings, slowly enough to be read ahead by a thread."""

    def __init__(self, length: int = 40, fail_at: int | None = None) -> None:
        self.length, self.fail_at = length, fail_at
        self.workers: list[subprocess.Popen[bytes]] = []
        self.threads: set[str] = set()

    def __call__(self) -> Iterator[Any]:
        worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.workers.append(worker)
        try:
            for number in range(self.length):
                time.sleep(0.005)
                self.threads.add(threading.current_thread().name)
                if number == self.fail_at:
                    raise OSError("the disk is on fire")
                yield BATCH
        finally:
            worker.kill()
            worker.communicate()

    def stream(self) -> data.Stream:
        return data.Stream(self, length=self.length)


def alive(*sources: WithWorker) -> int:
    return sum(worker.poll() is None for source in sources for worker in source.workers)


def readers() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "read ahead"]


class After(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, info: Any) -> None:
        if info.step == self.step:
            self.action()


def fail() -> None:
    raise KeyError("a mistake of the callback")


@pytest.mark.slow_but("interrupt", "end")
@pytest.mark.parametrize("how", ["max_time", "stop", "error", "interrupt", "end", "cut"])
def test_run_leaves_no_process_and_no_thread_behind(how):
    train, val = WithWorker(), WithWorker(3)
    length = {"steps_per_epoch": 25 if how == "cut" else 40}
    if how == "max_time":
        result = trainer(max_time=0.15).train_model(train, val, num_epochs=2, **length)
        assert result.status == "interrupted"
    elif how in ("end", "cut"):
        assert trainer().train_model(train, val, num_epochs=1, **length).status == "finished"
    else:
        run = trainer()
        actions = {
            "stop": lambda: setattr(run.callbacks, "stop_reason", "enough"),
            "error": fail,
            "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
        }
        run.callbacks.callbacks = (After(20, actions[how]),)
        try:
            run.train_model(train, val, num_epochs=2, **length)
        except (KeyError, KeyboardInterrupt):
            assert how != "stop"
    assert train.workers
    assert (alive(train, val), readers()) == (0, [])
    assert how == "max_time" or "read ahead" in train.threads


def test_loader_that_was_given_stays_open_and_goes_on():
    source = WithWorker(40)
    loader = source.stream()
    run = trainer()
    run.callbacks.callbacks = (After(5, lambda: setattr(run.callbacks, "stop_reason", "enough")),)
    run.train_model(loader, num_epochs=1, steps_per_epoch=40)
    assert alive(source) == 1
    loader.close()
    assert alive(source) == 0
    assert len(list(loader)) == 40  # a new epoch
    assert alive(source) == 0


def test_error_of_the_reader_thread_ends_the_run_with_the_line_that_raised_it():
    source = WithWorker(40, fail_at=30)
    with pytest.raises(OSError, match="the disk is on fire") as caught:
        trainer().train_model(source, num_epochs=1, steps_per_epoch=40)
    assert "read ahead" in source.threads
    assert traceback.extract_tb(caught.tb)[-1].line == 'raise OSError("the disk is on fire")'
    assert (alive(source), readers()) == (0, [])


@pytest.mark.parametrize("stop", [None, 25])
def test_run_that_waits_for_data_says_so_at_its_end_with_the_remedy(stop):
    class Stop(Callback):
        def on_step_end(self, info: distaff.StepInfo) -> None:
            if info.step == stop:
                signal.raise_signal(signal.SIGINT)

    def slow() -> Iterator[Any]:
        for _ in range(30):
            time.sleep(0.06)
            yield BATCH

    run = trainer(root="runs", callbacks=[Stop()])
    result = run.train_model(slow, num_epochs=1, steps_per_epoch=30)
    assert result.status == ("finished" if stop is None else "interrupted")
    text = (result.path / "log.txt").read_text()
    assert "of training time was spent waiting for data. Pass arrays as a data.ArrayLoader" in text
    assert "more workers" in text
