"""Batches that depend on the training: each is made after the step before it, or it is an error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from distaff import OptimizerConfig, data
from distaff.errors import ChangedBatchesError, ConfigError, StateError
from scripted import Break, InterruptError, Regression

EXAMPLE = {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float32)}


def make(**options: Any) -> Regression:
    defaults = {"root": None, "enable_progress_bar": False, "example_batch": EXAMPLE}
    optimizer = OptimizerConfig("sgd", learning_rate=0.1, schedule="constant")
    return Regression(nn.Dense(1), optimizer=optimizer, **{**defaults, **options})


class Environment:
    """Makes batches with the trainer's parameters, and knows its position."""

    def __init__(self, trainer: Regression | None = None, seconds: float = 0.0) -> None:
        self.trainer, self.seconds, self.place = trainer, seconds, 0
        self.seen: list[int] = []
        self.first_to_look = 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        while True:
            time.sleep(self.seconds)
            yield self.batch()
            if self.place % 6 == 0:
                return

    def batch(self) -> Any:
        kernel = np.zeros((3, 1), np.float32)
        if self.place >= self.first_to_look:
            assert self.trainer is not None
            state = self.trainer.state
            kernel = np.asarray(state.params["kernel"])
            self.seen.append(int(state.step))
        self.place += 1
        x = np.full((2, 3), 0.1 * (self.place % 3), np.float32) + 0.1 * kernel[:, 0]
        return {"x": x, "y": np.full(2, self.place % 3, np.float32)}

    def get_state(self) -> dict[str, int]:
        return {"place": self.place}

    def set_state(self, state: Any) -> None:
        self.place = state["place"]


@pytest.mark.parametrize("seconds", [0.0, 0.01], ids=["quick", "slow"])
def test_each_batch_is_made_of_the_state_that_it_trains(seconds):
    trainer = make()
    environment = Environment(trainer, seconds)
    trainer.train_model(data.OnPolicy(environment), num_epochs=2)
    assert environment.seen[-11:] == list(range(1, 12))
    assert set(environment.seen) == set(range(12))


@pytest.mark.parametrize(("first_to_look", "seconds"), [(0, 0.0), (4, 0.02)])
def test_loader_that_is_read_ahead_cannot_look_at_the_state(first_to_look, seconds):
    trainer = make()
    environment = Environment(trainer, seconds)
    environment.first_to_look = first_to_look
    with pytest.raises(StateError, match=r"data\.OnPolicy\(loader\)"):
        trainer.train_model(environment, num_epochs=2)
    assert trainer.state is trainer.state


def test_loader_that_is_read_ahead_cannot_count_by_the_trainers_step():
    trainer = make()

    def batches() -> Iterator[Any]:
        for _ in range(trainer.step + 1):
            yield EXAMPLE

    with pytest.raises(StateError, match="state or step"):
        trainer.train_model(batches, num_epochs=1)


def test_validation_may_look_at_the_state():
    trainer = make(check_validation=False)

    def batches() -> Iterator[Any]:
        yield {
            "x": np.ones((2, 3), np.float32),
            "y": np.asarray(trainer.state.params["kernel"])[:2, 0],
        }

    trainer.train_model([EXAMPLE], batches, num_epochs=1)


def test_first_batch_needs_an_example_where_it_looks_at_the_state():
    trainer = make(example_batch=None)
    with pytest.raises(StateError, match=r"example_batch=\.\.\."):
        trainer.train_model(data.OnPolicy(Environment(trainer)), num_epochs=1)


def test_fused_steps_are_an_error():
    trainer = make(steps_per_call=4)
    with pytest.raises(ConfigError, match="steps_per_call=4"):
        trainer.train_model(data.OnPolicy(Environment(trainer)), num_epochs=1)


def test_limited_and_endless_ones_stay_on_policy():
    trainer, seen = make(limit_batches=3), []

    def play() -> Iterator[Any]:
        while True:
            seen.append(int(trainer.state.step))
            yield EXAMPLE

    loader = data.OnPolicy(play)
    assert data.is_on_policy(data.limited(loader, 2))
    trainer.train_model(loader, num_epochs=2, steps_per_epoch=3)
    assert seen[:6] == list(range(6))
    with pytest.raises(TypeError, match="steps_per_epoch"):
        len(loader)


def test_resumed_run_is_the_same_where_the_loader_knows_its_place():
    def trained(stop: int | None) -> Any:
        trainer = make(root="runs", save_every=1e-9, callbacks=[Break(stop)])
        trainer.train_model(data.OnPolicy(Environment(trainer)), num_epochs=2)
        return trainer.state.params

    whole = trained(None)
    with pytest.raises(InterruptError):
        trained(8)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, trained(None)))


def test_source_without_a_place_cannot_be_resumed():
    loader = data.OnPolicy([EXAMPLE, EXAMPLE])
    loader.set_state(loader.get_state())
    with pytest.raises(ChangedBatchesError, match="allow_inexact_resume"):
        loader.set_state({"epoch": 0, "batch": 1})
