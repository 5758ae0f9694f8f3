"""Sanity checks before a run begins, with errors that name the bad input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from distaff.callbacks import EarlyStopping
from distaff.callbacks.callbacks import Callbacks
from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data import Loader, first_batch, num_examples, num_shapes
from distaff.data.inspection import InspectionOptions, leaf_names, narrowed, not_finite
from distaff.errors import BatchError, ConfigError, LossError, nearest
from distaff.execution.feed.chunk import Chunk, One
from distaff.metrics import Metric, compute, results
from distaff.metrics.limits import Breach, first_breach
from distaff.metrics.monitor import Monitor
from distaff.run.events import Plan
from distaff.run.workspace import Workspace
from distaff.step import broadcasts
from distaff.step.context import Context


class Sanity:
    """Checks the first batch of each loader, and the shapes in the loss.

    Args:
        workspace: the trainer's workspace.
        check_batch: the user's `(batch, loader_name) -> None`, which raises or warns.
        loss_fn: the user's loss; None for a custom training step.
        options: what to check, and how to report bad input.

    Attributes:
        first_batches: first batches by the name of the loader.
    """

    def __init__(
        self,
        workspace: Workspace,
        check_batch: Callable[[Batch, str], None],
        loss_fn: Callable[..., Any] | None,
        options: InspectionOptions,
    ) -> None:
        self._workspace, self._check_batch, self._loss_fn = workspace, check_batch, loss_fn
        self._options = options
        self.first_batches: dict[str, Batch] = {}

    def check_training(self, batch: Batch) -> None:
        """Checks the first training batch, and the training step.

        Raises:
            DistaffError: an input is bad; the subclass says how.
        """
        self.first_batches["train"] = batch
        self._check_batch(batch, "train")
        self._check_broadcasts(self._workspace.measured_step, batch, train=True)

    def check_evaluation(self, loader: Loader, name: str) -> dict[str, Any]:
        """Checks the first batch of an evaluation loader, and evaluates it.

        A test batch is traced only, and with `check_validation=False` so is a validation batch. The
        state, the random numbers and the position of the loader do not change.

        Returns:
            The metrics, as shapes.

        Raises:
            DistaffError: an input is bad; the subclass says how.
        """
        workspace = self._workspace
        view = workspace.feeds.view(loader)
        batch = first_batch(loader if view is None else view, name=name)
        self.first_batches[name] = batch
        shapes = workspace.evaluator.shapes(workspace.evaluation_state(), batch)
        self._check_batch(batch, name)
        self._check_broadcasts(workspace.evaluator.outputs, batch, train=False)
        if name != "test" and self._options.check_validation:
            workspace.evaluation_watch.expect(loader, num_shapes=num_shapes(loader))
            chunk = Chunk(1, num_examples(batch), One(batch))
            metrics = workspace.evaluator(workspace.evaluation_state(), [chunk])
            check_values(metrics, name, workspace.warned, self._options)
            compute(metrics)
        return results(shapes)

    def _check_broadcasts(self, step: Callable[..., Any], batch: Batch, *, train: bool) -> None:
        """Raises LossError if the loss broadcasts predictions `[n, 1]` with labels `[n]`."""
        state, size = self._workspace.evaluation_state(), num_examples(batch)
        closed = self._workspace.execution.jaxpr(step, state, batch)
        if closed is not None and broadcasts.has_pairs(closed, size):
            arguments, loss_fn = (state.params, batch), self._loss_fn or _no_loss
            broadcasts.check(loss_fn, arguments, lambda: Context(state, train=train), size)


def _no_loss(*arguments: Any) -> Any:
    raise TypeError("there is no loss function to trace")


def inspect(batch: Batch, name: str, options: InspectionOptions, weight: Any = None) -> None:
    """Checks the first batch of a loader, on the host.

    Args:
        batch: a pytree of arrays `[batch, ...]`.
        name: name of the loader: `"train"`, `"val"` or `"test"`.
        options: what to check, and how to report bad input.
        weight: example weights; examples without weight may be NaN.

    Raises:
        BatchError: an input is NaN or infinite, under `on_bad_input="raise"`.
        ConfigError: `nan_ok` names a leaf that the batch does not have.
    """
    known = leaf_names(batch)
    for leaf in options.nan_ok if name == "train" else ():
        if leaf not in known:
            raise ConfigError(
                f"nan_ok must name leaves of the batches; {leaf!r} is not one. "
                f"{nearest(leaf, known)}"
            )
    cast = narrowed(batch, name)
    if cast and options.on_bad_input != "ignore":
        warn(cast, stacklevel=2)
    takes_bad_steps = getattr(options, "on_bad_numbers", "raise") != "raise"
    if name != "train" or not takes_bad_steps:
        report(not_finite(batch, name, nan_ok=options.nan_ok, weight=weight), options)


def check_values(
    metrics: Mapping[str, Metric],
    name: str,
    warned: set[tuple[str, str]],
    options: InspectionOptions,
) -> None:
    """Checks that no batch of an evaluation had a value out of range.

    Args:
        metrics: the metrics of the evaluation, on the host.
        name: name of the loader.
        warned: pairs of loader and rule with an earlier warning; updated.
        options: how to report bad input.

    Raises:
        BatchError: a value is out of range, under `on_bad_input="raise"`.
    """
    breach = first_breach(metrics)
    if breach is not None:
        report_breach(
            breach, f"batch {breach.batch + 1} of the {name} loader", name, warned, options
        )


def report_breach(
    breach: Breach, place: str, name: str, warned: set[tuple[str, str]], options: InspectionOptions
) -> None:
    """Reports a value out of range; warns only once per rule and loader.

    Raises:
        BatchError: under `on_bad_input="raise"`.
    """
    if options.on_bad_input == "raise" or (name, breach.rule) not in warned:
        warned.add((name, breach.rule))
        report(breach.text(place), options, is_tolerable=False)


def report(problem: str, options: InspectionOptions, *, is_tolerable: bool = True) -> None:
    """Reports bad input as configured by `on_bad_input`.

    Args:
        problem: what is wrong; empty if nothing is.
        options: how to report it.
        is_tolerable: whether the error suggests to train on it anyway.

    Raises:
        BatchError: there is a problem, under `on_bad_input="raise"`.
    """
    if problem and options.on_bad_input == "raise":
        option = " Or pass on_bad_input='warn' to train on it anyway." * is_tolerable
        raise BatchError(f"{problem}{option}")
    if problem and options.on_bad_input == "warn":
        warn(problem, stacklevel=2)


def check_monitors(
    monitor: Monitor,
    callbacks: Callbacks,
    of_training: Iterable[str],
    of_validation: Iterable[str],
    is_own: Callable[..., bool],
) -> None:
    """Checks the metrics that a trainer and its callbacks monitor, before a run begins.

    Args:
        monitor: the trainer's monitor, the default of callbacks.
        callbacks: the callbacks of the run.
        of_training: names of training metrics, as `train/...`.
        of_validation: names of validation metrics, as `val/...`.
        is_own: returns whether one of the named methods is overridden; it may add metrics.

    Raises:
        MetricError: a monitored metric does not exist.
        ConfigError: two monitors contradict each other, or early stopping needs a validation.
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


