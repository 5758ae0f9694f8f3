"""No waiting: what a run fetches from the device, and when."""

from __future__ import annotations

import collections
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import data, zoo
from distaff.execution.dispatch.dispatcher import MAX_BYTES, MAX_CHUNKS, InFlightLimit

X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
ARRAY = type(jnp.zeros(1))


class Trainer(distaff.TrainerModule):
    def loss_fn(self, params: Any, batch: Any, ctx: distaff.Context) -> Any:
        return jnp.square(ctx.apply(params, batch["x"])[:, 0])


class Reading(distaff.Callback):
    """Breaks the rule: reads the loss after each step."""

    def __init__(self, read: Any) -> None:
        self.read = read

    def on_step_end(self, info: distaff.StepInfo) -> None:
        self.read(info.metrics["loss"].compute())


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Counts by name what reads an array, or waits for it.

    The guard of the loop does not see this on the CPU, where reading copies nothing.
    """
    counts: collections.Counter[str] = collections.Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += isinstance(args[0], ARRAY)
            return function(*args, **options)

        return call

    value = ARRAY._value
    monkeypatch.setattr(ARRAY, "_value", property(counted("value", value.fget)))
    for name in ("item", "block_until_ready", "copy_to_host_async"):
        monkeypatch.setattr(ARRAY, name, counted(name, getattr(ARRAY, name)))
    for name in ("asarray", "array"):
        monkeypatch.setattr(np, name, counted("value", getattr(np, name)))
    return counts


def counts_of_an_epoch(fetches: Any, steps_per_call: Any, **options: Any) -> dict[str, int]:
    """What an epoch of 200 steps fetches, in windows of 50, after one that compiled."""
    trainer = Trainer(
        zoo.MLP((4, 1)),
        **{"root": None, "enable_progress_bar": False, **options},
        steps_per_call=steps_per_call,
        log_every_n_steps=50,
        optimizer=distaff.OptimizerConfig("adam", learning_rate=1e-3, schedule="cosine"),
    )
    loader = data.ArrayLoader({"x": np.tile(X, (20, 1))}, 4)
    trainer.train_model(loader, num_epochs=1)
    fetches.clear()
    trainer.train_epoch(loader, 2)
    return dict(fetches)


@pytest.mark.slow_but("8")
@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_200_steps_fetch_nothing_but_their_windows(fetches, steps_per_call):
    counts = counts_of_an_epoch(fetches, steps_per_call)
    windows = 4
    # One array for each window of single steps; of fused ones, one for each program, and again
    # where a window ends inside of it.
    arrays = windows if steps_per_call == 1 else 200 // steps_per_call + windows
    assert counts.pop("copy_to_host_async") <= arrays
    # These, and one look for the learning rate of each window, which is there already.
    assert counts.pop("value") <= arrays + windows
    assert counts.pop("block_until_ready") <= 200 // steps_per_call // (MAX_CHUNKS // 2)
    assert not counts


@pytest.mark.slow_but("float")
@pytest.mark.parametrize("read", [float, lambda loss: np.asarray(loss), lambda loss: loss.item()])
def test_reading_the_loss_of_each_step_is_noticed(fetches, read):
    assert sum(counts_of_an_epoch(fetches, 1, callbacks=[Reading(read)]).values()) >= 200


class Output:
    def __init__(self, waited: list[int], number: int) -> None:
        self.waited, self.number = waited, number

    def block_until_ready(self) -> None:
        self.waited.append(self.number)


@pytest.mark.parametrize(("num_bytes", "most"), [(0, MAX_CHUNKS), (MAX_BYTES // 4, 4), (2**40, 2)])
def test_flight_is_bounded_in_chunks_and_bytes(num_bytes, most):
    waited: list[int] = []
    flight = InFlightLimit()
    for number in range(50):
        flight.add(Output(waited, number), num_bytes)  # ty: ignore[invalid-argument-type]
        in_flight = number - max(waited, default=-1)
        assert in_flight <= most
    assert len(waited) <= 50 // (most // 2)


class Stop(distaff.Callback):
    def on_step_end(self, info: distaff.StepInfo) -> None:
        if info.step == 7:
            raise distaff.StopTraining("enough")


@pytest.mark.slow_but("arrays-True", "list-False")
@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("kind", ["arrays", "list"])
def test_checkpoint_keeps_the_place_of_the_last_batch_trained_on(monkeypatch, kind, slow):
    monkeypatch.setattr(
        "distaff.execution.feed.prefetch.ReadTimes.slow", property(lambda pace: slow)
    )
    loader: Any = data.ArrayLoader({"x": X}, 4)
    loader = data.MappedLoader(loader, dict) if kind == "arrays" else data.Stream(list(loader))
    trainer = Trainer(zoo.MLP((4, 1)), root=None, enable_progress_bar=False, callbacks=[Stop()])
    assert trainer.train_model(loader, num_epochs=1).step == 7
    place = trainer.last_run.checkpointer.store.info(7)["loader"]
    assert (place["epoch"], place["batch"]) == (0, 7)
    fresh = data.Stream([{"x": part} for part in np.split(X, 10)])
    if kind == "list":
        fresh.set_state(place)
        assert len(list(fresh)) == 3
    else:
        assert len(list(loader)) == 3
