"""Prepares a run: creates and checks everything before the first step, without writing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from distaff.checkpoint.record import make_record
from distaff.checkpoint.weights import loaded
from distaff.checkpoint.weights.names import as_variables
from distaff.core.typing import Batch
from distaff.data import Loader, first_to_train, is_on_policy, num_examples, num_shapes
from distaff.errors import ConfigError, DistaffError
from distaff.execution.determinism import FirstSteps
from distaff.execution.dispatch.dispatcher import make_dispatcher
from distaff.execution.dispatch.repetition import RepeatsSteps
from distaff.execution.dispatch.steps_per_call import Expected
from distaff.execution.placement import owned
from distaff.loggers.protocol import as_loggers, is_logger
from distaff.mesh.planned import unless_met
from distaff.metrics.monitor import as_monitor
from distaff.models import precision_of, remat_of, without_remat
from distaff.optim.gradients import check_trainable
from distaff.optim.precision import check_copy
from distaff.optim.transforms.masks import check_patterns
from distaff.run.diagnosis.products import checked_summary
from distaff.run.diagnosis.recomputed import check_recomputed
from distaff.run.directory.protocol import Recording
from distaff.run.directory.recording import DirectoryRecording, make_recording
from distaff.run.evaluation import Evaluator
from distaff.run.events import Plan
from distaff.run.identity.identity import Subject
from distaff.run.processes.recording import FollowingRecording, recording_kind
from distaff.run.processes.support import quieten
from distaff.run.run import Run
from distaff.run.sanity import Sanity, check_monitors, check_plateau, check_ranking
from distaff.step.averages import averaging, averaging_rest
from distaff.step.counted import counted
from distaff.step.guard import guarded, is_needed, make_guard
from distaff.step.logged_rates import reporting
from distaff.step.normalise import measured
from distaff.step.norms import check_norms
from distaff.step.state import TrainState
from distaff.trainer.constructor import constructed
from distaff.trainer.initial import name_axes, traced_init
from distaff.trainer.overrides import check_averaging, split


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A pure function and its compiled program. Calling it runs the program.

    Attributes:
        function: the function, which a run may fuse into programs of several steps.
        program: the result of `jax.jit`, whose methods, such as `lower`, are available here.
    """

    function: Callable[..., Any]
    program: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program."""
        return self.program(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # requested by `copy` before `program` exists
            raise AttributeError(name)
        return getattr(self.program, name)


def function_of(program: Any) -> Any:
    """Returns the pure function of a `StepProgram`; other programs unchanged."""
    return program.function if isinstance(program, StepProgram) else program


class Preparation:
    """Calls the setup methods of a trainer, which overrides `base`, and collects their results.

    Attributes:
        products: a line on the products of the training step; empty in float32.
        first_batches: the first batch of each loader, by name, once a run is prepared.
    """

    products = ""

    def __init__(self, trainer: Any, base: type) -> None:
        self._trainer, self._base = trainer, base
        self._here, self._options = trainer._workspace, trainer.config

    @unless_met
    def set_up(self, example_batch: Batch, state: TrainState | None = None) -> None:
        """Calls the setup methods in order, but keeps a state that the user has set."""
        num_examples(example_batch)
        quieten(self._here)
        self._trainer.example_batch = self._here.example_batch = example_batch
        self._here.table = None
        self._trainer.print_tabulate(example_batch)
        self.make_recording()
        self._begin(example_batch, state)

    def set_up_alone(self, example_batch: Batch, state: TrainState | None) -> None:
        """Creates the programs and the state, without a recording and a table of the model.

        Args:
            example_batch: a training batch.
            state: the state; None to create the initial one.
        """
        self._trainer.example_batch = self._here.example_batch = example_batch
        self._begin(example_batch, state)

    def _begin(self, example_batch: Batch, state: TrainState | None) -> None:
        """Creates the programs of a training and an evaluation step, and the state."""
        train_step, eval_step = self._trainer.create_functions()
        train_step = split(train_step, self._trainer, self._base)
        self._trainer.create_jitted_functions(averaging(train_step, self._options), eval_step)
        self._take_programs()
        self._here.state = state
        if state is None:
            self._trainer.init_model(example_batch)
            self.load_init_from()
        else:
            name_axes(self._trainer, example_batch)

    def _take_programs(self) -> None:
        trainer, here = self._trainer, self._here
        for name in ("train_step", "eval_step"):
            if not callable(vars(trainer).get(name)):
                raise ConfigError(
                    f"create_jitted_functions must set self.train_step and self.eval_step, but "
                    f"self.{name} is not set. Write self.train_step = jax.jit(train_step, "
                    "donate_argnums=0) and self.eval_step = jax.jit(eval_step)."
                )
        step, evaluation = function_of(trainer.train_step), function_of(trainer.eval_step)
        is_own = not isinstance(trainer.train_step, StepProgram)
        here.counted = counted(step, type(trainer), self._base)
        here.plain_step = measured(here.counted)
        guarded_step = guarded(reporting(here.plain_step), self._options)
        here.measured_step = here.execution.part(guarded_step)
        # A guard makes it a part of another program.
        here.own_step = step if is_own and not is_needed(self._options) else None
        rest = here.execution.placement.updating(averaging_rest(self._options))
        here.with_rest = here.execution.program(rest, donate=0)
        here.evaluator = Evaluator(evaluation, here.execution, here.evaluation_watch)

    def load_init_from(self) -> None:
        """Loads the weights of `init_from` into the state, if there are any."""
        trainer, here, recording = self._trainer, self._here, self._here.recording
        here.not_loaded, here.origin = None, ""
        if trainer.init_from is None:
            return
        state = here.ready_state()
        try:
            variables, here.origin = loaded(
                trainer.model, as_variables(state), trainer.init_from, traced_init(trainer)
            )
        except DistaffError as error:
            # A run to resume has the weights in its own checkpoint.
            if not (isinstance(recording, DirectoryRecording) and recording.may_resume):
                raise
            here.not_loaded = error
            here.show(f"weights must come from a checkpoint, because init_from failed: {error}")
            return
        here.state = state.replace(**variables._asdict())

    def make_recording(self) -> None:
        """Creates the recording of a run, with the loggers of `init_logger`."""
        made = self._trainer.init_logger()
        if is_logger(made):
            made = [made]
        if isinstance(made, list | tuple) or made is None:
            made = recording_of(self._trainer, as_loggers(made))
        if not hasattr(made, "finished"):
            raise ConfigError(
                f"init_logger must return a logger or a list of loggers; got {made!r}. Write "
                "return [loggers.CsvLogger()], or remove init_logger and pass loggers=[...]."
            )
        if self._here.group is not None:
            made.logger.set_group(self._here.group)
        self._here.recording = made

    def prepare(self, run: Run, test_loader: Loader | None) -> None:
        """Creates and checks everything a run needs, without writing.

        Raises:
            DistaffError: an input is invalid (the subclass says which).
        """
        here, plan = self._here, run.plan
        batch = first_to_train(plan.train_loader)
        here.feeds.of(plan.train_loader, name="train").expect(batch)
        if here.state is None or not here.is_set_up:
            self.set_up(batch, here.state)
        elif here.recording.path is not None:
            self.make_recording()
        per_epoch = self._per_epoch = plan.epoch_length
        total = self.total_steps = plan.steps_like(batch)
        run.recorder.updates_per_step = self._init_optimizer(total, batch)
        options = self._options
        if here.own_step is not None:  # called once per step, unchanged
            options = dataclasses.replace(options, steps_per_call=1)
        elif is_on_policy(plan.train_loader):
            options = options.one_by_one()
        run.recorder.dispatcher = make_dispatcher(
            here.execution,
            here.measured_step,
            (here.evaluation_state(), batch),  # same structure as the state to train
            options,
            Expected(per_epoch, total, num_shapes(plan.train_loader)),
            watched=run.callbacks.watches_steps,
            watch=here.make_watch(),
            own_step=here.own_step,
        )
        run.dispatcher.checks = self._step_checks(run)
        self._check(run, batch, test_loader)
        self._check_forward_passes(batch)
        self._identify(run, total)

    def _step_checks(self, run: Run) -> list[RepeatsSteps]:
        """Returns what decides which steps to repeat: the trainer's option, and callbacks."""
        found = self._options.deterministic
        return [*([FirstSteps(found)] if found else []), *run.callbacks.step_checks]

    def _check_averages(self, plan: Plan) -> None:
        """Checks that the averages of the weights can be made and validated.

        Raises:
            ConfigError: they cannot.
        """
        options, first = self._options, self._options.swa_from_epoch
        if not options.averages:
            return
        check_averaging(self._trainer, self._base)
        last = plan.last_epoch
        if first and last and first > last and not options.fast_dev_run:
            raise ConfigError(
                f"swa_from_epoch={first} is after the last epoch of the run, {last}. Lower it, or "
                "train for more epochs."
            )
        prefixes = [each for name in plan.val_loaders for each, _ in options.evaluations(name)]
        for name in plan.val_loaders:
            if prefixes.count(name) > 1:
                raise ConfigError(
                    f"The metrics of the validation set {name.removeprefix('val_')!r} and of an "
                    f"average of the weights would both be named '{name}/...'. Rename the set."
                )

    def _check(self, run: Run, batch: Batch, test_loader: Loader | None) -> None:
        trainer, plan = self._trainer, run.plan
        check_norms(self._options, run.dispatcher.names, type(trainer).__name__)
        self._check_averages(plan)
        loss_fn = getattr(trainer, "loss_fn", None)
        sanity = Sanity(self._here, trainer.check_batch, loss_fn, self._options)
        sanity.check_training(batch)
        found = {n: sanity.check_evaluation(v, n) for n, v in plan.val_loaders.items()}
        of_validation = [
            f"{prefix}/{each}"
            for name, metrics in found.items()
            for prefix, _ in self._options.evaluations(name)
            for each in metrics
        ]
        of_training = [f"train/{name}" for name in run.dispatcher.names]
        trainer.monitor = as_monitor(trainer.monitor)
        self._here.judged = self._options.judged(trainer.monitor.name)
        check_plateau(self._here.ready_state().tx, trainer.monitor, of_validation)
        check_ranking(plan, trainer.monitor)
        check_monitors(trainer.monitor, run.callbacks, of_training, of_validation, self._is_own)
        if test_loader is not None:
            sanity.check_evaluation(test_loader, "test")
        self.first_batches = sanity.first_batches

    def _check_forward_passes(self, batch: Batch) -> None:
        """Checks that precision and rematerialization apply to the training step.

        Counts the products of the step by dtype, for a precision that changes it.
        """
        here, precision = self._here, precision_of(self._options.precision)
        state = here.ready_state()
        check_patterns({"PrecisionConfig.float32": precision.float32}, state.params)
        check_copy(state.opt_state, precision)
        if not self._options.debug:
            # Not the measured step: operations of an inlined program have no line of their own.
            self.products = checked_summary(here.plain_step, state, batch, precision)
            check_recomputed(here.plain_step, state, batch, remat_of(self._options.remat))

    def _is_own(self, *names: str) -> bool:
        return any(getattr(type(self._trainer), x) is not getattr(self._base, x) for x in names)

    def _init_optimizer(self, total_steps: int | None, batch: Batch) -> int:
        """Initializes the optimizer, and returns the number of updates per step."""
        self.init_optimizer(total_steps, self._per_epoch)
        count = self._here.counted.count(self._here.ready_state(), batch)
        if count > 1:
            is_known = total_steps is not None and self._per_epoch is not None
            total_steps = total_steps * count if is_known else total_steps
            self.init_optimizer(total_steps, self._per_epoch and self._per_epoch * count)
        return count

    def init_optimizer(self, total_steps: int | None, per_epoch: int | None) -> None:
        """Gives the state its optimizer, averages and guard, before the first step.

        Args:
            total_steps: optimizer steps of the run; None if unknown.
            per_epoch: optimizer steps of an epoch; None if unknown.

        Raises:
            ConfigError: the optimizer does not fit the run.
        """
        here = self._here
        here.schedule, here.steps_per_epoch = None, per_epoch
        check_trainable(here.evaluation_state().params)
        self._trainer.init_optimizer(total_steps)
        state = here.ready_state()
        if state.tx is None or state.opt_state is None:
            raise ConfigError(
                "init_optimizer must set the optimizer of the state, but it has none. Write "
                "self.state = self.state.replace(tx=tx, opt_state=tx.init(self.state.params))."
            )
        options = self._options
        here.begin_averages(options.averages, keep=options.keep_optimizer)
        here.state = owned(here.ready_state().replace(guard=make_guard(options)))

    def _identify(self, run: Run, total_steps: int | None) -> None:
        plan, trainer = run.plan, self._trainer
        self.subject = self._subject(run, total_steps)
        identity = None if self.subject is None else self.subject.identity()
        run.recorder.record = make_record(
            trainer=type(trainer),
            model=trainer.model.record,
            optimizer=trainer.optimizer,
            monitor=trainer.monitor,
            options=self._options,
            example_batch=trainer.example_batch,
            first_epoch=plan.first_epoch,
            num_epochs=plan.length,
            steps_per_epoch=plan.steps_per_epoch,
            identity=identity,
            **_further_parts(trainer),
        )

    def _subject(self, run: Run, total_steps: int | None) -> Subject | None:
        """Returns the source of a run's identity; None for a run that writes nothing."""
        # Reads no data, which could change the position of a loader.
        plan, here, first = run.plan, self._here, self.first_batches
        if not isinstance(here.recording, DirectoryRecording):
            return None
        named = {"train": plan.train_loader, **plan.val_loaders}
        step = here.plain_step if is_needed(self._options) else here.measured_step
        is_traced = not self._options.debug
        return Subject(
            step=step if is_traced else None,
            eval_step=here.evaluator.step if is_traced else None,
            state=_in_identity(here.ready_state()),
            loaders={name: (each, first[name]) for name, each in named.items() if name in first},
            total_steps=total_steps,
            with_total_steps=self._with_total_steps,
            has_weights=here.not_loaded is None,
        )

    def _with_total_steps(self, total_steps: int | None) -> TrainState:
        """Returns the state with the optimizer for a run of another length."""
        here = self._here
        state, schedule = here.ready_state(), here.schedule
        try:
            self._trainer.init_optimizer(total_steps)
            return _in_identity(here.ready_state()).replace(averages=state.averages)
        except DistaffError:  # such as a warm-up that is too long for it
            return _in_identity(state)
        finally:
            here.state, here.schedule = state, schedule


def _further_parts(trainer: Any) -> dict[str, Any]:
    """Returns the parts of the record that not every run has."""
    parts = constructed(trainer._made_by, trainer.config)
    if trainer.init_from is not None:
        parts["init_from"] = trainer.init_from.record()
    if trainer._workspace.fit is not None:
        parts["fit"] = trainer._workspace.fit
    return parts


def _in_identity(state: TrainState) -> TrainState:
    """Returns a state without what changes no number of a run."""
    return state.replace(guard=None, apply_fn=without_remat(state.apply_fn))


def recording_of(trainer: Any, loggers: Any) -> Recording:
    """Returns the recording of a run, according to the options of its trainer."""
    options = trainer.config
    # A trainer that has already trained need not resume anything.
    resume = "auto" if trainer.step and options.resume != "never" else options.resume
    name = options.name or type(trainer).__name__.lower()
    kind = recording_kind(has_mesh=options.mesh is not None)
    loggers = [] if kind is FollowingRecording else loggers
    return make_recording(options, name, loggers, resume=resume, kind=kind)
