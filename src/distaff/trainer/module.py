"""`TrainerModule`, the class a user subclasses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import distaff.metrics as metrics_lib
from distaff.callbacks import Callback
from distaff.callbacks.callbacks import Callbacks
from distaff.checkpoint.weights import as_init_from
from distaff.core.config.other_frameworks import ARGUMENTS, spelled
from distaff.core.typing import Batch, Key, Params
from distaff.data import Loader
from distaff.errors import LossError
from distaff.loggers import Logger
from distaff.loggers.protocol import as_loggers
from distaff.metrics import as_json
from distaff.metrics.monitor import Monitor, as_monitor
from distaff.optim import OptimizerLike, build_optimizer
from distaff.optim.build import as_optimizer
from distaff.optim.precision import for_precision
from distaff.run import loop, sanity
from distaff.run.directory.protocol import Recording
from distaff.run.events import make_plan
from distaff.run.result import Best, TrainResult
from distaff.run.run import Run
from distaff.step.context import Context
from distaff.step.normalise import StepFn
from distaff.step.norms import norms_of
from distaff.step.step import EvalFn, EvalStep
from distaff.step.step import train_step as make_train_step
from distaff.trainer.config import with_descriptions
from distaff.trainer.moved import moved
from distaff.trainer.overrides import augmentation_of, check_class
from distaff.trainer.predictor import Predictor
from distaff.trainer.preparation import Preparation, StepProgram, recording_of
from distaff.trainer.training import Inputs, Training, not_trained
from distaff.trainer.variants import check_assignment, variant_of


class TrainerModule(Predictor):
    """Trains, validates, tests and saves a model. Subclass it and write `loss_fn`.

    >>> class Regression(TrainerModule):
    ...     def loss_fn(self, params, batch, ctx):
    ...         return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])

    Every public method can be overridden. Setup calls `print_tabulate`, `init_logger`,
    `create_functions`, `create_jitted_functions` and `init_model`, in this order. It runs in the
    constructor if `example_batch` is given, otherwise in `train_model` with its first batch.

    Args:
        model: a Flax Linen, Flax NNX or Equinox module, a function that returns one, or a pair
            `(init, apply)`; see `distaff.models.as_model`.
        example_batch: a batch with the structure, shapes and dtypes of the training batches.
        optimizer: an `OptimizerConfig`, an Optax transformation, or a function of the total number
            of steps that returns one.
        loggers: further loggers, used alongside the run directory: objects, or the names "console",
            "csv", "mlflow", "tensorboard", "wandb", which write into the run directory; "trackio".
        callbacks: your own callbacks, called at the six events of a run.
        init_from: initial weights: a run directory, a checkpoint folder, a `.safetensors` file, a
            tree of arrays, or an `InitFrom`. The arrays must match the model's one to one; declare
            intended differences with `InitFrom`. A resumed run loads its own checkpoint instead.
        **options: fields of `TrainerConfig`, by name:

    Raises:
        ConfigError: an option is unknown or out of range, or `model` is not a supported model.
    """

    monitor: Monitor = Monitor("val/loss")
    example_batch: Batch = None
    train_step: StepFn
    eval_step: EvalFn
    _run: Run | None = None

    def __init__(
        self,
        model: Any,
        *,
        example_batch: Batch = None,
        optimizer: OptimizerLike | None = None,
        loggers: Sequence[Logger | str] | None = (),
        callbacks: Iterable[Callback] | None = (),
        init_from: Any = None,
        **options: Any,
    ) -> None:
        check_class(self, TrainerModule)
        super().__init__(model, **options)
        self.optimizer: OptimizerLike = as_optimizer(optimizer)
        self.loggers, self.callbacks = as_loggers(loggers), Callbacks(callbacks)
        self.init_from, self.monitor = as_init_from(init_from), as_monitor(self.monitor)
        if example_batch is not None:
            self._tune_process(example_batch)
            self._set_up(example_batch)

    __getattr__ = moved

    def __setattr__(self, name: str, value: Any) -> None:
        check_assignment(self, name, value)
        super().__setattr__(name, value)

    def _set_up(self, example_batch: Batch) -> None:
        Preparation(self, TrainerModule).set_up(example_batch)

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns the loss of a batch, or `(loss, metrics)`. Every trainer needs this method.

        Args:
            params: the parameters to differentiate with respect to.
            batch: a batch from the loader, each leaf `[batch, ...]`.
            ctx: the forward pass `ctx.apply(params, ...)`, and `ctx.rng`, `ctx.train`, `ctx.state`.

        Returns:
            The loss, per example `[batch]` or a scalar `[]`; metrics as a dict by name, see
            `distaff.metrics`.
        """
        raise LossError(
            f"{type(self).__name__} has no loss. Define loss_fn(self, params, batch, ctx), or "
            "override create_functions."
        )

    def augment(self, batch: Batch, key: Key) -> Batch:
        """Returns the augmented batch to train on, for example with randomly shifted images.

        The training step of `create_functions` calls it on the device, once per batch and before
        the loss, even if the optimizer evaluates the loss several times. Under gradient
        accumulation each micro-batch gets its own key. Evaluation and prediction do not call it.
        See `distaff.augment`.

        Args:
            batch: a batch from the loader, each leaf `[batch, ...]`.
            key: a random key `[]` that depends only on the seed and the step, so a resumed run
                draws the same numbers. It is used for nothing else.

        Returns:
            A batch with as many examples; leaves may be added or changed. Anything else makes
            the step raise BatchError.
        """
        return batch

    def create_functions(self) -> tuple[StepFn, EvalFn]:
        """Returns the pure functions `train_step` and `eval_step`. Override it to write your own.

        Returns:
            `train_step(state, batch) -> (state, metrics)` and `eval_step(state, batch) -> metrics`,
            with metrics as described in `distaff.metrics`.
        """
        augment, norms = augmentation_of(self, TrainerModule), norms_of(self.config)
        step = make_train_step(self.loss_fn, augment=augment, norms=norms)
        return step, EvalStep(self.loss_fn)

    def create_jitted_functions(self, train_step: StepFn, eval_step: EvalFn) -> None:
        """Compiles the pure functions lazily, and sets `self.train_step` and `self.eval_step`.

        A run calls what is set here. It does not fuse steps that your override compiles itself.
        """
        execution = self._workspace.execution
        self.train_step = StepProgram(train_step, execution.program(train_step, donate=0))
        self.eval_step = StepProgram(eval_step, execution.program(eval_step))

    def init_logger(self) -> Recording | Logger | list[Logger | str]:
        """Returns the destination of metrics, checkpoints and config. Nothing is written yet.

        Override it to return your own logger or a list of them, used alongside the run directory.
        """
        return recording_of(self, self.loggers)

    def init_optimizer(self, total_steps: int | None) -> None:
        """Builds the optimizer and its state, right before training starts.

        A second `train_model` keeps the optimizer state of the first if `keep_optimizer=True`.

        Args:
            total_steps: optimizer steps of the run, used by schedules; None if the loader has no
                length.

        Raises:
            ConfigError: the optimizer does not fit the run.
        """
        here = self._workspace
        tx, here.schedule = build_optimizer(
            self.optimizer, total_steps, steps_per_epoch=here.steps_per_epoch
        )
        tx = for_precision(tx, self.config.precision)
        here.begin_optimizer(tx, self.optimizer, keep=self.config.keep_optimizer)

    @spelled(ARGUMENTS)
    def train_model(
        self,
        train_loader: Any,
        val_loader: Any = None,
        test_loader: Any = None,
        *,
        num_epochs: int | str,
        steps_per_epoch: int | None = None,
        key: str | None = None,
        rerun: bool = False,
        repeat: bool = False,
    ) -> TrainResult:
        """Trains and validates the model, keeps the best checkpoint, and tests it.

        Inputs are checked before any file is written. A second call continues training from the
        current state, as a new run with its own directory.

        Args:
            train_loader: a loader, any iterable of batches, or arrays such as `(x, y)`.
            val_loader: data for validation after each epoch, or as `val_every` says. A dict for
                several: `{"clean": a, "noisy": b}` logs `val_clean/loss` and `val_noisy/loss`;
                `monitor` names one of them.
            test_loader: data for one test at the end, with the best weights.
            num_epochs: epochs to train, or `"9 steps"`, `"1e9 tokens"`, `"5e4 examples"`, `"30m"`.
            steps_per_epoch: steps per epoch; None for the length of the loader. Required if the
                loader has no length and the schedule depends on it. Each epoch continues reading
                where the last one stopped.
            key: a name for this run within the program, such as `"fold-0"`. Starting the program
                again loads the run with this name and key if it finished, and resumes it if it did
                not; runs with another key are ignored. No effect without a run directory.
            rerun: whether to train again although the same run has finished.
            repeat: whether to restart a loader that is shorter than `steps_per_epoch`.

        Returns:
            The status, metrics and path of the run. The trainer then holds the best weights.

        Raises:
            DistaffError: an input is invalid (the subclass says which).
            NonFiniteError: the loss or the state became NaN or infinite.
        """
        plan = make_plan(
            train_loader,
            val_loader,
            num_epochs=num_epochs,
            steps_per_epoch=steps_per_epoch,
            options=self.config,
            after_epoch=self.epoch,
            repeat=repeat,
            seed=self.config.seed,
        )
        inputs = Inputs(plan, (train_loader, val_loader, test_loader), self.config)
        return Training(self, TrainerModule).run(inputs, key=key, rerun=rerun)

    def train_epoch(self, train_loader: Loader, epoch: int) -> dict[str, Any]:
        """Trains on the batches of one epoch.

        Returns:
            The metrics, averaged over the epoch, named `train/...`.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        run = self.last_run
        for _ in loop.epoch_steps(run, train_loader):
            pass
        return run.end_steps()

    @spelled(ARGUMENTS)
    def eval_model(
        self, loader: Any, prefix: str = "", *, weights: str | None = None
    ) -> dict[str, Any]:
        """Evaluates the model once on every example of a loader, in order. Changes no state.

        Args:
            loader: any iterable of batches, of any sizes, or arrays such as `(x, y)`.
            prefix: a prefix for metric names: `"val/"` gives `val/loss`.
            weights: "raw", "ema" or "swa"; by default those that `monitor` judges.

        Returns:
            Metrics by name: floats, or arrays for non-scalar metrics.

        Raises:
            StateError: the model has no parameters yet, or does not have this average.
            BatchError: the loader is empty.
        """
        here, run = self._workspace, self._run
        with here.timers.spent("evaluation"):
            name, state = here.loader_name(prefix), here.evaluation_state(weights)
            may_pad = here.evaluator.may_pad(state)
            interruptible = iter if run is None else run.interruptible
            with here.chunks(loader, name, may_pad, self.tracker, interruptible) as chunks:
                metrics = here.evaluator(state, chunks)
            if not all(metric.is_result for metric in metrics.values()):
                sanity.check_values(metrics, name, here.warned, self.config)
            return metrics_lib.compute(metrics, prefix)

    def is_new_model_better(
        self, new_metrics: Mapping[str, Any], old_metrics: Mapping[str, Any] | None
    ) -> bool:
        """Returns whether the model just validated is better than another one, by `monitor`.

        Args:
            new_metrics: metrics of the model just validated.
            old_metrics: metrics of the best model so far, None at first. With `keep_best` > 1, it
                is then compared with the second best, and so on, until its rank is known.
        """
        old = None if old_metrics is None else self.monitor.value(old_metrics)
        return self.monitor.better(self.monitor.value(new_metrics), old)

    def save_model(self, metrics: Mapping[str, Any], is_best: bool) -> None:
        """Saves the whole state as a checkpoint, written in the background.

        Args:
            metrics: metrics of the preceding validation.
            is_best: whether this is the best model so far.

        Raises:
            NonFiniteError: a parameter is NaN or infinite; such a model is never saved.
            StateError: nothing has been trained yet.
        """
        checkpointer = self.last_run.checkpointer
        checkpointer.save(checkpointer.facts(metrics, is_best))

    def load_model(self) -> None:
        """Restores the best checkpoint of this run, or the newest if no best one is known.

        Keeps the current weights if there is no best checkpoint and the last save failed.

        Raises:
            StateError: nothing has been trained yet.
        """
        self.last_run.checkpointer.load_best()

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics to `metrics/<name>.json` in the run directory.

        Raises:
            StateError: nothing has been trained yet.
        """
        self.last_run.recorder.recording.save_metrics(name, as_json(metrics))

    def check_batch(self, batch: Batch, name: str) -> None:
        """Checks the first batch of a loader, once and on the host. Override it to check more.

        Args:
            batch: a pytree of arrays `[batch, ...]`.
            name: name of the loader: `"train"`, `"val"` or `"test"`.

        Raises:
            BatchError: an input is NaN or infinite and `on_bad_input="raise"`. A run that skips or
                rolls back bad steps (`on_bad_numbers`) accepts such inputs.
        """
        sanity.inspect(batch, name, self.config, self.sample_weight(batch))

    def sample_weight(self, batch: Batch) -> Any:
        """Returns the example weights that the loss uses, `[batch, ...]`, or None for no weights.

        Override it if your loss uses weights: inputs with weight 0 may then be NaN.
        """
        return None

    def variant(self, **changes: Any) -> Self:
        """Returns an uninitialized copy with some arguments changed; it shares your own attributes.

        Args:
            **changes: options, `optimizer`, `loggers`, `callbacks`, `init_from` or `monitor`.

        Raises:
            ConfigError: an argument is unknown or out of range.
        """
        return variant_of(self, changes)

    @property
    def last_run(self) -> Run:
        """The current run, or else the last one.

        Raises:
            StateError: nothing has been trained yet.
        """
        if self._run is None or not self._run.recorder.has_begun:
            raise not_trained()
        return self._run

    @property
    def best(self) -> Best | None:
        """The best model of the last run; None before the first validation."""
        return None if self._run is None else self._run.state.best

    @property
    def best_metrics(self) -> dict[str, Any] | None:
        """Validation metrics of the best model; None before the first validation."""
        return None if self.best is None else self.best.metrics

    @property
    def stop_reason(self) -> str | None:
        """Why a callback asked the run to stop; None if no callback did."""
        return self.callbacks.stop_reason

    def on_training_start(self) -> None:
        """Runs before the first step. Does nothing by default."""

    def on_training_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Runs after each training epoch. Entries added to `metrics` are logged."""

    def on_validation_epoch_end(self, epoch: int, metrics: dict[str, Any], val_loader: Any) -> None:
        """Runs after each validation. Entries added to `metrics` are logged and can be monitored.

        `val_loader` is a dict if there are several.
        """


TrainerModule.__doc__ = with_descriptions(TrainerModule.__doc__)
