"""What passes between the loop and a trainer: a plan in, events out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from distaff.core.config.checks import whole
from distaff.core.config.options import Options, at_least, option, or_none
from distaff.data import (
    Loader,
    Stream,
    as_loader,
    first_batches,
    limited,
    num_batches,
    sources,
    unlimited,
)
from distaff.errors import ConfigError, NonFiniteError
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.metrics import Metric
from distaff.metrics.limits import Breach
from distaff.step.state import TrainState


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
        breach: the first batch among them with a value out of range; see `WindowEnd`.
    """

    step: int
    rows: np.ndarray
    bad: BadStep | None = None
    breach: Breach | None = None


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
        val_loaders: validated on, by the name their metrics are logged under: `val`, or
            `val_clean` and the like; none for a run without validation.
        steps_per_epoch: where to cut epochs; None for the train loader's own.
        first_epoch: the first epoch to train, counted from 1.
        last_epoch: the last one, included.
        check_val_every_n_epoch: epochs between validations, and between checkpoints.
        repeat: whether the train loader may start again within an epoch.
    """

    train_loader: Loader
    val_loaders: Mapping[str, Loader]
    steps_per_epoch: int | None
    first_epoch: int
    last_epoch: int
    check_val_every_n_epoch: int
    repeat: bool = False

    @property
    def num_epochs(self) -> int:
        """How many epochs there are."""
        return self.last_epoch - self.first_epoch + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """How much of its data a run takes, and when it validates."""

    check_val_every_n_epoch: int = option(
        1, "Epochs between validations, and between checkpoints.", check=at_least(1)
    )
    limit_batches: int | None = option(
        None,
        """Take at most this many batches of each loader in an epoch. The training continues in
        the next epoch with those that follow; None for all.""",
        check=or_none(at_least(1)),
    )
    overfit_batches: int | None = option(
        None,
        """Train in each epoch on the same first batches of the train loader, this many, and
        validate on them: their loss is to go to zero. None for a usual run.""",
        check=or_none(at_least(1)),
    )
    fast_dev_run: bool = option(
        False,
        "Try the code out: one epoch of one batch of each loader; nothing is written.",
    )

    @property
    def most_batches(self) -> int | None:
        """The most batches of a loader to take in an epoch; None for all."""
        return 1 if self.fast_dev_run else self.limit_batches


def make_plan(
    train_loader: Any,
    val_loader: Any,
    *,
    num_epochs: int,
    steps_per_epoch: int | None,
    options: PlanOptions,
    after_epoch: int = 0,
    repeat: bool = False,
) -> Plan:
    """Makes the plan of a run of `num_epochs` more epochs; loaders may be any iterables of batches.

    Args:
        train_loader: of the training.
        val_loader: of the validation; a dict of them by name for several; None for none.
        num_epochs: how many there are.
        steps_per_epoch: where to cut them; None for the train loader's own.
        options: how often to validate, and how many batches to take.
        after_epoch: completed epochs.
        repeat: whether the train loader may start again within an epoch.

    Raises:
        BatchError: a loader is no iterable of batches, or one that cannot be iterated so often.
        ConfigError: a count is not a whole number, at least 1.
    """
    train = as_loader(train_loader, name="train")
    vals = _by_name(val_loader)
    whole("num_epochs", num_epochs)
    if steps_per_epoch is not None:
        whole("steps_per_epoch", steps_per_epoch)
    num_epochs = 1 if options.fast_dev_run else num_epochs
    every = 1 if options.fast_dev_run else options.check_val_every_n_epoch
    most = options.most_batches
    if options.overfit_batches is not None:
        batches = first_batches(train, options.overfit_batches)
        train, vals = Stream(batches), {name: Stream(batches) for name in vals}
    repeat |= options.overfit_batches is not None
    length = num_batches(train)
    if steps_per_epoch is not None and not repeat and (length or steps_per_epoch) < steps_per_epoch:
        raise ConfigError(
            f"steps_per_epoch={steps_per_epoch} is more than the train loader has: {length} "
            "batches. Lower it, or pass repeat=True to train_model: the loader then starts again "
            "within an epoch."
        )
    length = steps_per_epoch or length
    if most is not None and length is not None:
        steps_per_epoch = min(length, most)
    elif most is not None:
        train = limited(train, most)
    vals = {name: limited(loader, most) for name, loader in vals.items()}
    num_steps = None if steps_per_epoch is None else num_epochs * steps_per_epoch
    _check_passes(train, 1 if steps_per_epoch else num_epochs, "train", num_steps)
    for name, loader in vals.items():
        _check_passes(loader, num_epochs // every, name)
    first, last = after_epoch + 1, after_epoch + num_epochs
    return Plan(train, vals, steps_per_epoch, first, last, every, repeat)


def _by_name(val_loader: Any) -> dict[str, Loader]:
    """Returns the loaders to validate on, by the name their metrics are logged under."""
    if val_loader is None:
        return {}
    is_named = isinstance(val_loader, Mapping) and not any(
        hasattr(each, "shape") for each in val_loader.values()
    )
    if not is_named:
        return {"val": as_loader(val_loader, name="val")}
    for name in val_loader:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(
                "A validation set's name becomes that of its metrics, as in val_clean/loss; got "
                f"{name!r}. Use letters, digits and underscores."
            )
    return {f"val_{name}": as_loader(each, name=f"val_{name}") for name, each in val_loader.items()}


def made_of(val_loader: Any, plan: Plan) -> list[tuple[Any, Loader]]:
    """Returns what was given to validate on, each with the loader that it became."""
    loaders = given(plan.val_loaders)
    if not isinstance(loaders, dict):
        return [] if loaders is None else [(val_loader, unlimited(loaders))]
    return [(val_loader[name], unlimited(loader)) for name, loader in loaders.items()]


def _check_passes(loader: Loader, count: int, name: str, num_batches: int | None = None) -> None:
    for source in sources(loader):
        if isinstance(source, Stream):
            source.check_passes(count, name, num_batches)


def given(val_loaders: Mapping[str, Any]) -> Any:
    """Returns the loaders of a validation, or what belongs to them, in the form of the argument.

    Args:
        val_loaders: as a `Plan` has them.

    Returns:
        None without any; the one named `val` itself; several by their names without `val_`.
    """
    if set(val_loaders) <= {"val"}:
        return val_loaders.get("val")
    return {name.removeprefix("val_"): each for name, each in val_loaders.items()}


class Hooks(Protocol):
    """What the loop calls of a user's class; each may be overridden."""

    def on_training_start(self) -> None:
        """Called before the first step."""

    def train_epoch(self, train_loader: Loader, epoch: int) -> dict[str, Any]:
        """Trains on one epoch; returns its metrics."""
        ...

    def on_training_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Called after each training epoch."""

    def eval_model(self, loader: Loader, prefix: str = "") -> dict[str, Any]:
        """Evaluates; returns the metrics."""
        ...

    def on_validation_epoch_end(self, epoch: int, metrics: dict[str, Any], val_loader: Any) -> None:
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

    def load_model(self) -> None:
        """Loads the best model."""
