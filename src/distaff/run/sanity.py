"""Sanity: what a run looks at before it begins, so that bad input has a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distaff.callbacks import EarlyStopping
from distaff.callbacks.callbacks import Callbacks
from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data import Loader, first_batch, num_examples, num_shapes
from distaff.data.inspection import InspectionOptions, leaf_names, narrowed, not_finite
from distaff.errors import BatchError, ConfigError, nearest
from distaff.execution.feed.chunk import Chunk, One
from distaff.metrics import Metric, compute, results
from distaff.metrics.limits import Breach, first_breach
from distaff.metrics.monitor import Monitor
from distaff.run.workspace import Workspace
from distaff.step import broadcasts
from distaff.step.context import Context


class Sanity:
    """Looks at the first batch of each loader, and at what the loss makes of it.

    Args:
        workspace: of the trainer.
        check_batch: the user's look at a batch of a loader, by its name.
        loss_fn: the user's; None where the step is one of the user's own.
        options: where to look, and what to do about bad input.

    Attributes:
        first_batches: by the name of the loader.
    """

    def __init__(
        self,
        workspace: Workspace,
        check_batch: Callable[[Batch, str], None],
        loss_fn: Callable[..., Any] | None,
        options: InspectionOptions,
    ) -> None:
        self._here, self._check_batch, self._loss_fn = workspace, check_batch, loss_fn
        self._options = options
        self.first_batches: dict[str, Batch] = {}

    def check_training(self, batch: Batch) -> None:
        """Looks at the first batch that is trained on, and at the step that is.

        Raises:
            DistaffError: any bad input, by its kind.
        """
        self.first_batches["train"] = batch
        self._check_batch(batch, "train")
        self._check_broadcasts(self._here.measured_step, batch, train=True)

    def check_evaluation(self, loader: Loader, name: str) -> dict[str, Any]:
        """Traces the evaluation of a loader's first batch, looks at that batch, and evaluates it.

        What is evaluated before the training, unless `check_validation=False`, is one batch of a
        validation loader. Neither the state, nor a random number, nor the loader's place changes.

        Returns:
            The metrics it gives, as shapes.

        Raises:
            DistaffError: any bad input, by its kind.
        """
        here = self._here
        view = here.feeds.view(loader)
        batch = first_batch(loader if view is None else view, name=name)
        self.first_batches[name] = batch
        shapes = here.evaluator.shapes(here.evaluation_state(), batch)
        self._check_batch(batch, name)
        self._check_broadcasts(here.evaluator.outputs, batch, train=False)
        if name != "test" and self._options.check_validation:
            here.evaluation_watch.expect(loader, num_shapes=num_shapes(loader))
            chunk = Chunk(1, num_examples(batch), One(batch))
            metrics = here.evaluator(here.evaluation_state(), [chunk])
            check_values(metrics, name, here.told, self._options)
            compute(metrics)
        return results(shapes)

    def _check_broadcasts(self, step: Callable[..., Any], batch: Batch, *, train: bool) -> None:
        """Checks that the loss does not meet each prediction with each label by mistake.

        Raises:
            LossError: it does; see `broadcasts`.
        """
        state, size = self._here.evaluation_state(), num_examples(batch)
        closed = self._here.execution.jaxpr(step, state, batch)
        if closed is not None and broadcasts.has_pairs(closed, size):
            arguments, loss_fn = (state.params, batch), self._loss_fn or _no_loss
            broadcasts.check(loss_fn, arguments, lambda: Context(state, train=train), size)


def _no_loss(*arguments: Any) -> Any:
    raise TypeError("there is no loss function to trace")


def inspect(batch: Batch, name: str, options: InspectionOptions, weight: Any = None) -> None:
    """Looks at the first batch of a loader, on the host.

    Args:
        batch: a pytree of arrays `[batch, ...]`.
        name: of the loader: `"train"`, `"val"` or `"test"`.
        options: where to look, and what to do about bad input.
        weight: of the examples; what has none may be NaN.

    Raises:
        BatchError: an input is NaN or infinite, under `on_bad_input="raise"`.
        ConfigError: `nan_ok` names a leaf that the batch does not have.
    """
    known = leaf_names(batch)
    for leaf in options.nan_ok if name == "train" else ():
        if leaf not in known:
            raise ConfigError(
                f"nan_ok names leaves of the batches; {leaf!r} is not one. {nearest(leaf, known)}"
            )
    cast = narrowed(batch, name)
    if cast and options.on_bad_input != "ignore":
        warn(cast, stacklevel=2)
    takes_bad_steps = getattr(options, "on_bad_numbers", "raise") != "raise"
    if name != "train" or not takes_bad_steps:
        report(not_finite(batch, name, nan_ok=options.nan_ok, weight=weight), options)


def check_values(
    metrics: Mapping[str, Metric], name: str, told: set[tuple[str, str]], options: InspectionOptions
) -> None:
    """Checks that no batch of an evaluation had a value out of range.

    Args:
        metrics: of the evaluation, on the host.
        name: of the loader.
        told: what was said before.
        options: what to do about bad input.

    Raises:
        BatchError: one had, under `on_bad_input="raise"`.
    """
    breach = first_breach(metrics)
    if breach is not None:
        report_breach(breach, f"batch {breach.batch + 1} of the {name} loader", name, told, options)


def report_breach(
    breach: Breach, place: str, name: str, told: set[tuple[str, str]], options: InspectionOptions
) -> None:
    """Reports a value out of range: of each rule and loader only once, where it is a warning.

    Raises:
        BatchError: under `on_bad_input="raise"`.
    """
    if options.on_bad_input == "raise" or (name, breach.rule) not in told:
        told.add((name, breach.rule))
        report(breach.text(place), options, is_borne=False)


def report(complaint: str, options: InspectionOptions, *, is_borne: bool = True) -> None:
    """Reports bad input in the way that `on_bad_input` asks for.

    Args:
        complaint: what is wrong; empty where nothing is.
        options: what to do about it.
        is_borne: whether a careful user might train on it all the same.

    Raises:
        BatchError: something is, under `on_bad_input="raise"`.
    """
    if complaint and options.on_bad_input == "raise":
        option = " Or pass on_bad_input='warn' to train on it all the same." * is_borne
        raise BatchError(f"{complaint}{option}")
    if complaint and options.on_bad_input == "warn":
        warn(complaint, stacklevel=2)


def check_monitors(
    monitor: Monitor,
    callbacks: Callbacks,
    of_training: Iterable[str],
    of_validation: Iterable[str],
    is_own: Callable[..., bool],
) -> None:
    """Checks the metrics that a trainer and its callbacks look at, before a run begins.

    Args:
        monitor: which the callbacks take that have none of their own.
        callbacks: of the run.
        of_training: the metrics of a training epoch, as `train/...`.
        of_validation: those of the validations, as `val/...`.
        is_own: whether one of some methods is overridden, which may add metrics or ignore them.

    Raises:
        MetricError: there is no such metric.
        ConfigError: two monitors contradict each other, or there is no validation to stop by.
    """
    of_training, of_validation = list(of_training), list(of_validation)
    callbacks.judge_by(monitor)
    if not of_validation:
        _check_stops([each for each in callbacks.callbacks if isinstance(each, EarlyStopping)])
    monitors: list[Monitor] = [monitor, *callbacks.monitors]
    if is_own("is_new_model_better"):
        monitors = []
    for each in monitors:
        if each.is_of_training and not is_own("on_training_epoch_end", "train_epoch"):
            each.check(of_training)
        elif not each.is_of_training and not is_own("on_validation_epoch_end", "eval_model"):
            each.check(of_validation or [each.name])


def _check_stops(callbacks: list[EarlyStopping]) -> None:
    """Checks that callbacks that stop a run look at something where there is no validation."""
    for callback in callbacks:
        monitor = callback.monitor
        if monitor is not None and not monitor.is_of_training:
            raise ConfigError(
                f"EarlyStopping looks at {monitor.name!r} after each validation, and this run has "
                "none. Pass a val_loader to train_model, or monitor a metric of training: "
                "EarlyStopping('train/loss')."
            )
