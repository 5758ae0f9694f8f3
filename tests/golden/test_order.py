"""Pins the order in which a trainer calls its override points, and callbacks hear of events."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from distaff import Callback, TrainerModule, data
from distaff.zoo import MLP

OVERRIDE_POINTS = (
    *("print_tabulate", "init_logger", "create_functions", "create_jitted_functions"),
    *("init_model", "run_model_init", "init_optimizer", "train_model", "train_epoch", "eval_model"),
    *("tracker", "save_model", "load_model", "save_metrics", "is_new_model_better", "bind_model"),
    *("on_training_start", "on_training_epoch_end", "on_validation_epoch_end"),
)
EVENTS = (
    *("on_training_start", "on_step_end", "on_epoch_end", "on_validation_end"),
    *("on_checkpoint", "on_training_end"),
)

CONSTRUCTOR = [
    *("print_tabulate", "init_logger", "create_functions", "create_jitted_functions"),
    *("init_model", "run_model_init"),
]
TRAINING = ["train_epoch", "on_training_epoch_end"]
VALIDATION = [
    *("eval_model", "tracker", "on_validation_epoch_end", "save_metrics"),
    *("is_new_model_better", "save_model"),
]
TEST = ["load_model", "eval_model", "tracker", "save_metrics"]

calls: list[str] = []


class Regression(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def overriding(name: str) -> Any:
    def method(self, *args, **kwargs):
        calls.append(name)
        return getattr(super(Recorder, self), name)(*args, **kwargs)

    return method


Recorder = type("Recorder", (Regression,), {name: overriding(name) for name in OVERRIDE_POINTS})


class Witness(Callback):
    def __init__(self, name: str) -> None:
        for event in EVENTS:
            setattr(self, event, lambda info, event=event: calls.append(f"{name}.{event}"))

    def on_step_end(self, info):
        """Overridden in the class, which is where a trainer looks for it."""


@pytest.fixture
def loader() -> data.ArrayLoader:
    calls.clear()
    return data.ArrayLoader({"x": np.ones((4, 2)), "y": np.ones(4)}, batch_size=2)


def test_trainer_calls_its_methods_in_the_documented_order(loader):
    trainer = Recorder(MLP([1]), enable_progress_bar=False)
    assert calls == []
    trainer.train_model(loader, loader, loader, num_epochs=2)
    assert calls == [
        *("train_model", *CONSTRUCTOR, "init_optimizer", "on_training_start"),
        *(*TRAINING, *VALIDATION),
        *(*TRAINING, *VALIDATION),
        *TEST,
    ]


def test_trainer_with_an_example_batch_initialises_in_its_constructor(loader):
    trainer = Recorder(MLP([1]), example_batch=loader.peek(), enable_progress_bar=False)
    assert calls == CONSTRUCTOR
    calls.clear()
    trainer.train_model(loader, loader, loader, num_epochs=1)
    assert calls == [
        *("train_model", "init_optimizer", "on_training_start"),
        *(*TRAINING, *VALIDATION, *TEST),
    ]


def test_trainer_validates_every_n_epochs_and_at_the_end(loader):
    trainer = Recorder(MLP([1]), check_val_every_n_epoch=2, enable_progress_bar=False)
    trainer.train_model(loader, loader, num_epochs=3)
    assert calls == [
        *("train_model", *CONSTRUCTOR, "init_optimizer", "on_training_start"),
        *(*TRAINING, *TRAINING, *VALIDATION, *TRAINING, *VALIDATION, "load_model"),
    ]


def test_callbacks_hear_the_six_events_between_the_trainers_calls(loader):
    witnesses = [Witness("first"), Witness("second")]
    trainer = Recorder(MLP([1]), callbacks=witnesses, enable_progress_bar=False)

    def heard(event: str) -> list[str]:
        return [f"first.{event}", f"second.{event}"]

    trainer.train_model(loader, loader, num_epochs=2)
    epoch = [
        *("train_epoch", *heard("on_step_end"), *heard("on_step_end")),
        *("on_training_epoch_end", *heard("on_epoch_end")),
        *("eval_model", "tracker", "on_validation_epoch_end", *heard("on_validation_end")),
        *("save_metrics", "is_new_model_better", "save_model", *heard("on_checkpoint")),
    ]
    start = calls.index("on_training_start")
    assert calls[start:] == [
        *("on_training_start", *heard("on_training_start")),
        *(*epoch, *epoch),
        *(*heard("on_training_end"), "load_model"),
    ]
