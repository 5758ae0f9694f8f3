"""The timers of a run: every second once, by a clock that a test moves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import Callback, data, tasks, zoo
from distaff.execution.timers import PARTS, TRAINING, Throughput, Timers
from distaff.loggers import MemoryLogger
from distaff.run.recorder import Recorder


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def seconds(timers: Timers) -> dict[str, float]:
    return {part: spent for part, spent in timers.read().seconds.items() if spent}


def test_each_second_counts_once_in_the_innermost_part():
    clock = Clock()
    timers = Timers(clock)
    clock.now += 1
    with timers.spent("evaluation"):
        clock.now += 2
        with timers.spent("data"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    assert seconds(timers) == {"other": 17, "evaluation": 10, "data": 4}
    assert seconds(timers) == {"other": 17, "evaluation": 10, "data": 4}


def test_timed_counts_the_time_to_get_each_item_and_not_what_is_done_with_it():
    clock = Clock()
    timers = Timers(clock)

    def items() -> Iterator[int]:
        for item in range(3):
            clock.now += 1
            yield item
        clock.now += 5

    for _ in timers.timed(items(), "data"):
        clock.now += 10
    assert seconds(timers) == {"data": 8, "other": 30}


@pytest.mark.parametrize("where", ["spent", "timed"])
def test_part_ends_with_an_error(where):
    clock = Clock()
    timers = Timers(clock)

    def broken() -> Iterator[int]:
        raise ValueError("broken")
        yield

    def spend() -> None:
        with timers.spent("data"):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        spend() if where == "spent" else list(timers.timed(broken(), "data"))
    clock.now += 1
    assert seconds(timers) == {"other": 1}


def test_compiling_is_counted_apart_and_once():
    timers = Timers()

    @jax.jit
    def inner(x):
        time.sleep(0.3)
        return jnp.sin(x) + 1234.5

    @jax.jit
    def outer(x):
        with jax.ensure_compile_time_eval():  # compiles while `outer` is traced
            constant = inner(np.ones(3, np.float32))
        return x * constant

    before = time.perf_counter()
    with timers.spent("host"):
        outer(np.ones(3, np.float32))
    wall = time.perf_counter() - before
    read = timers.read()
    assert read.programs == 2
    assert 0.3 <= read.seconds["compile"] <= wall
    assert read.seconds["host"] == pytest.approx(wall - read.seconds["compile"], abs=0.05)
    assert Timers().read().programs == 0


class Result:
    """Of a program, which the device has made once `ready` is set."""

    def __init__(self, ready: bool) -> None:
        self.ready = ready

    def is_ready(self) -> bool:
        return self.ready


@pytest.mark.parametrize(
    ("ready", "backend", "part"),
    [(False, "cpu", "host"), (True, "cpu", "device"), (True, "gpu", "host")],
)
def test_call_is_the_devices_where_it_computes_inside(monkeypatch, ready, backend, part):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    clock = Clock()
    timers = Timers(clock)
    with timers.spent("host"):
        clock.now += 3
        timers.handed(Result(ready))
    assert seconds(timers) == {part: 3}


def test_batches_cost_nothing_while_the_device_is_at_work():
    clock = Clock()
    timers = Timers(clock)
    result = Result(ready=False)

    def chunks() -> Iterator[int]:
        clock.now += 1  # nothing was handed over yet
        yield 1
        clock.now += 2
        yield 2
        clock.now += 4
        result.ready = True
        yield 3

    for _ in timers.fetched(chunks()):
        clock.now += 10
        with timers.spent("host"):
            timers.handed(result)
    assert seconds(timers) == {"data": 5, "device": 2, "other": 30}


def test_lap_is_what_was_counted_since_the_last_one():
    clock = Clock()
    timers = Timers(clock)
    with timers.spent("data"):
        clock.now += 4
    timers.steps, timers.examples = 3, 6
    assert timers.lap(5) is None
    clock.now += 1
    first = timers.lap(5)
    assert first is not None
    assert (first.steps, first.examples) == (3, 6)
    timers.steps += 2
    with timers.spent("host"):
        clock.now += 5
    second = timers.lap(5)
    assert second is not None
    assert (second.steps, second.examples) == (2, 0)
    assert {part: spent for part, spent in second.seconds.items() if spent} == {"host": 5}
    assert second.training_seconds == 5


def test_speed_is_of_the_training_and_zero_without_any():
    spent = {**dict.fromkeys(PARTS, 1.0), "host": 5.0}
    read = Throughput(18, 36, spent, 0, 0)
    assert (read.training_seconds, read.per_second(18)) == (9, 2)
    assert Throughput(0, 0, dict.fromkeys(PARTS, 0.0), 0, 0).per_second(5) == 0


class Ticks:
    """A clock that goes on by 1,000 s whenever it is read: no load of the machine moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1000
        return self.now


