"""Timer: where the seconds between events go."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from distaff import StepInfo, TrainerModule
from distaff.callbacks import Timer
from distaff.data import ArrayLoader
from distaff.loggers import ManyLoggers, MemoryLogger


class Line(TrainerModule):
    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


def loader() -> ArrayLoader:
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    return ArrayLoader({"x": x, "y": x.sum(1)}, 2)


def test_epochs_leave_out_validations_and_checkpoints_within_them():
    memory, now = MemoryLogger(), [100.0]
    timer = Timer(clock=lambda: now[0])
    info = StepInfo(4, 1, None, {}, logger=ManyLoggers(memory))

    def chunk(seconds: float) -> None:
        with timer.around_epoch(None) as around, around(range(1, 3)):
            now[0] += seconds

    def after(seconds: float, event: str) -> None:
        now[0] += seconds
        getattr(timer, event)(info)

    timer.on_training_start(info)
    chunk(1.0)
    after(10.0, "on_validation_end")
    after(100.0, "on_checkpoint")
    chunk(2.0)
    after(0.5, "on_epoch_end")
    after(20.0, "on_validation_end")
    after(200.0, "on_checkpoint")
    chunk(4.0)
    after(0.25, "on_epoch_end")
    assert [each.metrics for each in memory.records] == [
        {"time/validation": 10.0},
        {"time/epoch": 3.5},
        {"time/validation": 20.0},
        {"time/epoch": 4.25},
    ]


def test_run_has_the_seconds_in_its_log_and_the_same_numbers(tmp_path):
    def train(**options: Any):
        quiet: dict[str, Any] = {"enable_progress_bar": False, "val_every": "4 steps"}
        trainer = Line(nn.Dense(1), steps_per_call=2, **quiet, **options)
        return trainer.train_model(loader(), loader(), num_epochs=2)

    timed = train(root=tmp_path, callbacks=[Timer()])
    history = timed.history
    assert history.steps["time/epoch"].tolist() == [8, 16]
    assert history.steps["time/validation"].tolist() == [4, 8, 12, 16]
    assert (history["time/epoch"] > 0).all()
    assert timed.metrics == train(root=None).metrics