def check_ranking(plan: Plan, monitor: Monitor) -> None:
    """Raises ConfigError if models are ranked within epochs by a metric of whole epochs."""
    if plan.val_every.unit != "epochs" and monitor.is_of_training:
        raise ConfigError(
            f"The monitored metric {monitor.name!r} has a value at the ends of epochs only, but "
            f"val_every={str(plan.val_every)!r} ranks models within epochs. Monitor a validation "
            "metric, or validate every n epochs."
        )


def check_plateau(tx: Any, monitor: Monitor, of_validation: Collection[str]) -> None:
    """Raises ConfigError if an optimizer needs a validation metric; the run has none."""
    if getattr(tx, "plateau", None) and not (of_validation or monitor.is_of_training):
        raise ConfigError(
            f"The optimizer has a plateau rule, which reads {monitor.name!r}, but this run has no "
            "validation. Pass a validation loader to train_model, or set monitor = "
            'Monitor("train/loss") in the class of the trainer.'
        )


def _check_stops(callbacks: list[EarlyStopping]) -> None:
    """Raises ConfigError if a callback monitors a validation metric; the run has none."""
    for callback in callbacks:
        monitor = callback.monitor
        if monitor is not None and not monitor.is_of_training:
            raise ConfigError(
                f"EarlyStopping monitors the validation metric {monitor.name!r}, but this run has "
                "no validation. Pass a val_loader to train_model, or monitor a training metric: "
                "EarlyStopping('train/loss')."
            )


def check_metrics(metrics: Any, method: str) -> None:
    """Raises LossError if a method of the user's class did not return metrics by name."""
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        raise LossError(
            f"{method} must return a dict of metrics by name, such as {{'val/loss': 0.1}}; got "
            f"{metrics!r}."
        )