@pytest.mark.slow
def test_run_counts_every_second_of_its_wall_time(monkeypatch):
    clock = Ticks()
    monkeypatch.setattr(Timers.__init__, "__defaults__", (clock,))
    train, val, test = data.digits(batch_size=128)
    trainer = tasks.Classifier(zoo.MLP((8, 10)), steps_per_call=4, enable_progress_bar=False)
    spans = []
    begin, show = Recorder.__init__, Recorder.show_result

    def begun(self, *arguments):
        spans.append(clock())
        begin(self, *arguments)

    def shown(self, *arguments, **options):
        show(self, *arguments, **options)
        spans.append(clock())

    monkeypatch.setattr(Recorder, "__init__", begun)
    monkeypatch.setattr(Recorder, "show_result", shown)
    result = trainer.train_model(train, val, test, num_epochs=2)
    read = json.loads((result.path / "status.json").read_text())["throughput"]
    assert (read["steps"], read["examples"]) == (18, 18 * 128)
    spent = read["seconds"]
    assert spent.keys() == set(PARTS)
    assert all(spent[part] > 0 for part in PARTS if part != "callbacks")
    # The timers miss a few readings: of the spans, and of a thread.
    wall = spans[1] - spans[0]
    assert 0.8 * wall < sum(spent.values()) <= wall
    assert read["training_seconds"] == sum(spent[part] for part in TRAINING)


def test_steps_that_compute_inside_of_their_call_are_the_devices():
    reads = []

    class Reader(Callback):
        def on_epoch_end(self, info):
            reads.append(trainer.last_run.timers.read())

    train, _, _ = data.digits(batch_size=128)
    options = {"root": None, "steps_per_call": 10, "enable_progress_bar": False}
    trainer = tasks.Classifier(zoo.MLP((64, 10)), callbacks=[Reader()], **options)
    trainer.train_model(train, num_epochs=20)
    spent = reads[-1].since(reads[1]).seconds  # The first calls compile.
    assert spent["device"] > spent["host"]


def test_throughput_is_logged_in_a_file_of_its_own(monkeypatch):
    monkeypatch.setattr("distaff.run.recorder._LAP_SECONDS", 0.0)
    train, val, _ = data.digits(batch_size=128)
    memory = MemoryLogger()
    trainer = tasks.Classifier(
        zoo.MLP((8, 10)), loggers=[memory], log_every_n_steps=4, steps_per_call=1
    )
    result = trainer.train_model(train, val, num_epochs=2)
    rows = [json.loads(row) for row in (result.path / "throughput.jsonl").read_text().splitlines()]
    # A window is read when the next one closes.
    assert [row["step"] for row in rows] == [8, 9, 9, 16, 18, 18, 18]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2, 2]
    assert rows[1]["steps_per_second"] > 0
    spent = trainer.last_run.timers.read().seconds
    assert sum(row["seconds/device"] for row in rows) <= spent["device"]
    logged = {name for record in memory.records for name in record.metrics}
    assert not any("second" in name for name in logged)
