"""TrainerModule: the class a user subclasses. It assembles the rooms below, and delegates."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from distaff import metrics as metrics_lib
from distaff.core.config.other_frameworks import ARGUMENTS, spelled
from distaff.core.typing import Batch, Params
from distaff.data import (
    Loader,
    as_loader,
    closing_made,
    first_to_train,
    is_on_policy,
    limited,
    num_batches,
    num_examples,
    num_shapes,
    unlimited,
)
from distaff.errors import LossError
from distaff.execution import page_faults
from distaff.execution.dispatch.calibration import rehearsed
from distaff.execution.dispatch.dispatcher import make_steps
from distaff.execution.dispatch.packed_metrics import WindowEnd
from distaff.execution.dispatch.steps_per_call import Expected
from distaff.execution.placement import owned
from distaff.optim import build_optimizer
from distaff.optim.gradients import check_trainable
from distaff.optim.kept import kept_state
from distaff.run import loop, monitors
from distaff.run.display import as_text
from distaff.run.evaluation import Evaluator
from distaff.run.events import ChunkEnd, Interrupted, Plan, made_of, make_plan
from distaff.run.identity.ending import ending
from distaff.run.recorder import recorded
from distaff.run.result import TrainResult
from distaff.step.context import Context
from distaff.step.counted import counted
from distaff.step.guard import guarded, make_guard
from distaff.step.logged_rates import reporting
from distaff.step.normalise import StepFn, measured
from distaff.step.step import EvalFn, EvalStep
from distaff.step.step import train_step as make_train_step
from distaff.trainer.checked import Checked
from distaff.trainer.hooks import Hooks, check_class


class TrainerModule(Hooks, Checked):
    """Trains a model: subclass it and write `loss_fn`.

    >>> class Regression(TrainerModule):
    ...     def loss_fn(self, params, batch, ctx):
    ...         return jnp.square(ctx.apply(params, batch["x"]) - batch["y"])

    Every public method is an override point. The constructor calls `print_tabulate`,
    `init_logger`, `create_functions`, `create_jitted_functions` and `init_model`, in this order, if
    it is given an `example_batch`; otherwise `train_model` does, with its first batch.

    Args:
        model: a module of Flax Linen, Flax NNX or Equinox, a function that makes one, or a pair
            `(init, apply)`; see `distaff.models.as_model`.
        example_batch: a batch like those of training.
        **options: `init_from`, see `WarmStart`; `optimizer`, `loggers` and `callbacks`, see
            `Training`; and the options of `TrainerConfig`.

    Raises:
        ConfigError: an option is unknown or out of range, or the model is no module.
    """

    def __init__(self, model: Any, *, example_batch: Batch = None, **options: Any) -> None:
        check_class(self, TrainerModule)
        super().__init__(model, **options)
        if example_batch is not None:
            self.tune_process(example_batch)
            self.set_up(example_batch)

    def set_up(self, example_batch: Batch) -> None:
        """Calls the initialising methods in their order; see the class."""
        num_examples(example_batch)
        self.example_batch = example_batch
        self.print_tabulate(example_batch)
        self.recording = self.init_logger()
        train_step, eval_step = self.create_functions()
        self.create_jitted_functions(train_step, eval_step)
        super().set_up(example_batch)

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

    def create_functions(self) -> tuple[StepFn, EvalFn]:
        """Returns the pure functions `train_step` and `eval_step`. Override it to write your own.

        Returns:
            `train_step(state, batch) -> (state, metrics)` and `eval_step(state, batch) -> metrics`,
            with metrics as `distaff.metrics` describes.
        """
        train_step = make_train_step(self.loss_fn, augment=self.augmentation())
        return train_step, EvalStep(self.loss_fn)

    def create_jitted_functions(self, train_step: StepFn, eval_step: EvalFn) -> None:
        """Makes programs of the pure functions; nothing compiles before its first call."""
        self.train_step = self.execution.program(train_step, donate=0)
        self.eval_step = self.execution.program(eval_step)
        self._counted = counted(train_step, type(self), TrainerModule)
        self._plain_step = measured(self._counted)
        self._measured_step = self.execution.part(guarded(reporting(self._plain_step), self.config))
        self._evaluator = Evaluator(eval_step, self.execution, self.evaluation_watch)

    def init_optimizer(self, total_steps: int | None) -> None:
        """Gives the state its optimizer, right before training.

        A second run keeps the optimizer's state of the first, unless `keep_optimizer=False`.

        Args:
            total_steps: optimizer steps of the run, which schedules are stretched over; None if
                the loader has no length.

        Raises:
            ConfigError: the optimizer does not fit the run.
        """
        tx, self.schedule = build_optimizer(
            self.optimizer, total_steps, steps_per_epoch=self._steps_per_epoch
        )
        state = self.evaluation_state()
        check_trainable(state.params)
        opt_state = self.execution.once(lambda params: tx.init(params))(state.params)
        kept = kept_state(self.ready_state().opt_state, opt_state, self.optimizer)
        if self.config.keep_optimizer and kept is not None:
            state, opt_state = self.ready_state(), kept
        guard = make_guard(self.config)
        self.state = owned(state.replace(tx=tx, opt_state=opt_state, guard=guard))

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
        test = None if test_loader is None else as_loader(test_loader, name="test")
        made = [(train_loader, unlimited(plan.train_loader)), (test_loader, test)]
        made += made_of(val_loader, plan)
        test = None if test is None else limited(test, self.config.most_batches)
        with closing_made(*made), self.listening(), closing(self.display):
            self.begin(plan)
            self.prepare(plan, test)
            subject = self.identify(plan)
            texts = {"model.txt": as_text(self.table)}
            done = self.recording.finished(self.run_record, subject, key=key, rerun=rerun)
            if done is not None:
                return self.load_finished(done, made)
            recording = recorded(self.recording, self.run_record, texts, self.outcome, subject)
            with recording, self.watching(), self.explaining():
                self.has_run = True
                metrics = self._run(plan, test)
        return self.result(metrics)

    def _run(self, plan: Plan, test_loader: Loader | None) -> dict[str, Any]:
        try:
            _train(self, plan)
            return self.last_metrics if self.interrupted_by else self._finish(test_loader)
        finally:
            self.unsaved = None

    def train_epoch(self, train_loader: Loader, epoch: int) -> dict[str, Any]:
        """Trains on the batches of one epoch.

        Returns:
            Their metrics, averaged over the epoch, as `train/...`.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        ledger = self.ledger
        self.begin_epoch(epoch)
        tunes, path = self.config.tune_process, self.recording.path
        steps = self._steps
        state = steps.placement.state(self.ready_state())
        self.forms = rehearsed(steps, state, self.feeds, train_loader, path, remember=tunes)
        with closing(self.training_chunks(train_loader)) as chunks, self.around_epoch() as guard:
            events = loop.steps(
                steps,
                state,
                ledger.fetched(page_faults.watched(chunks, tunes)),
                step=self.step,
                stopping=lambda: self.stop_reason is not None,
                pausing=self.pausing,
                rows=self.tally.rows,
                guard=guard,
            )
            for event in ledger.timed(events, "device"):
                if isinstance(event, ChunkEnd):
                    self.after_chunk(event)
                elif isinstance(event, WindowEnd):
                    self.after_window(event)
                else:
                    self.pause(event)
        self.end_window()
        return self.end_steps()

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
        with self.ledger.spent("evaluation"):
            state, name = self.evaluation_state(), prefix.rstrip("/") or "evaluate"
            with self.chunks(loader, name, even=self._evaluator.may_pad(state)) as chunks:
                metrics = self._evaluator(state, chunks)
            self.check_values(metrics, name)
            return metrics_lib.compute(metrics, prefix)

    def save_model(self, metrics: Mapping[str, Any], is_best: bool) -> None:
        """Hands the whole state to the checkpoint store, which writes in the background.

        Args:
            metrics: of the validation before it.
            is_best: whether it is the best model so far.

        Raises:
            NonFiniteError: a parameter is NaN or infinite; such a model is never kept.
            StateError: nothing has been trained yet.
        """
        self.check_run()
        self.rank(metrics, is_best)
        self.save(self.facts(metrics, is_best))

    def prepare(self, plan: Plan, test_loader: Loader | None = None) -> None:
        """Makes all that a run needs and checks it; nothing is written.

        Raises:
            DistaffError: any bad input, by its kind.
        """
        batch = first_to_train(plan.train_loader)
        self.feeds.of(plan.train_loader, name="train").expect(batch)
        if self.state is None:
            self.set_up(batch)
        elif self.recording.path is not None:
            self.recording = self.init_logger()
        steps_per_epoch = plan.steps_per_epoch or num_batches(plan.train_loader)
        total = None if steps_per_epoch is None else steps_per_epoch * plan.num_epochs
        self.total_steps = total
        self._steps_per_epoch = steps_per_epoch
        _init_optimizer(self, total, batch)
        self._steps = make_steps(
            self.execution,
            self._measured_step,
            (self.evaluation_state(), batch),  # of the same form as the state that is trained
            self.config.one_by_one() if is_on_policy(plan.train_loader) else self.config,
            Expected(steps_per_epoch, total, num_shapes(plan.train_loader)),
            watched=self.callbacks.watches_steps,
            watch=self.make_watch(),
        )
        self.forms, self._steps.ledger = self._steps.forms, self.ledger
        self._first_batches["train"] = batch
        self.check_training(batch)
        found = {n: self.check_evaluation(v, n) for n, v in plan.val_loaders.items()}
        monitors.check(self, TrainerModule, found)
        if test_loader is not None:
            self.check_evaluation(test_loader, "test")

    def _finish(self, test_loader: Loader | None) -> dict[str, Any]:
        """Keeps the last state where no epoch's end has, loads the best, and tests it."""
        self.unsaved = None
        store = self.recording.store
        store.wait()
        if store.latest() != self.step:
            self.save_model({}, is_best=False)
        self.load_model()
        best = self.best_metrics or {}
        metrics = {**self.last_metrics, **{n: x for n, x in best.items() if n[:6] != "train/"}}
        if test_loader is not None:
            test_metrics = self.eval_model(test_loader, "test/")
            self.save_metrics("test", test_metrics)
            self.recording.logger.log_metrics(test_metrics, step=self.step, epoch=self.epoch)
            metrics.update(test_metrics)
        self.last_metrics = metrics
        self.show_result(metrics)
        return metrics


def _init_optimizer(trainer: TrainerModule, total_steps: int | None, batch: Batch) -> None:
    """Initialises the optimizer, for as many updates as the steps of the run make."""
    trainer.init_optimizer(total_steps)
    count = trainer._updates_per_step = trainer._counted.count(trainer.ready_state(), batch)
    if count > 1:
        if total_steps is not None and trainer._steps_per_epoch is not None:
            total_steps *= count
            trainer._steps_per_epoch *= count
        trainer.init_optimizer(total_steps)


def _train(trainer: TrainerModule, plan: Plan) -> None:
    """Trains to an end of whatever kind, and tells callbacks of it."""
    try:
        try:
            for event, info in loop.epochs(trainer, plan):
                trainer.emit(event, info)
        except Interrupted as reason:
            trainer.end_early(reason)
    except BaseException as error:
        facts = ending(error)
        info = trainer.info(trainer.last_metrics)
        trainer.callbacks.end(info, facts["status"], facts["reason"], error)
        raise
    status, reason, *_ = trainer.result(trainer.last_metrics)
    trainer.callbacks.end(trainer.info(trainer.last_metrics), status, reason)
