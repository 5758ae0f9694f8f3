"""Trainers without their surroundings: trials, and training steps apart from a run."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import optax

from distaff.callbacks import Callback
from distaff.callbacks.callbacks import Callbacks
from distaff.core.typing import Batch
from distaff.core.warnings import warn
from distaff.data import (
    Loader,
    closing_made,
    first_to_train,
    is_on_policy,
    sources,
    training_loader_of,
)
from distaff.data.loader import in_order
from distaff.data.stream import Stream
from distaff.errors import BatchError
from distaff.execution.execution import Execution, KeepsPrograms
from distaff.execution.placement import owned
from distaff.run.directory.protocol import Recording
from distaff.run.display import NullDisplay
from distaff.run.events import Plan
from distaff.run.run import Run
from distaff.run.workspace import Workspace
from distaff.step.guard import make_guard
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule
from distaff.trainer.preparation import Preparation
from distaff.trainer.training import Training

T = TypeVar("T", bound=TrainerModule)


def as_trial(trainer: T, *, seed: int) -> T:
    """Turns off a trainer's display, diagnosis and resuming, and sets its seed, in place."""
    vars(trainer)["config"] = dataclasses.replace(trainer.config, seed=seed, resume="never")
    here = trainer._workspace
    here.explains, here.display = False, NullDisplay()
    if trainer.state is not None:  # its recording was created with the old config
        Preparation(trainer, TrainerModule).make_recording()
    return trainer


def group(trainer: TrainerModule, name: str) -> None:
    """Gives the loggers of a trainer that is not set up yet a group, in place."""
    trainer._workspace.group = name


def resume(trainer: TrainerModule) -> None:
    """Lets a trial resume the unfinished run of its key, in place."""
    vars(trainer)["config"] = dataclasses.replace(trainer.config, resume="auto")


@contextmanager
def instead_of_training(
    act: Callable[[TrainerModule, dict[str, Any]], Any],
) -> Generator[None]:
    """Within the block, calls a function in place of the first `train_model` of any trainer.

    Args:
        act: a function of the trainer and the arguments by name. It may call `train_model`.
    """
    original = TrainerModule.train_model

    @functools.wraps(original)
    def train_model(self: TrainerModule, *args: Any, **options: Any) -> Any:
        setattr(TrainerModule, "train_model", original)  # noqa: B010 - an assigned method
        try:
            bound = inspect.signature(original).bind(self, *args, **options)
        except TypeError:
            return original(self, *args, **options)  # which raises an error that helps
        arguments = dict(bound.arguments)
        del arguments["self"]
        return act(self, arguments)

    setattr(TrainerModule, "train_model", train_model)  # noqa: B010 - an assigned method
    try:
        yield
    finally:
        setattr(TrainerModule, "train_model", original)  # noqa: B010 - an assigned method


def watch(trainer: TrainerModule, callbacks: Sequence[Callback]) -> None:
    """Adds callbacks to a trainer."""
    vars(trainer)["callbacks"] = Callbacks([*trainer.callbacks.callbacks, *callbacks])


def set_up(trainer: TrainerModule, example_batch: Batch) -> None:
    """Runs the setup methods of a trainer."""
    Preparation(trainer, TrainerModule).set_up(example_batch)


def check(trainer: TrainerModule, plan: Plan, callbacks: Sequence[Callback] = ()) -> None:
    """Checks everything that can be checked without writing.

    Args:
        trainer: the trainer.
        plan: the loaders and epochs.
        callbacks: further callbacks of the run, which the trainer does not keep.

    Raises:
        DistaffError: an input is invalid (the subclass says which).
    """
    own = trainer.callbacks
    watch(trainer, callbacks)
    Training(trainer, TrainerModule).check(plan)
    vars(trainer)["callbacks"] = own


def path_of(trainer: TrainerModule) -> Path | None:
    """Returns the directory of a trainer's last run; None if it wrote none."""
    return trainer._workspace.recording.path


def is_interrupted(trainer: TrainerModule) -> bool:
    """Whether Ctrl-C was pressed during a trainer's last run, even if that has finished since."""
    run = trainer._run
    return run is not None and run.supervisor.reason == "Ctrl-C"


