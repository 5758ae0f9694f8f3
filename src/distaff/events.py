"""What passes between the loop and a trainer: a plan in, events out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from distaff.callbacks import StepInfo
from distaff.data import Loader, Stream, as_loader
from distaff.errors import NonFiniteError
from distaff.metrics import Metric
from distaff.rows import BadStep
from distaff.state import TrainState
from distaff.trainer_config import check_count


class ChunkEnd(NamedTuple):
    """One or more completed optimizer updates, made by one program.

    Attributes:
        step: completed updates so far.
        num_steps: how many of them are new.
        state: the new train state.
        metrics: the metrics of each new step, on the device; none where nobody watches steps.
        examples: in the batch of each step.
    """

    step: int
    num_steps: int
    state: TrainState
    metrics: Sequence[Mapping[str, Metric]]
    examples: int


class Pause(NamedTuple):
    """A moment at which a run can be saved: the host has read what the device has done.

    Attributes:
        step: completed updates so far.
        rows: of steps whose window is not full yet, uint32 `[rows, width]`.
        bad: the first bad step among them; None without.
    """

    step: int
    rows: np.ndarray
    bad: BadStep | None = None


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """Ends a run that is saved, because it was asked to end before its time."""


class BadNumbers(NonFiniteError):  # noqa: N818 - a request, unless nobody takes it
    """Ends the work on an epoch, because of a step that is not to be trained on.

    Args:
        what: is not as it should be, such as `"The loss"`.
        bad: which step.
    """

    def __init__(self, what: str, bad: BadStep) -> None:
        is_what = "is a spike" if bad.is_spike else "became NaN or infinite"
        super().__init__(f"{what} {is_what} at step {bad.step}.")
        self.bad = bad


class Plan(NamedTuple):
    """The shape of a run.

    Attributes:
        train_loader: yields the batches of one epoch each time it is iterated.
        val_loader: validated on; None for a run without validation.
        steps_per_epoch: where to cut epochs; None for the train loader's own.
        first_epoch: the first epoch to train, counted from 1.
        last_epoch: the last one, included.
        check_val_every_n_epoch: epochs between validations, and between checkpoints.
    """

    train_loader: Loader
    val_loader: Loader | None
    steps_per_epoch: int | None
    first_epoch: int
    last_epoch: int
    check_val_every_n_epoch: int


def make_plan(
    train_loader: Any,
    val_loader: Any,
    *,
    num_epochs: int,
    steps_per_epoch: int | None,
    check_val_every_n_epoch: int,
    after_epoch: int = 0,
) -> Plan:
    """Makes the plan of a run of `num_epochs` more epochs; loaders may be any iterables of batches.

    Raises:
        BatchError: a loader is no iterable of batches, or one that cannot be iterated so often.
        ConfigError: a count is not a whole number, at least 1.
    """
    train = as_loader(train_loader, name="train")
    val = None if val_loader is None else as_loader(val_loader, name="val")
    check_count("num_epochs", num_epochs)
    if steps_per_epoch is not None:
        check_count("steps_per_epoch", steps_per_epoch)
    _check_passes(train, 1 if steps_per_epoch else num_epochs, "train")
    _check_passes(val, num_epochs // check_val_every_n_epoch, "val")
    first, last = after_epoch + 1, after_epoch + num_epochs
    return Plan(train, val, steps_per_epoch, first, last, check_val_every_n_epoch)


def _check_passes(loader: Loader | None, count: int, name: str) -> None:
    if isinstance(loader, Stream):
        loader.check_passes(count, name)


class Run(Protocol):
    """What the loop asks of a trainer: its override points, and where it stands."""

    @property
    def stop_reason(self) -> str | None:
        """Why the run shall end; None while it shall not."""

    @property
    def best_metrics(self) -> dict[str, Any] | None:
        """Validation metrics of the best model so far."""

    def info(self, metrics: Mapping[str, Any], is_best: bool = False) -> StepInfo:
        """Returns what callbacks are told."""
        ...

    def on_training_start(self) -> None:
        """Called before the first step."""

    def go_on(self) -> StepInfo | None:
        """Goes to where a resumed run was saved; returns what `on_checkpoint` was told there."""
        ...

    def recover(self, found: BadNumbers) -> None:
        """Goes back to before a bad step, or raises the error for it."""
        ...

    @property
    def epoch_to_train(self) -> int:
        """The first epoch that is not done."""
        ...

    def train_epoch(self, train_loader: Loader, epoch: int) -> dict[str, Any]:
        """Trains on one epoch; returns its metrics."""
        ...

    def on_training_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Called after each training epoch."""

    def eval_model(self, loader: Loader, prefix: str) -> dict[str, Any]:
        """Evaluates; returns the metrics."""
        ...

    def on_validation_epoch_end(
        self, epoch: int, metrics: dict[str, Any], val_loader: Loader
    ) -> None:
        """Called after each validation."""

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics under a name of their own."""

    def is_new_model_better(
        self, new_metrics: Mapping[str, Any], old_metrics: Mapping[str, Any] | None
    ) -> bool:
        """Compares two validations."""
        ...

    def save_model(self, metrics: Mapping[str, Any], is_best: bool) -> None:
        """Writes a checkpoint."""

    def end_epoch(self, epoch: int, metrics: dict[str, Any], is_best: bool) -> None:
        """Logs and shows a finished epoch."""
