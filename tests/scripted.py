"""What several test files need: a regression, and one whose validation is written beforehand."""

from __future__ import annotations

import jax.numpy as jnp

from distaff import Monitor, TrainerModule


class Regression(TrainerModule):
    """Squared errors of a model with one output."""

    def loss_fn(self, params, batch, ctx):
        return jnp.square(ctx.apply(params, batch["x"])[:, 0] - batch["y"])


class ScriptedScores:
    """Gives a trainer validation scores that are written beforehand: one per epoch."""

    monitor = Monitor("val/score")
    scores: tuple[float, ...] = ()

    def on_validation_epoch_end(self, epoch, metrics, val_loader):
        metrics["val/score"] = self.scores[epoch - 1]


class Scripted(ScriptedScores, Regression):
    """A regression with scores written beforehand."""
