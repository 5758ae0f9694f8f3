"""TrainerModule: the class a user subclasses. It describes a training; `Run` is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from distaff import metrics as metrics_lib
from distaff.callbacks import Callback
from distaff.callbacks.callbacks import Callbacks
from distaff.checkpoint.weights import as_init_from
from distaff.core.config.other_frameworks import ARGUMENTS, spelled
from distaff.core.typing import Batch, Key, Params
from distaff.data import (
    Loader,
)
from distaff.errors import LossError
from distaff.execution.timers import Timers
from distaff.loggers import Logger
from distaff.loggers.given import as_loggers
from distaff.metrics import as_json
from distaff.metrics.monitor import Monitor, as_monitor
from distaff.optim import OptimizerLike, build_optimizer
from distaff.optim.given import as_optimizer
from distaff.optim.kept import kept_state
from distaff.run import loop, sanity
from distaff.run.directory.protocol import Recording
from distaff.run.events import make_plan
from distaff.run.result import Best, TrainResult
from distaff.run.run import Run
from distaff.step.context import Context
from distaff.step.normalise import StepFn
from distaff.step.step import EvalFn, EvalStep
from distaff.step.step import train_step as make_train_step
from distaff.trainer.config import with_descriptions
from distaff.trainer.moved import moved
from distaff.trainer.overrides import augmentation_of, check_class
from distaff.trainer.predictor import Predictor
from distaff.trainer.preparation import Preparation, recording_of
from distaff.trainer.step_program import StepProgram
from distaff.trainer.training import Given, Training, run_of
from distaff.trainer.variants import variant_of


class TrainerModule(Predictor):
    """Trains a model: subclass it and write `loss_fn`.

    >>> class Regression(TrainerModule):
    ...     def loss_fn(self, params, batch, ctx):
    ...         return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])

    Every public method may be overridden. The constructor calls `print_tabulate`, `init_logger`,
    `create_functions`, `create_jitted_functions` and `init_model`, in this order, if it is given an
    `example_batch`; otherwise `train_model` does, with its first batch.

    Args:
        model: a module of Flax Linen, Flax NNX or Equinox, a function that makes one, or a pair
            `(init, apply)`; see `distaff.models.as_model`.
        example_batch: a batch like those of training.
        optimizer: an `OptimizerConfig`, an Optax transformation, or a function of the total number
            of steps that returns one.
        loggers: a list of your own loggers, alongside the run directory's.
        callbacks: a list of code of your own at the six events of a run.
        init_from: a run directory, a checkpoint folder, a `.safetensors` file or a tree of arrays,
            which has a value for each array of the model and no other; or an `InitFrom`, which says
            what differs. A run that is resumed has the weights of its checkpoint.
        **options: those of `TrainerConfig`, by name:

    Raises:
        ConfigError: an option is unknown or out of range, or the model is no module.
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
        loggers: Sequence[Logger] | None = (),
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

    def __getattr__(self, name: str) -> Any:
        return moved(self, name)

    def _set_up(self, example_batch: Batch) -> None:
        Preparation(self, TrainerModule).set_up(example_batch)

    def loss_fn(self, params: Params, batch: Batch, ctx: Context) -> Any:
        """Returns `loss` or `(loss, metrics)` for a batch. This is the method to write.

        Args:
            params: what the loss is differentiated with respect to.
            batch: a batch of the loader, each leaf `[batch, ...]`.
            ctx: `ctx.apply(params, ...)` is the forward pass; `ctx.rng`, `ctx.train`, `ctx.state`.

        Returns:
            The loss, one number per example `[batch]` or a scalar; metrics by name, as
            `distaff.metrics` describes.
        """
        raise LossError(
            f"{type(self).__name__} has no loss. Define loss_fn(self, params, batch, ctx), or "
            "override create_functions."
        )

    def augment(self, batch: Batch, key: Key) -> Batch:
        """Returns a batch to train on in place of one of the loader, such as a shifted picture.

        The training step of `create_functions` calls it once, on the device, before the loss, also
        where an optimizer evaluates the loss several times; of accumulated steps, each has its own
        batch and key. Evaluation and prediction do not call it. See `distaff.augment`.

        Args:
            batch: as the loader yields it, each leaf `[batch, ...]`.
            key: a random key, `[]`, that depends on the seed and the step alone, so that a resumed
                run draws what an uninterrupted one does. Nothing else draws from it.

        Returns:
            A batch with the same leaves, maybe others, and as many examples. Otherwise the step
            raises BatchError.
        """
        return batch

    def create_functions(self) -> tuple[StepFn, EvalFn]:
        """Returns the pure functions `train_step` and `eval_step`. Override it to write your own.

        Returns:
            `train_step(state, batch) -> (state, metrics)` and `eval_step(state, batch) -> metrics`,
            with metrics as `distaff.metrics` describes.
        """
        train_step = make_train_step(self.loss_fn, augment=augmentation_of(self, TrainerModule))
        return train_step, EvalStep(self.loss_fn)

    def create_jitted_functions(self, train_step: StepFn, eval_step: EvalFn) -> None:
        """Makes programs of the pure functions; nothing compiles before its first call.

        What it sets as `train_step` and `eval_step` is what a run calls. Steps that another
        program makes than these are called one by one.
        """
        execution = self._workspace.execution
        self.train_step = StepProgram(train_step, execution.program(train_step, donate=0))
        self.eval_step = StepProgram(eval_step, execution.program(eval_step))

    def init_logger(self) -> Recording | Logger | list[Logger]:
        """Returns where metrics, checkpoints and configuration go; nothing is written yet.

        Override it to return a logger of your own, or a list of them: they are told of the run
        alongside its directory.
        """
        return recording_of(self, self.loggers)

    def init_optimizer(self, total_steps: int | None) -> None:
        """Gives the state its optimizer, right before training.

        A second run keeps the optimizer's state of the first, unless `keep_optimizer=False`.

        Args:
            total_steps: optimizer steps of the run, which schedules are stretched over; None if
                the loader has no length.

        Raises:
            ConfigError: the optimizer does not fit the run.
        """
        here = self._workspace
        tx, here.schedule = build_optimizer(
            self.optimizer, total_steps, steps_per_epoch=here.steps_per_epoch
        )
        state, ready = here.evaluation_state(), here.ready_state()
        opt_state = here.execution.once(lambda params: tx.init(params))(state.params)
        kept = kept_state(ready.opt_state, opt_state, self.optimizer)
        if self.config.keep_optimizer and kept is not None:
            state, opt_state = ready, kept
        self.state = state.replace(tx=tx, opt_state=opt_state)

    @spelled(ARGUMENTS)
    def train_model(
        self,
        train_loader: Any,
        val_loader: Any = None,
        test_loader: Any = None,
        *,
        num_epochs: int,
        steps_per_epoch: int | None = None,
        key: str | None = None,
        rerun: bool = False,
        repeat: bool = False,
    ) -> TrainResult:
        """Trains, validates, keeps the best model, and tests it.

        All that can be checked is checked before anything is written. A second call goes on
        training, in a run directory of its own.

        Args:
            train_loader: a loader, or any iterable of batches.
            val_loader: validated on every `check_val_every_n_epoch` epochs. Of a dict of loaders,
                each gives metrics of its own: `{"clean": a, "noisy": b}` gives `val_clean/loss`
                and `val_noisy/loss`; `monitor` names one of them.
            test_loader: tested on once, at the end, with the best weights.
            num_epochs: epochs to train.
            steps_per_epoch: cuts epochs of this many steps; needed for a loader without length
                under a schedule that depends on it. An epoch begins where the last one ended.
            key: names the run within a program, such as `"fold-0"`. A run of the same name and
                key that is finished, and the same, is loaded instead of trained again, at any
                start; one that is unfinished is resumed, and no run of another key. Without a run
                directory it does nothing.
            rerun: whether to train again what is finished.
            repeat: whether a loader shorter than `steps_per_epoch` starts again within an epoch.

        Returns:
            How it ended. The trainer holds the best weights afterwards.

        Raises:
            DistaffError: any bad input, by its kind; `NonFiniteError` for a NaN loss.
        """
        plan = make_plan(
            train_loader,
            val_loader,
            num_epochs=num_epochs,
            steps_per_epoch=steps_per_epoch,
            options=self.config,
            after_epoch=self.epoch,
            repeat=repeat,
        )
        given = Given(plan, (train_loader, val_loader, test_loader), self.config)
        return Training(self, TrainerModule).run(given, key=key, rerun=rerun)

    def train_epoch(self, train_loader: Loader, epoch: int) -> dict[str, Any]:
        """Trains on the batches of one epoch.

        Returns:
            Their metrics, averaged over the epoch, as `train/...`.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        run = run_of(self._run)
        for _ in loop.epoch_steps(run, train_loader):
            pass
        return run.end_steps()

    @spelled(ARGUMENTS)
    def eval_model(self, loader: Any, prefix: str = "") -> dict[str, Any]:
        """Evaluates the model over a loader: every example once, in order, nothing changed.

        Args:
            loader: any iterable of batches, of any sizes.
            prefix: put before each metric's name: `"val/"` gives `val/loss`.

        Returns:
            Metrics by name; floats, or arrays for those that are not one number.

        Raises:
            StateError: the model has no parameters yet.
            BatchError: the loader is empty.
        """
        here, run = self._workspace, self._run
        timers = Timers() if run is None else run.timers
        with timers.spent("evaluation"):
            state, name = here.evaluation_state(), prefix.rstrip("/") or "evaluate"
            watching = None if run is None else run.interruptible
            capacity = 1 if run is None else run.recorder.capacity
            with here.chunks(loader, name, capacity, self.tracker, watching) as chunks:
                metrics = here.evaluator(state, chunks)
            sanity.check_values(metrics, name, here.told, self.config)
            return metrics_lib.compute(metrics, prefix)

    def is_new_model_better(
        self, new_metrics: Mapping[str, Any], old_metrics: Mapping[str, Any] | None
    ) -> bool:
        """Tells whether the model just validated is better than another one, by `monitor`.

        Args:
            new_metrics: of the model just validated.
            old_metrics: of the best one, None at first; then, if it is no better and several are
                kept (`keep_best`), of one after the other, until it has its place.
        """
        old = None if old_metrics is None else self.monitor.value(old_metrics)
        return self.monitor.better(self.monitor.value(new_metrics), old)

    def save_model(self, metrics: Mapping[str, Any], is_best: bool) -> None:
        """Hands the whole state to the checkpoint store, which writes in the background.

        Args:
            metrics: of the validation before it.
            is_best: whether it is the best model so far.

        Raises:
            NonFiniteError: a parameter is NaN or infinite; such a model is never kept.
            StateError: nothing has been trained yet.
        """
        checkpointer = run_of(self._run).checkpointer
        checkpointer.save(checkpointer.facts(metrics, is_best))

    def load_model(self) -> None:
        """Loads the best checkpoint of this run, whole; the newest where none is the best.

        Where none is, and the last save could not be written, the weights stay as they are.

        Raises:
            StateError: nothing has been trained yet.
        """
        run_of(self._run).checkpointer.load_best()

    def save_metrics(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics to `metrics/<name>.json` in the run directory.

        Raises:
            StateError: nothing has been trained yet.
        """
        run_of(self._run).recorder.recording.save_metrics(name, as_json(metrics))

    def check_batch(self, batch: Batch, name: str) -> None:
        """Looks at the first batch of a loader, once and on the host. Override it to check more.

        Args:
            batch: a pytree of arrays `[batch, ...]`.
            name: of the loader: `"train"`, `"val"` or `"test"`.

        Raises:
            BatchError: an input is NaN or infinite, under `on_bad_input="raise"`. A run that goes
                on after bad steps (`on_bad_numbers`) takes them as they come.
        """
        sanity.inspect(batch, name, self.config, self.sample_weight(batch))

    def sample_weight(self, batch: Batch) -> Any:
        """Returns the weights of a batch that the loss uses, `[batch, ...]`; None without.

        What has the weight 0 may hold NaN. Override it where your loss uses weights.
        """
        return None

    def variant(self, **changes: Any) -> Self:
        """Returns a trainer like this one that differs in some options, and is not initialised.

        Attributes of your own class are shared.

        Args:
            **changes: options, or other arguments of the constructor: `optimizer`, `loggers`,
                `callbacks`, `init_from`.

        Raises:
            ConfigError: one is unknown or out of range.
        """
        return variant_of(self, changes)

    @property
    def last_run(self) -> Run:
        """The run of the current `train_model`, or of the last one.

        Raises:
            StateError: nothing has been trained yet.
        """
        return run_of(self._run)

    @property
    def best(self) -> Best | None:
        """The best model of the last run; None before the first."""
        return None if self._run is None else self._run.state.best

    @property
    def best_metrics(self) -> dict[str, Any] | None:
        """Validation metrics of the best model; None before the first."""
        return None if self.best is None else self.best.metrics

    @property
    def stop_reason(self) -> str | None:
        """Why a callback wants the run to end; None while none does."""
        return self.callbacks.stop_reason

    def on_training_start(self) -> None:
        """Called before the first step."""

    def on_training_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        """Called after each training epoch; what is added to `metrics` is logged."""

    def on_validation_epoch_end(self, epoch: int, metrics: dict[str, Any], val_loader: Any) -> None:
        """Called after each validation; what is added to `metrics` is logged, or monitored.

        Several validation loaders come as a dict.
        """


TrainerModule.__doc__ = with_descriptions(TrainerModule.__doc__)