class PreparedRun(NamedTuple):
    """A run of a copy of a trainer that is prepared and not started.

    Attributes:
        trainer: the copy, without a run directory, loggers and callbacks.
        preparation: makes the states of further seeds.
        run: the run.
    """

    trainer: Any
    preparation: Preparation
    run: Run

    @property
    def workspace(self) -> Workspace:
        """The workspace of the copy."""
        return self.trainer._workspace

    def state_of(self, seed: int) -> TrainState:
        """Returns the state before the first step of a run with another seed.

        What is static in it, such as the optimizer, is that of the prepared state, so that one
        program trains both.
        """
        trainer, here, preparation = self.trainer, self.workspace, self.preparation
        first, config = here.ready_state(), trainer.config
        assert first.tx is not None
        vars(trainer)["config"] = dataclasses.replace(trainer.config, seed=seed)
        trainer.init_model(here.example_batch)
        preparation.load_init_from()
        if type(trainer).init_optimizer is TrainerModule.init_optimizer:
            here.begin_optimizer(first.tx, trainer.optimizer, keep=False)
        else:
            trainer.init_optimizer(self.total_steps)
        here.begin_averages(config.averages, keep=False)
        state = owned(here.ready_state().replace(guard=make_guard(config)))
        # A model in half precision has another `apply_fn` each time it is initialized.
        here.state = state.replace(apply_fn=first.apply_fn, tx=first.tx)
        return here.ready_state()

    @property
    def total_steps(self) -> int | None:
        """The optimizer steps of the run; None if unknown."""
        plan, count = self.run.plan, self.run.recorder.updates_per_step
        total = plan.total_steps
        return total if total is None or plan.epoch_length is None else total * count

    def take_on(self, state: TrainState, *, step: int, epoch: int, seed: int) -> None:
        """Gives the copy the state of a member, to evaluate it."""
        here, trainer = self.workspace, self.trainer
        here.state, here.step, here.epoch = state, step, epoch
        vars(trainer)["config"] = dataclasses.replace(trainer.config, seed=seed)


def prepared_run(
    trainer: TrainerModule, plan: Plan, test_loader: Any, recording: Recording | None = None
) -> PreparedRun:
    """Prepares a run of a copy of a trainer, which keeps the programs that set up its model.

    Args:
        trainer: the trainer.
        plan: the loaders and epochs.
        test_loader: the loader of a test; None without one.
        recording: where to write; None to write nothing.

    Raises:
        DistaffError: an input is invalid (the subclass says which).
    """
    batch = first_to_train(plan.train_loader)
    if trainer._workspace.state is None:
        trainer._tune_process(batch)
    other = trainer.variant(loggers=(), callbacks=(), root=None)
    here = other._workspace
    here.display, here.explains, here.execution = NullDisplay(), False, KeepsPrograms()
    Preparation(other, TrainerModule).set_up_alone(batch, None)
    if recording is not None:
        here.recording = recording
    preparation, run = Training(other, TrainerModule).prepared(plan, test_loader)
    return PreparedRun(other, preparation, run)


def with_state(trainer: T, state: TrainState, *, epoch: int, seed: int, batch: Batch) -> T:
    """Returns a copy of a trainer that has this state, without a run directory and loggers."""
    other = trainer.variant(loggers=(), callbacks=(), root=None, seed=seed)
    here = other._workspace
    here.explains = False
    Preparation(other, TrainerModule).set_up_alone(batch, state)
    here.step, here.epoch = int(state.step), epoch
    here.judged = other.config.judged(other.monitor.name)
    return other


class StepAlone(NamedTuple):
    """The training step of a trainer, with a copy of its state. The trainer is not changed.

    Attributes:
        step: `(state, batch) -> (state, metrics)`.
        state: a copy of the trainer's state, or a new one, whose arrays may be donated. Its
            optimizer is set up, and has made no update.
        execution: makes programs of it.
    """

    step: StepFn
    state: TrainState
    execution: Execution


