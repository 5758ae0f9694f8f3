"""Runs over iterables of the user's own that go on, and those that must not do so silently."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distaff
from distaff import Callback, data
from distaff.checkpoint import CheckpointStore
from distaff.errors import CheckpointError

NUM_BATCHES = 5


class Regression(distaff.TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class Shuffling:
    """What a torch-style loader is: a new order at each `iter()`, from a generator of its own."""

    def __init__(self, seed: int | None) -> None:
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for rows in np.split(self.rng.permutation(4 * NUM_BATCHES), NUM_BATCHES):
            x = np.sin(rows[:, None] * np.arange(1, 4)).astype(np.float32)
            yield {"x": x, "y": x @ np.float32([1, -2, 0.5])}


class CtrlC(Callback):
    """Presses Ctrl-C after a step, or after the training of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info):
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)


def train(
    train_loader: Any,
    val_loader: Any = None,
    *,
    until: int = 0,
    steps_per_epoch: int | None = None,
    **options: Any,
) -> Any:
    """Trains three epochs in a run that goes on, or until Ctrl-C after a step."""
    trainer = Regression(
        nn.Dense(1), name="line", callbacks=[CtrlC(until)], enable_progress_bar=False, **options
    )
    trainer.result = trainer.train_model(
        train_loader, val_loader, num_epochs=3, steps_per_epoch=steps_per_epoch
    )
    assert trainer.result.status == ("interrupted" if until else "finished")
    return trainer


def log() -> str:
    return Path("runs/line/0001/log.txt").read_text()


@pytest.mark.slow
def test_unseeded_order_is_refused_and_the_run_stays_as_it_was():
    train(Shuffling(None), until=7)
    for _ in range(2):
        with pytest.raises(
            CheckpointError,
            match=r"cannot resume from its checkpoint of step 7: the train loader: .*must yield "
            r"the same batches.*this Shuffling yields others.*= \(1, 2\)\. Seed .*resume='never'",
        ):
            train(Shuffling(None))
    with pytest.warns(UserWarning, match="the resume is inexact: the train loader"):
        goes_on = train(Shuffling(None), allow_inexact_resume=True)
    assert goes_on.result.step == 3 * NUM_BATCHES
    line = "the resume is inexact: the train loader does not yield the same batches again"
    assert log().count(line) == 1
    assert str(goes_on.result.path).endswith("0001")


@pytest.mark.parametrize(("until", "allow"), [(1, False), (5, False), (7, False), (7, True)])
@pytest.mark.slow
def test_seeded_order_goes_on_exactly(until, allow):
    whole = train(Shuffling(3), Shuffling(4), root=None)
    train(Shuffling(3), Shuffling(4), until=until)
    resumed = train(Shuffling(3), Shuffling(4), allow_inexact_resume=allow)
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
    assert resumed.result.metrics == whole.result.metrics
    assert "inexact" not in log()


@pytest.mark.slow_but("Shuffling")
@pytest.mark.parametrize("make", [Shuffling, lambda seed: iter([*Shuffling(seed)] * 3)])
def test_epochs_that_are_cut_are_verified(make):
    train(make(3), until=7, steps_per_epoch=3)
    with pytest.raises(CheckpointError, match="the train loader"):
        train(make(4), steps_per_epoch=3)
    assert train(make(3), steps_per_epoch=3).result.step == 9


class Slow(Shuffling):
    """Epochs of 100 batches, slow enough for a thread; it may press Ctrl-C on its way."""

    def __init__(self, seed: int, ctrl_c_at: int = 0) -> None:
        super().__init__(seed)
        self.ctrl_c_at, self.threads = ctrl_c_at, set()

    def __len__(self) -> int:
        return 20 * NUM_BATCHES

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        batches = itertools.chain.from_iterable(super(Slow, self).__iter__() for _ in range(20))
        for self.num_read, batch in enumerate(batches, 1):
            time.sleep(2e-3)
            self.threads.add(threading.current_thread().name)
            if self.num_read == self.ctrl_c_at:
                signal.raise_signal(signal.SIGINT)
            yield batch


def fused(loader: Slow, **options: Any) -> Any:
    trainer = Regression(
        nn.Dense(1), name="line", steps_per_call=4, enable_progress_bar=False, **options
    )
    trainer.result = trainer.train_model(loader, num_epochs=2)
    assert "read ahead" in loader.threads
    return trainer


@pytest.mark.slow
def test_batches_that_a_thread_has_read_ahead_are_not_in_the_fingerprint():
    whole = fused(Slow(3), root=None)
    loader = Slow(3, ctrl_c_at=70)
    first = fused(loader)
    assert first.result.status == "interrupted"
    assert loader.num_read > first.step
    position = CheckpointStore(first.result.path / "checkpoints").info(first.step)["loader"]
    assert (position["epoch"], position["batch"]) == (0, first.step)
    with pytest.raises(CheckpointError, match="the train loader"):
        fused(Slow(4))
    resumed = fused(Slow(3))
    assert resumed.result.metrics == whole.result.metrics
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)


def test_loader_of_validations_is_verified():
    train(Shuffling(3), Shuffling(None), until=7)
    with pytest.raises(CheckpointError, match=r"the val loader: .*Shuffling yields others"):
        train(Shuffling(3), Shuffling(None))
    with pytest.warns(UserWarning, match="the resume is inexact: the val loader"):
        resumed = train(Shuffling(3), Shuffling(None), allow_inexact_resume=True)
    assert resumed.result.step == 15
    assert "the resume is inexact: the val loader" in log()


def test_stream_inside_of_another_loader_is_verified():
    def mapped(seed: int | None) -> data.MappedLoader:
        return data.MappedLoader(
            data.Stream(Shuffling(seed)), lambda batch: {**batch, "z": batch["y"]}
        )

    train(mapped(3), until=7)
    with pytest.raises(CheckpointError, match="the train loader"):
        train(mapped(4))
    assert train(mapped(3)).result.step == 15


def test_position_of_an_older_checkpoint_is_taken(monkeypatch):
    train(Shuffling(3), until=7)
    whole = CheckpointStore.info

    def info(store: CheckpointStore, step: int) -> Any:
        facts = dict(whole(store, step))
        position = {name: facts["loader"][name] for name in ("epoch", "batch")}
        return {**facts, "loader": position}

    monkeypatch.setattr(CheckpointStore, "info", info)
    assert train(Shuffling(4)).result.step == 15
