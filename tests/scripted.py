"""What several test files need: a regression, one with scores written beforehand, a broken run."""

from __future__ import annotations

import signal

import jax.numpy as jnp

from distaff import Callback, Monitor, StepInfo, TrainerModule


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


class CtrlC(Callback):
    """Interrupts a run after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, info: StepInfo) -> None:
        if info.step == self.step:
            signal.raise_signal(signal.SIGINT)


class InterruptError(OSError):
    """Stands for whatever ends a run from outside, as a lost disk does: a start resumes it."""


class Break(Callback):
    """Raises after a step; after none where that is None."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, info: StepInfo) -> None:
        if info.step == self.step:
            raise InterruptError