def step_alone(
    trainer: TrainerModule, batch: Batch, num_steps: int, tx: optax.GradientTransformation | None
) -> StepAlone:
    """Returns the bare training step of a trainer: without a guard, averages and norms.

    Args:
        trainer: the trainer. The copy has its current weights.
        batch: a training batch, which is checked.
        num_steps: the number of steps, for optimizers that depend on it.
        tx: an optimizer to use; None for that of the trainer.

    Raises:
        DistaffError: an input is invalid (the subclass says which).
    """
    preparation, other = _set_up_alone(
        trainer, batch, ema=None, swa_from_epoch=None, log_norms=False
    )
    here = other._workspace
    if tx is None:
        preparation.init_optimizer(num_steps, None)
    else:
        here.begin_optimizer(tx, other.optimizer, keep=False)
    here.counted.count(here.ready_state(), batch)
    return _alone(here.plain_step, here, batch)


def step_of_run(trainer: TrainerModule, batch: Batch, num_steps: int) -> StepAlone:
    """Returns the training step that a run repeats, with everything that its options add.

    Args:
        trainer: the trainer. The copy has its current weights.
        batch: a training batch, which is checked.
        num_steps: the number of steps, for optimizers that depend on it.

    Raises:
        DistaffError: an input is invalid (the subclass says which).
    """
    preparation, other = _set_up_alone(trainer, batch)
    here = other._workspace
    preparation.init_optimizer(num_steps, None)
    here.counted.count(here.ready_state(), batch)
    return _alone(here.measured_step, here, batch)


def _set_up_alone(trainer: T, batch: Batch, **changes: Any) -> tuple[Preparation, T]:
    """Sets up a copy of a trainer without a run directory, loggers and callbacks."""
    state = trainer._workspace.state
    if state is None:
        trainer._tune_process(batch)
    else:
        state = trainer._workspace.evaluation_state()
        state = state.replace(opt_state=None, tx=None, guard=None, averages=None)
    other = trainer.variant(loggers=(), callbacks=(), root=None, **changes)
    other._workspace.display, other._workspace.explains = NullDisplay(), False
    other.check_batch(batch, "train")
    preparation = Preparation(other, TrainerModule)
    preparation.set_up_alone(batch, state)
    return preparation, other


def _alone(step: StepFn, here: Workspace, batch: Batch) -> StepAlone:
    placement = here.execution.placement.alongside(batch)
    state = placement.fetched(placement.state(owned(here.ready_state())))
    here.state = None  # which the step keeps alive
    return StepAlone(step, state, here.execution)


@contextmanager
def training_batches(trainer: TrainerModule, data: Any) -> Generator[Loader]:
    """Yields a loader of the training batches, and leaves the position of `data` as it was.

    Args:
        trainer: the trainer, whose options say how arrays become batches.
        data: a loader, any iterable of batches, or arrays. Of an iterable, which cannot be set
            back, another one is read.

    Raises:
        BatchError: the data can be read only once, or depend on the trainer's state.
    """
    loader = training_loader_of(data, trainer.config, seed=trainer.config.seed)
    if is_on_policy(loader):
        raise BatchError(
            "The batches of an OnPolicy loader depend on the trainer's state in its run, and "
            "cannot be read apart from it. Pass a list of recorded batches."
        )
    streams = [each for each in sources(loader) if isinstance(each, Stream)]
    with closing_made((data, loader)):
        if not streams:
            position = loader.get_state()
            try:
                yield loader
            finally:
                loader.set_state(position)
            return
        view = in_order(loader)
        if view is None or any(each in streams for each in sources(view)):
            raise BatchError(
                f"The train loader must be one that can be read again afterwards; the "
                f"{type(data).__name__} can be iterated only once. Pass a list, a function that "
                "returns a new generator (the function, not its call), or arrays."
            )
        if any(each.has_own_order for each in streams):
            warn(
                f"A {type(data).__name__} cannot be set back, so its batches are read in the order "
                "of the data. If that order is not random, such as sorted by class, pass arrays "
                "or a data.ArrayLoader.",
                stacklevel=4,
            )
        with closing_made((None, view)):
            yield view
