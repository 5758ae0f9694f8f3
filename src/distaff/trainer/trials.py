"""Trials: a trainer as one of many: it draws nothing, and looks into no bad step."""

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
    """Makes a trainer one that draws nothing, begins runs of its own, and has another seed.

    Args:
        trainer: changed; it may be initialised already.
        seed: of the trial.
    """
    vars(trainer)["config"] = dataclasses.replace(trainer.config, seed=seed, resume="never")
    here = trainer._workspace
    here.explains, here.display = False, NullDisplay()
    if trainer.state is not None:  # its recording was made with what it had been given
        Preparation(trainer, TrainerModule).make_recording()
    return trainer


def watch(trainer: TrainerModule, callbacks: Sequence[Callback]) -> None:
    """Adds callbacks to those of a trainer."""
    vars(trainer)["callbacks"] = Callbacks([*trainer.callbacks.callbacks, *callbacks])


def set_up(trainer: TrainerModule, example_batch: Batch) -> None:
    """Initialises a trainer as its first training would."""
    Preparation(trainer, TrainerModule).set_up(example_batch)


def check(trainer: TrainerModule, plan: Plan) -> None:
    """Goes as far as a run can without writing anything.

    Raises:
        DistaffError: any bad input, by its kind.
    """
    Training(trainer, TrainerModule).check(plan)


def path_of(trainer: TrainerModule) -> Path | None:
    """Returns the run directory of a trainer's last run; None where it has written none."""
    return trainer._workspace.recording.path
