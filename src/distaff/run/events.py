"""The plan of a run, the events of its loop, and the hooks that the loop calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import numpy as np

from distaff.core.config.cadence import Cadence, Count, Every, Unit
from distaff.core.config.checks import whole
from distaff.core.config.options import at_least, option, or_none
from distaff.core.typing import Batch
from distaff.data import (
    InputOptions,
    Loader,
    Stream,
    first_batches,
    limited,
    num_batches,
    num_examples,
    sources,
    training_loader_of,
)
from distaff.data.inputs import validation_loaders_of
from distaff.data.wrappers.limited import Limit, check_limit, check_names, most_batches
from distaff.errors import ConfigError, NonFiniteError
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.execution.feed.room import tokens_of
from distaff.metrics import Metric
from distaff.metrics.limits import Breach
from distaff.step.state import TrainState


class ChunkEnd(NamedTuple):
    """One or more steps, completed by one call of a program.

    Attributes:
        step: completed optimizer updates.
        num_steps: steps in this chunk.
        state: the new train state.
        metrics: the metrics of each step, on the device; empty if no callback needs them.
        examples: batch size of each step.
        counts: what the run has counted after the last step, by unit; see `Room`.
    """

    step: int
    num_steps: int
    state: TrainState
    metrics: Sequence[Mapping[str, Metric]]
    examples: int
    counts: Mapping[Unit, Count] = {}


class Pause(NamedTuple):
    """A point at which a run can be saved: the host has read the metrics of all steps.

    Attributes:
        step: completed optimizer updates.
        rows: the metrics of an incomplete window, uint32 `[rows, width]`.
        bad: the first bad step among these rows; None if all are good.
        breach: the first batch among these rows with a value out of range; see `WindowEnd`.
    """

    step: int
    rows: np.ndarray
    bad: BadStep | None = None
    breach: Breach | None = None


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """Ends a run early: a signal, a time limit or Ctrl-C. The run is saved."""


class BadNumbers(NonFiniteError):  # noqa: N818 - a request, unless the run does not roll back
    """Ends an epoch at a bad step.

    Args:
        what: the bad value, such as `"The loss"`.
        bad: the bad step.
    """

    def __init__(self, what: str, bad: BadStep) -> None:
        is_what = "is a spike" if bad.is_spike else "became NaN or infinite"
        super().__init__(f"{what} {is_what} at step {bad.step}.")
        self.bad = bad


class Plan(NamedTuple):
    """The loaders and epochs of a run.

    Attributes:
        train_loader: yields the batches of one epoch each time it is iterated.
        val_loaders: validation loaders by the prefix of their metrics, `val` or, for example,
            `val_clean`; empty to skip validation.
        steps_per_epoch: length of an epoch; None for the length of the train loader.
        first_epoch: the first epoch to train, counted from 1.
        last_epoch: the last one, included; None if the run ends by its `limit`.
        val_every: how often to validate, and to save.
        repeat: whether to restart the train loader within an epoch when it ends.
        num_steps: steps of the run, if it is to end after these, within an epoch or not.
        abandons: whether the run before ended within an epoch of the train loader, so that this one
            abandons the rest of it and begins a new one.
        limit: the examples, tokens or seconds after which the run ends, if not by epochs.
        count_tokens: returns the tokens of a batch; None if the trainer does not count them.
    """

    train_loader: Loader
    val_loaders: Mapping[str, Loader]
    steps_per_epoch: int | None
    first_epoch: int
    last_epoch: int | None
    val_every: Every
    repeat: bool = False
    num_steps: int | None = None
    abandons: bool = False
    limit: Every | None = None
    count_tokens: Callable[[Batch], Any] | None = None

    @property
    def num_epochs(self) -> int | None:
        """The number of epochs; None if the run ends by its `limit`."""
        return None if self.last_epoch is None else self.last_epoch - self.first_epoch + 1

    @property
    def length(self) -> int | str | None:
        """The number of epochs; or of steps, examples, tokens or seconds, as text."""
        if self.limit is not None:
            return str(self.limit)
        return self.num_epochs if self.num_steps is None else f"{self.num_steps} steps"

    @property
    def epoch_length(self) -> int | None:
        """Batches per epoch; None if unknown."""
        return self.steps_per_epoch or num_batches(self.train_loader)

    @property
    def total_steps(self) -> int | None:
        """Steps of the run; None if unknown."""
        length, count = self.epoch_length, self.num_epochs
        return self.num_steps or (None if length is None or count is None else length * count)

    def steps_like(self, batch: Batch) -> int | None:
        """Returns the steps of the run, if it has batches like this one; None if unknown.

        Raises:
            ConfigError: the trainer does not count tokens, and the run ends after a number of them.
            BatchError: the tokens of the batch cannot be counted.
        """
        limit = self.limit
        if limit is None or limit.unit == "seconds":
            return self.total_steps
        is_tokens = limit.unit == "tokens"
        count = tokens_of(batch, self.count_tokens) if is_tokens else num_examples(batch)
        return -(-int(limit.count) // count) if count else None

    def steps_of(self, epoch: int) -> int | None:
        """Returns the steps of an epoch; None for the length of the train loader."""
        if self.num_steps is None or epoch != self.last_epoch:
            return self.steps_per_epoch
        return self.num_steps - (epoch - self.first_epoch) * (self.epoch_length or 0)


_NUM_EPOCHS = Cadence(("epochs", "steps", "examples", "tokens", "seconds"), number="epochs")
_VAL_EVERY = Cadence(
    ("epochs", "steps", "examples", "tokens"),
    why="A validation at a time of the clock would not be reproducible.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(InputOptions):
    """Options for how much data a run uses, and how often it validates."""

    val_every: str | None = option(
        None,
        """How often to validate, rank and save the model: "2 epochs", at the ends of epochs, or
        "500 steps", "50000 examples" or "1e8 tokens", also within epochs; and at the end of the
        run. None for `check_val_every_n_epoch`.""",
        check=or_none(_VAL_EVERY.check),
    )
    check_val_every_n_epoch: int = option(
        1,
        'Epochs between validations, and between checkpoints: n is `val_every="n epochs"`.',
        check=at_least(1),
    )
    limit_batches: Limit | None = option(
        None,
        """Use at most this many batches of each loader in an epoch, as a number or, as a float, a
        fraction of them; or by loader: `{"train": 100, "val": 0.5}`. The next training epoch
        continues with the batches that follow. None for all.""",
        check=or_none(check_limit),
    )
    overfit_batches: int | None = option(
        None,
        """Train and validate on this many batches, the first of the train loader, in each epoch,
        to check that their loss goes to zero. None to train on all.""",
        check=or_none(at_least(1)),
    )
    fast_dev_run: bool = option(
        False,
        "Test the code: train one epoch on one batch of each loader, and write no files.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_every is not None and self.check_val_every_n_epoch != 1:
            raise ConfigError(
                f"val_every={self.val_every!r} and check_val_every_n_epoch="
                f"{self.check_val_every_n_epoch} both say when to validate. Remove one of them."
            )

    @property
    def validating(self) -> Every:
        """How often to validate."""
        if self.fast_dev_run:
            return Every(1, "epochs")
        if self.val_every is None:
            return Every(self.check_val_every_n_epoch, "epochs")
        return _VAL_EVERY.parse("val_every", self.val_every)

    def most_batches(self, name: str, length: int | None) -> int | None:
        """Returns the most batches of a loader to use in an epoch; None for all.

        Raises:
            ConfigError: the limit is a fraction, and the length of the loader is unknown.
        """
        return 1 if self.fast_dev_run else most_batches(self.limit_batches, name, length)


def make_plan(
    train_loader: Any,
    val_loader: Any,
    *,
    num_epochs: int | str,
    steps_per_epoch: int | None,
    options: PlanOptions,
    after_epoch: int = 0,
    repeat: bool = False,
    seed: int = 0,
) -> Plan:
    """Plans a run of `num_epochs` more epochs.

    Args:
        train_loader: any iterable of batches, or arrays.
        val_loader: any iterable of batches, or arrays, or a dict of these by name; None to skip
            validation.
        num_epochs: the number of epochs to train, or another length, such as `"1e9 tokens"`.
        steps_per_epoch: length of an epoch; None for the length of the train loader.
        options: how often to validate, and how many batches to use.
        after_epoch: epochs completed before.
        repeat: whether to restart the train loader within an epoch when it ends.
        seed: seed of the order of training arrays.

    Raises:
        BatchError: a loader is not an iterable of batches, or cannot be iterated often enough.
        ConfigError: a count is not a positive integer, or `steps_per_epoch` is too large.
    """
    train = training_loader_of(train_loader, options, seed=seed, epoch=after_epoch)
    vals = validation_loaders_of(val_loader, options)
    budget = _budget(num_epochs)
    if steps_per_epoch is not None:
        whole("steps_per_epoch", steps_per_epoch)
    budget = Every(1, "epochs") if options.fast_dev_run else budget
    every = options.validating
    if options.overfit_batches is not None:
        batches = first_batches(train, options.overfit_batches)
        train, vals = Stream(batches), {name: Stream(batches) for name in vals}
    repeat |= options.overfit_batches is not None
    length = num_batches(train)
    if steps_per_epoch is not None and not repeat and (length or steps_per_epoch) < steps_per_epoch:
        raise ConfigError(
            f"steps_per_epoch={steps_per_epoch} is more than the {length} batches of the train "
            "loader. Lower it, or pass repeat=True to train_model to restart the loader within an "
            "epoch."
        )
    length = steps_per_epoch or length
    most = options.most_batches("train", length)
    if most is not None and length is not None:
        steps_per_epoch = min(length, most)
    elif most is not None:
        train = limited(train, most)
    epochs, most_steps = _epochs_of(budget, steps_per_epoch or num_batches(train))
    check_names(options.limit_batches, vals)
    vals = {name: shortened(loader, options, name) for name, loader in vals.items()}
    count = epochs or 1
    num_steps = None if steps_per_epoch is None else count * steps_per_epoch
    length = steps_per_epoch or length
    _check_passes(train, 1 if steps_per_epoch else count, "train", num_steps)
    for name, loader in vals.items():
        _check_passes(loader, _num_validations(every, epochs, length), name)
    first, last = after_epoch + 1, None if epochs is None else after_epoch + epochs
    limit = budget if epochs is None else None
    return Plan(train, vals, steps_per_epoch, first, last, every, repeat, most_steps, limit=limit)


def _budget(num_epochs: Any) -> Every:
    if isinstance(num_epochs, str | Every | timedelta):
        return _NUM_EPOCHS.parse("num_epochs", num_epochs)
    return Every(whole("num_epochs", num_epochs), "epochs")


def _epochs_of(budget: Every, length: int | None) -> tuple[int | None, int | None]:
    """Returns the epochs of a run, the last of which may be shorter, and its steps if given.

    The epochs are None if the run is to end by a number of examples or tokens, or by time.

    Raises:
        ConfigError: the steps are given, and the length of an epoch is unknown.
    """
    count = int(budget.count)
    if budget.unit not in ("epochs", "steps"):
        return None, None
    if budget.unit == "epochs":
        return count, None
    if length is None:
        raise ConfigError(
            f"num_epochs={str(budget)!r} needs the length of an epoch, and the train loader has "
            "none. Pass steps_per_epoch, too, such as the steps between two validations."
        )
    return -(-count // length), count


def shortened(loader: Loader, options: PlanOptions, name: str) -> Loader:
    """Returns a loader with at most the batches that the options allow; see `limited`."""
    return limited(loader, options.most_batches(name, num_batches(loader)))


def _num_validations(every: Every, num_epochs: int | None, length: int | None) -> int:
    """Returns about how often a run validates; two if it is not known, and may be several."""
    if num_epochs is None or every.unit not in ("epochs", "steps"):
        return 2
    if every.unit == "epochs":
        return num_epochs // int(every.count)
    return 2 if length is None else -(-num_epochs * length // int(every.count))


def _check_passes(loader: Loader, count: int, name: str, num_batches: int | None = None) -> None:
    for source in sources(loader):
        if isinstance(source, Stream):
            source.check_passes(count, name, num_batches)


def as_argument(val_loaders: Mapping[str, Any]) -> Any:
    """Converts `Plan.val_loaders` back to the form of the argument `val_loader`.

    Args:
        val_loaders: loaders, or other values, by the names in a `Plan`.

    Returns:
        None if it is empty; the value of `val` alone; else a dict by the names without `val_`.
    """
    if set(val_loaders) <= {"val"}:
        return val_loaders.get("val")
    return {name.removeprefix("val_"): each for name, each in val_loaders.items()}


class Hooks(Protocol):
    """The methods of the user's class that the loop calls; each may be overridden."""

    def on_training_start(self) -> None:
        """Called before the first step."""

    def train_epoch(self, train_loader: Loader, epoch: int) -> dict[str, Any]:
        """Trains one epoch; returns its metrics."""
        ...

    def on_training_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Called after each training epoch."""

    def eval_model(self, loader: Loader, prefix: str = "", **weights: str) -> dict[str, Any]:
        """Evaluates on a loader; returns the metrics."""
        ...

    def on_validation_epoch_end(self, epoch: int, metrics: dict[str, Any], val_loader: Any) -> None:
        """Called after each validation."""

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics to a file of this name."""

    def is_new_model_better(
        self, new_metrics: Mapping[str, Any], old_metrics: Mapping[str, Any] | None
    ) -> bool:
        """Returns whether the new metrics are better."""
        ...

    def save_model(self, metrics: Mapping[str, Any], is_best: bool) -> None:
        """Saves a checkpoint."""
