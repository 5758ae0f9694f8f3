"""Placement: where arrays go, who decides it, and what is not moved."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff import TrainState, data, tasks, zoo
from distaff.execution.feed.chunk import ChunkSize
from distaff.execution.feed.feed import Feed
from distaff.execution.placement import (
    ONE_DEVICE,
    OneDevice,
    Place,
    like,
    num_devices,
    owned,
    to_host,
)


def rows_of_a_mesh() -> jax.sharding.NamedSharding:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def test_owned_gives_each_leaf_a_buffer_of_its_own():
    shared = jnp.ones(3)
    state = TrainState.create(params={"first": shared, "second": shared}, rng=jax.random.key(0))
    mine = owned(state)
    jax.tree.map(np.testing.assert_array_equal, mine.params, state.params)
    jax.jit(lambda donated: jax.tree.map(lambda leaf: leaf.copy(), donated), donate_argnums=0)(mine)
    assert mine.params["second"].is_deleted()
    assert not shared.is_deleted()


def test_like_frees_what_the_example_has_free_and_keeps_the_bits():
    device = jax.devices()[1]
    tree = {"key": jax.random.key(3), "x": jnp.arange(3.0), "host": np.ones(2)}
    loaded = {**jax.device_put({n: tree[n] for n in ("key", "x")}, device), "host": np.ones(2)}
    freed = like(loaded, tree)
    assert not freed["key"].committed
    assert not freed["x"].committed
    assert isinstance(freed["host"], np.ndarray)
    np.testing.assert_array_equal(freed["x"], tree["x"])
    np.testing.assert_array_equal(*map(jax.random.key_data, (freed["key"], tree["key"])))
    kept = like(loaded, loaded)
    assert kept["x"] is loaded["x"]


def test_like_puts_what_was_read_into_numpy_where_the_example_is():
    there = jax.device_put(jnp.ones(8), rows_of_a_mesh())
    placed = like({"there": np.arange(8.0), "free": np.ones(2)}, {"there": there, "free": there[0]})
    assert placed["there"].sharding == there.sharding
    np.testing.assert_array_equal(placed["there"], np.arange(8.0))
    assert not like(np.ones(2), jnp.ones(2)).committed


def test_state_goes_where_arrays_are_whole_on_each_device():
    rows = rows_of_a_mesh()
    other = jax.device_put(jnp.ones(2), jax.devices()[5])
    tree = {"x": jnp.arange(3.0), "other": other}
    batch = {"batch": jax.device_put(np.ones((8, 2)), rows), "host": np.ones(2)}
    there = ONE_DEVICE.alongside(batch)
    moved = there.state(tree)
    assert moved["x"].sharding.is_fully_replicated
    assert moved["x"].sharding.device_set == set(rows.mesh.devices.flat)
    assert moved["other"] is other
    assert there.state(moved)["x"] is moved["x"]
    assert there.replicated(np.ones(2)).sharding == moved["x"].sharding
    assert num_devices(batch) == 4
    for free in ({"batch": jnp.ones(2)}, np.ones(2)):
        assert ONE_DEVICE.alongside(free) is ONE_DEVICE
        assert num_devices(free) == 1
    assert ONE_DEVICE.state(tree) is tree


def test_resident_arrays_and_those_of_the_host_share_no_memory():
    memory = np.zeros(256, np.float32)
    start = -memory.ctypes.data % 64 // memory.itemsize  # aligned as JAX wants it
    array = memory[start : start + 64]
    resident = ONE_DEVICE.resident({"x": array})
    array += 1
    np.testing.assert_array_equal(to_host(resident)["x"], np.zeros(64))


class Noting(OneDevice):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def alongside(self, batch: Any) -> OneDevice:
        self.asked.append("alongside")
        return self

    def state(self, tree: Any) -> Any:
        self.asked.append(f"state {type(tree).__name__}")
        return tree

    def replicated(self, tree: Any) -> Any:
        self.asked.append("replicated")
        return super().replicated(tree)

    @property
    def batch(self) -> Place:
        def place(source: Any) -> Any:
            self.asked.append(f"batch {type(source).__name__}")
            return source

        return place

    def resident(self, tree: Any) -> Any:
        self.asked.append(f"resident {type(tree).__name__}")
        return super().resident(tree)


def test_run_asks_the_placement_of_its_execution_for_everything(monkeypatch: pytest.MonkeyPatch):
    """A placement of another kind replaces `OneDevice` in one place, and nothing else changes."""
    placement = Noting()
    monkeypatch.setattr("distaff.run.workspace.placement_of", lambda options: placement)
    rows = {"image": np.ones((8, 3), np.float32), "label": np.zeros(8, np.int32)}
    loader = data.ArrayLoader(rows, 4)
    trainer = tasks.Classifier(zoo.MLP((2,)), enable_progress_bar=False, steps_per_call=1)
    trainer.train_model(loader, loader, num_epochs=2)
    epoch = ["state TrainState", "batch One", "batch One"]
    kept = ["resident One", "resident One"]
    created = "state TrainState"
    assert placement.asked == [created, "alongside", "replicated", *epoch, *kept, *epoch]


@pytest.mark.parametrize("kind", ["arrays", "list"])
def test_feed_has_each_chunk_placed(kind: str):
    placement, rows = Noting(), np.ones((8, 3), np.float32)
    loader = data.ArrayLoader(rows, 4) if kind == "arrays" else data.as_loader([rows[:4]] * 2)
    feed = Feed(loader, name="train", resident=False, placement=placement)
    for capacity in (1, 2):
        list(feed.epoch(lambda capacity=capacity: ChunkSize(capacity, capacity)))
    assert placement.asked == ["batch One", "batch One", "batch Stacked"]
    assert ONE_DEVICE.batch is None


def test_accelerator_is_copied_to_and_gathers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ONE_DEVICE.gathers
    assert ONE_DEVICE.batch is jax.device_put
