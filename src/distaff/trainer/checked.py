"""Checks: what a run looks at before it begins, so that bad input has a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distaff.callbacks import StopTraining
from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data import Loader, first_batch, num_examples, num_shapes
from distaff.data.inspection import leaf_names, narrowed, not_finite
from distaff.errors import BatchError, ConfigError, DistaffError, nearest
from distaff.execution.dispatch.packed_metrics import BadStep
from distaff.execution.feed.chunk import Chunk, One
from distaff.metrics import Metric, compute, results
from distaff.metrics.limits import Breach, first_breach
from distaff.run.directory.recording import DirectoryRecording
from distaff.run.evaluation import Evaluator
from distaff.run.events import Plan
from distaff.run.identity.identity import Subject
from distaff.step import broadcasts
from distaff.step.context import Context
from distaff.step.guard import is_needed
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState
from distaff.step.step import EvalFn
from distaff.trainer.recovery import Recovering


class Checked(Recovering):
    """A training that looks at the first batch of each loader before it begins."""

    _evaluator: Evaluator
    _measured_step: StepFn
    eval_step: EvalFn
    total_steps: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._told: set[tuple[str, str]] = set()
        self._first_batches: dict[str, Batch] = {}

    def check_batch(self, batch: Batch, name: str) -> None:
        """Looks at the first batch of a loader, once and on the host. Override it to check more.

        Args:
            batch: a pytree of arrays `[batch, ...]`.
            name: of the loader: `"train"`, `"val"` or `"test"`.

        Raises:
            BatchError: an input is NaN or infinite, under `on_bad_input="raise"`. A run that goes
                on after bad steps (`on_bad_numbers`) takes them as they come.
        """
        known = leaf_names(batch)
        for leaf in self.config.nan_ok if name == "train" else ():
            if leaf not in known:
                raise ConfigError(
                    f"nan_ok names leaves of the batches; {leaf!r} is not one. "
                    f"{nearest(leaf, known)}"
                )
        cast = narrowed(batch, name)
        if cast and self.config.on_bad_input != "ignore":
            warn(cast, stacklevel=2)
        if name != "train" or self.config.on_bad_numbers == "raise":
            weight = self.sample_weight(batch)
            missing = {"nan_ok": self.config.nan_ok, "weight": weight}
            self.object_to(not_finite(batch, name, **missing))

    def sample_weight(self, batch: Batch) -> Any:
        """Returns the weights of a batch that the loss uses, `[batch, ...]`; None without.

        What has the weight 0 may hold NaN. Override it where your loss uses weights.
        """
        return None

    def judge(self, bad: BadStep | None, breach: Breach | None = None) -> None:
        """Ends the work on an epoch where a bad step is not to be trained on; see `Training`.

        Raises:
            BatchError: a batch has a value out of range, under `on_bad_input="raise"`.
        """
        if breach is not None and (bad is None or breach.batch < bad.step):
            step = breach.batch + 1
            batch = self._batch_of(BadStep(step, is_spike=False)) + 1
            place = f"batch {batch} of epoch {self.epoch} of the train loader (step {step})"
            self._tell(breach, place, "train")
        super().judge(bad, breach)

    def check_values(self, metrics: Mapping[str, Metric], name: str) -> None:
        """Checks that no batch of an evaluation had a value out of range.

        Args:
            metrics: of the evaluation, on the host.
            name: of the loader.

        Raises:
            BatchError: one had, under `on_bad_input="raise"`.
        """
        breach = first_breach(metrics)
        if breach is not None:
            self._tell(breach, f"batch {breach.batch + 1} of the {name} loader", name)

    def _tell(self, breach: Breach, place: str, name: str) -> None:
        """Tells of a value out of range: of each rule and loader only once, where it is borne."""
        if self.config.on_bad_input == "raise" or (name, breach.rule) not in self._told:
            self._told.add((name, breach.rule))
            self.object_to(breach.text(place), is_borne=False)

    def object_to(self, complaint: str, *, is_borne: bool = True) -> None:
        """Tells of bad input, in the way that `on_bad_input` asks for.

        Args:
            complaint: what is wrong; empty where nothing is.
            is_borne: whether a careful user might train on it all the same.

        Raises:
            BatchError: something is, under `on_bad_input="raise"`.
        """
        if complaint and self.config.on_bad_input == "raise":
            option = " Or pass on_bad_input='warn' to train on it all the same." * is_borne
            raise BatchError(f"{complaint}{option}")
        if complaint and self.config.on_bad_input == "warn":
            warn(complaint, stacklevel=2)

    def identify(self, plan: Plan) -> Subject | None:
        """Makes the record of a run; returns what its identity was found from.

        Args:
            plan: of the run, which is prepared.
        """
        subject = self.subject(plan)
        epochs = {"num_epochs": plan.num_epochs, "steps_per_epoch": plan.steps_per_epoch}
        identity = None if subject is None else subject.identity()
        self.run_record = self.record(first_epoch=plan.first_epoch, **epochs, identity=identity)
        return subject

    def subject(self, plan: Plan) -> Subject | None:
        """Returns what the identity of a run is found from; None of a run that writes nothing.

        Args:
            plan: of the run, which is prepared.
        """
        # Nothing is read for it: a source may not be the same after it.
        first, self._first_batches = self._first_batches, {}
        if not isinstance(self.recording, DirectoryRecording):
            return None
        named = {"train": plan.train_loader, **plan.val_loaders}
        loaders = {name: (each, first[name]) for name, each in named.items() if name in first}
        step = self._plain_step if is_needed(self.config) else self._measured_step
        return Subject(
            step=None if self.config.debug else step,
            eval_step=None if self.config.debug else self._evaluator.step,
            state=self.ready_state().replace(guard=None),
            loaders=loaders,
            total_steps=self.total_steps,
            stretched=self._stretched,
            has_weights=self._not_loaded is None,
        )

    def _stretched(self, total_steps: int | None) -> TrainState:
        """Returns the state with the optimizer that a run of another length would have."""
        state, schedule = self.ready_state(), self.schedule
        try:
            trainer: Any = self  # whose override point it is
            trainer.init_optimizer(total_steps)
            return self.ready_state().replace(guard=None)
        except DistaffError:  # such as of a warm-up that is longer than that
            return state.replace(guard=None)
        finally:
            self.state, self.schedule = state, schedule

    def check_training(self, batch: Batch) -> None:
        """Looks at the first batch that is trained on, and at the step that is.

        Raises:
            DistaffError: any bad input, by its kind.
        """
        self.check_batch(batch, "train")
        self.check_broadcasts(self._measured_step, batch, train=True)

    def check_broadcasts(self, step: Callable[..., Any], batch: Batch, *, train: bool) -> None:
        """Checks that the loss does not meet each prediction with each label by mistake.

        Args:
            step: `(state, batch) -> metrics`, whose trace is reused.
            batch: a batch like those of the run.
            train: whether it is a training step.

        Raises:
            LossError: it does; see `broadcasts`.
        """
        state, size = self.evaluation_state(), num_examples(batch)
        closed = self.execution.jaxpr(step, state, batch)
        if closed is not None and broadcasts.has_pairs(closed, size):
            arguments = state.params, batch
            loss_fn: Any = getattr(self, "loss_fn", None)
            broadcasts.check(loss_fn, arguments, lambda: Context(state, train=train), size)

    def check_evaluation(self, loader: Loader, name: str) -> dict[str, Any]:
        """Traces the evaluation of a loader's first batch, looks at that batch, and evaluates it.

        What is evaluated before the training, unless `check_validation=False`, is one batch of a
        validation loader. Neither the state, nor a random number, nor the loader's place changes.

        Returns:
            The metrics it gives, as shapes.

        Raises:
            DistaffError: any bad input, by its kind.
        """
        view = self.feeds.view(loader)
        batch = first_batch(loader if view is None else view, name=name)
        self._first_batches[name] = batch
        shapes = self._evaluator.shapes(self.evaluation_state(), batch)
        self.check_batch(batch, name)
        self.check_broadcasts(self._evaluator.outputs, batch, train=False)
        if name != "test" and self.config.check_validation:
            self.evaluation_watch.expect(loader, num_shapes=num_shapes(loader))
            chunk = Chunk(1, num_examples(batch), One(batch))
            metrics = self._evaluator(self.evaluation_state(), [chunk])
            self.check_values(metrics, name)
            compute(metrics)
        return results(shapes)

    def is_trained(self, epoch: int) -> bool:
        """Whether the steps of an epoch are done, and what follows them may not be."""
        return self.tally.is_trained and self.tally.epoch == epoch

    def stop(self, request: StopTraining) -> None:
        """Ends the run after this epoch's work, as a hook asks for."""
        self.callbacks.stop(request, type(self).__name__)
