"""Which saves are written where they come faster than the disk, and what is waited for."""

from __future__ import annotations

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.checkpoint import CheckpointStore
from distaff.checkpoint.writer import Save, Writer


class SlowDisk:
    """A `write` that stands still until it is let go on."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, save: Save) -> None:
        self.begun.release()
        assert self.go_on.acquire(timeout=30)
        self.written.append(save.step)


def save_of(step: int) -> Save:
    return Save(step, {}, {}, 10)


def test_writer_leaves_out_what_is_outdated_before_its_turn() -> None:
    disk = SlowDisk()
    writer = Writer(disk, pause=0)
    writer.put(save_of(1), kept={1})
    assert disk.begun.acquire(timeout=30)
    for step, kept in ((2, {1, 2}), (3, {2, 3}), (4, {2, 4}), (5, {2, 5})):
        writer.put(save_of(step), kept=kept)
    assert (writer.steps(), writer.held_bytes) == ((1, 2, 5), 30)
    disk.go_on.release(3)
    writer.wait()
    assert disk.written == [1, 2, 5]
    assert (writer.steps(), writer.held_bytes) == ((), 0)


def test_writer_begins_anew_after_its_line_was_empty() -> None:
    disk = SlowDisk()
    disk.go_on.release(100)
    writer = Writer(disk, pause=0)
    for step in range(100):
        writer.put(save_of(step), kept={step})
        if step % 3 == 0:
            writer.wait()
    writer.wait()
    assert disk.written[-1] == 99
    assert disk.written == sorted(set(disk.written))


def test_writer_tells_of_a_failure_once_and_goes_on_after_it() -> None:
    written = []

    def write(save: Save) -> None:
        if save.step == 1:
            raise OSError("disk full")
        written.append(save.step)

    writer = Writer(write, pause=0)
    writer.put(save_of(1), kept={1})
    writer.wait()
    writer.put(save_of(2), kept={2})  # nobody has heard of the failure yet
    step, error = writer.failure() or (0, None)
    assert (step, str(error), writer.failure()) == (1, "disk full", None)
    writer.put(save_of(3), kept={3})
    writer.wait()
    assert written == [3]


def test_writer_that_goes_on_writes_what_waits_behind_a_failure() -> None:
    written, go = [], threading.Event()

    def write(save: Save) -> None:
        assert go.wait(30)
        if save.step < 3:
            raise OSError("disk full")
        written.append(save.step)

    writer = Writer(write, pause=0, goes_on=True)
    for step in (1, 2, 3):
        writer.put(save_of(step), kept={1, 2, 3})
    go.set()
    writer.wait()
    writer.put(save_of(4), kept={4})  # nobody has heard of the failures yet
    writer.wait()
    assert written == [3, 4]
    told = [writer.failure(), writer.failure(), writer.failure()]
    assert [failure and failure[0] for failure in told] == [1, 2, None]
    assert not writer.failures


def test_writer_pauses_between_writes_unless_somebody_waits() -> None:
    written, second = [], threading.Event()

    def write(save: Save) -> None:
        written.append(save.step)
        if save.step > 1:
            second.set()

    writer = Writer(write, pause=3600)
    writer.put(save_of(1), kept={1})
    for step in range(2, 6):
        writer.put(save_of(step), kept={1, step})
    assert not second.wait(0.2)
    writer.wait()
    assert written == [1, 5]


@pytest.fixture
def slow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CheckpointStore, SlowDisk]:
    """Returns a store whose disk stands still after it has written a checkpoint."""
    disk, store = SlowDisk(), CheckpointStore(tmp_path, keep_last=1)
    write = store._write
    monkeypatch.setattr(store._writer, "_write", lambda save: (write(save), disk(save)))
    return store, disk


def test_save_does_not_wait_for_the_disk(slow_store: tuple[CheckpointStore, SlowDisk]) -> None:
    store, disk = slow_store
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    x = jnp.ones(1000)
    for step in range(1, 9):
        store.save(step, {"x": x}, {"best_step": min(step, 3)})
        assert step > 1 or disk.begun.acquire(timeout=30)
        x = double(x)
    disk.go_on.release(8)
    store.close()
    assert (disk.written, store.steps(), store.best()) == ([1, 3, 8], (3, 8), 3)
    for step in (3, 8):  # the values that they had, though the buffers were donated afterwards
        loaded = store.load(step, {"x": np.zeros(1000, np.float32)})
        np.testing.assert_array_equal(loaded["x"], np.full(1000, 2.0 ** (step - 1)))


def test_save_waits_where_too_much_is_held(
    slow_store: tuple[CheckpointStore, SlowDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, disk = slow_store
    monkeypatch.setattr("distaff.checkpoint.store._MAX_HELD_BYTES", 100)
    store.save(1, {"x": jnp.ones(1000)}, {})
    later = threading.Thread(target=store.save, args=(2, {"x": jnp.ones(1000)}, {}))
    later.start()
    later.join(0.2)
    assert later.is_alive()
    assert store._writer.steps() == (1,)
    disk.go_on.release(2)
    later.join(30)
    store.close()
    assert disk.written == [1, 2]


def test_save_of_a_step_that_waits_changes_nothing(
    slow_store: tuple[CheckpointStore, SlowDisk],
) -> None:
    store, disk = slow_store
    assert store.save(1, {"x": jnp.ones(2)}, {}) == store.save(1, {"x": jnp.zeros(2)}, {})
    disk.go_on.release(2)
    store.close()
    assert disk.written == [1]
    np.testing.assert_array_equal(store.load(1, {"x": np.zeros(2, np.float32)})["x"], np.ones(2))
