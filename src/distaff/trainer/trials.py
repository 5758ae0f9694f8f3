"""Turns trainers into trials: runs without a display and without a diagnosis of bad steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from distaff.callbacks import Callback
from distaff.callbacks.callbacks import Callbacks
from distaff.core.typing import Batch
from distaff.run.display import NullDisplay
from distaff.run.events import Plan
from distaff.trainer.module import TrainerModule
from distaff.trainer.preparation import Preparation
from distaff.trainer.training import Training

T = TypeVar("T", bound=TrainerModule)


def as_trial(trainer: T, *, seed: int) -> T:
    """Turns off a trainer's display, diagnosis and resuming, and sets its seed, in place."""
    vars(trainer)["config"] = dataclasses.replace(trainer.config, seed=seed, resume="never")
    here = trainer._workspace
    here.explains, here.display = False, NullDisplay()
    if trainer.state is not None:  # its recording was created with the old config
        Preparation(trainer, TrainerModule).make_recording()
    return trainer


def watch(trainer: TrainerModule, callbacks: Sequence[Callback]) -> None:
    """Adds callbacks to a trainer."""
    vars(trainer)["callbacks"] = Callbacks([*trainer.callbacks.callbacks, *callbacks])


def set_up(trainer: TrainerModule, example_batch: Batch) -> None:
    """Runs the setup methods of a trainer."""
    Preparation(trainer, TrainerModule).set_up(example_batch)


def check(trainer: TrainerModule, plan: Plan) -> None:
    """Checks everything that can be checked without writing.

    Raises:
        DistaffError: an input is invalid (the subclass says which).
    """
    Training(trainer, TrainerModule).check(plan)


def path_of(trainer: TrainerModule) -> Path | None:
    """Returns the directory of a trainer's last run; None if it wrote none."""
    return trainer._workspace.recording.path
