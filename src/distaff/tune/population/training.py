"""Trains the members of a population side by side, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax

from distaff.callbacks import Callback, EarlyStopping
from distaff.callbacks.callbacks import Callbacks
from distaff.data import is_on_policy, num_shapes
from distaff.errors import ConfigError
from distaff.execution.dispatch.calibration import calibrate
from distaff.execution.dispatch.dispatcher import Dispatcher, make_dispatcher
from distaff.execution.dispatch.packed_metrics import MetricLayout, MetricWindows
from distaff.execution.dispatch.steps_per_call import Expected
from distaff.execution.dispatch.work import work_of
from distaff.execution.placement import num_devices
from distaff.run.events import Plan
from distaff.run.result import Best
from distaff.run.sanity import report_breach
from distaff.step.averages import is_averaged
from distaff.step.finite import all_finite
from distaff.step.normalise import StepFn
from distaff.step.remainder import may_have_rest
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule
from distaff.trainer.trials import PreparedRun
from distaff.tune.population.forms import (
    Members,
    MembersInTurn,
    StackedMembers,
    stack,
    stacked,
)
from distaff.tune.population.member import RunningMember, TrainedMember
from distaff.tune.population.settings import Setting, TracedOptimizer, state_in

_NOT_CALLED = (
    *("train_epoch", "save_model", "load_model", "save_metrics"),
    *("on_training_start", "on_training_epoch_end", "on_validation_epoch_end"),
)


def check_trainer(trainer: Any, owner: str) -> None:
    """Checks that the members of a population do what a run of this trainer does.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(trainer, TrainerModule):
        raise ConfigError(
            f"{owner} takes a trainer, such as tasks.Classifier(model); got {trainer!r}."
        )
    kind, config = type(trainer), trainer.config
    own = [n for n in _NOT_CALLED if getattr(kind, n) is not getattr(TrainerModule, n)]
    if own:
        raise ConfigError(
            f"{owner} does not call {kind.__name__}.{', '.join(own)}, because it trains several "
            "members at once. Train one run per seed: trainer.variant(seed=s).train_model(...)."
        )
    called = [each for each in trainer.callbacks.callbacks if not _is_followed(each)]
    if called:
        names = ", ".join(type(each).__name__ for each in called)
        raise ConfigError(
            f"{owner} calls no callbacks but EarlyStopping, and this trainer has {names}. Pass "
            "trainer.variant(callbacks=[...]) with EarlyStopping only, or without callbacks."
        )
    limits = {
        "debug": (config.debug, False),
        "max_time": (config.max_time, None),
        "mesh": (config.mesh, None),
        "on_bad_numbers": (config.on_bad_numbers == "rollback" and "rollback", False),
        "on_loss_spike": (config.on_loss_spike == "rollback" and "rollback", False),
    }
    for name, (value, neutral) in limits.items():
        if value != neutral:
            raise ConfigError(
                f"{owner} does not support {name}={value!r}. Pass trainer.variant({name}=...) "
                "with another value, or train one run per seed."
            )


def _is_followed(callback: Callback) -> bool:
    """Whether a population follows this callback, or it is one of a task and only shows things."""
    return isinstance(callback, EarlyStopping) or "distaff.tasks." in type(callback).__module__


def check_plan(plan: Plan, owner: str) -> None:
    """Checks that a population can train by this plan.

    Raises:
        ConfigError: it validates within epochs, ends by a count of examples, tokens or seconds, or
            its batches depend on a state.
    """
    if plan.limit is not None:
        raise ConfigError(
            f"{owner} trains a number of epochs or steps; got num_epochs={str(plan.limit)!r}. "
            'Write num_epochs=5, or "1000 steps".'
        )
    if plan.val_every.unit != "epochs":
        raise ConfigError(
            f"{owner} validates at the ends of epochs, but this trainer validates every "
            f"{plan.val_every}. Validate every n epochs."
        )
    if plan.num_epochs is None:
        raise ConfigError(f"{owner} needs the length of the training. Pass num_epochs=20.")
    if is_on_policy(plan.train_loader):
        raise ConfigError(
            f"{owner} gives all members the same batches, but the batches of an OnPolicy "
            "loader depend on the state of one trainer. Train one run per seed."
        )


def choose_form(prepared: PreparedRun) -> str:
    """Returns the form that suits a step: "stacked" or "in turn".

    A stacked convolution is several times slower on a CPU.
    """
    here = prepared.workspace
    if here.own_step is not None or prepared.run.dispatcher.checks:
        return "in turn"
    if jax.default_backend() != "cpu":
        return "stacked"
    example = here.ready_state(), here.example_batch
    return (
        "in turn" if work_of(jax.make_jaxpr(here.measured_step)(*example)).convolves else "stacked"
    )


def make_members(
    prepared: PreparedRun, states: Sequence[Any], form: str, step: StepFn | None
) -> tuple[Members, MetricLayout]:
    """Returns the members of a population in a form, and the layout of a member's metrics.

    Args:
        prepared: the prepared run of one member.
        states: the states of the members.
        form: `"stacked"` or `"in turn"`.
        step: a step of such a state; None for that of the prepared run.
    """
    here, run, config = prepared.workspace, prepared.run, prepared.trainer.config
    layout, plan, execution = run.dispatcher.layout, run.plan, here.execution

    def dispatcher_of(step: StepFn, state: Any) -> Dispatcher:
        loader, length = plan.train_loader, plan.epoch_length
        expected = Expected(length, plan.total_steps, num_shapes(loader))
        parts = execution, step, (state, here.example_batch), config, expected
        return make_dispatcher(*parts, watched=False, watch=here.make_watch())

    if form == "in turn":
        dispatcher = run.dispatcher if step is None else dispatcher_of(step, states[0])
        members: Members = MembersInTurn(execution, dispatcher, states)
    else:
        of_all = stacked(here.measured_step if step is None else step, layout)
        dispatcher = dispatcher_of(of_all, jax.eval_shape(stack, *states))
        members = StackedMembers(execution, dispatcher, states)
    # A choice by the clock needs a state like those that are trained.
    calibrate(dispatcher, members.example(), here.feeds, plan.train_loader, None, remember=False)
    here.capacity = dispatcher.forms.capacity
    return members, layout


class PopulationRun:
    """Trains the members of a population, and validates each after an epoch.

    Args:
        prepared: the prepared run of one member.
        settings: the settings of the members, which differ in nothing that is static.
        form: the form of the members; None to choose it.

    Attributes:
        form: the form of the members.
    """

    def __init__(
        self, prepared: PreparedRun, settings: Sequence[Setting], form: str | None
    ) -> None:
        self._prepared, self._trainer, self._run = prepared, prepared.trainer, prepared.run
        self._here, self._options = prepared.workspace, prepared.trainer.config
        self._check()
        self.form = form or choose_form(prepared)
        self._settings, self._step = settings, 0
        callbacks = settings[0].trainer.callbacks.callbacks
        followed = Callbacks([x for x in callbacks if isinstance(x, EarlyStopping)])
        self._all = [
            RunningMember(each.seed, self._trainer.monitor, followed, self._options)
            for each in settings
        ]
        states: list[Any] = [prepared.state_of(each.seed) for each in settings]
        self._has_rest = may_have_rest(states[0])
        self._rest, self._averaged, step = self._here.with_rest, self._here.with_epoch, None
        self._traced = TracedOptimizer(prepared, settings)
        if self._traced.names:
            pairs = zip(states, settings, strict=True)
            states = [self._traced.carried(*pair) for pair in pairs]
            self._rest, self._averaged = self._traced.rest, self._traced.averaged
            step = self._traced.step()
        self._members, self._layout = make_members(prepared, states, self.form, step)

    def _check(self) -> None:
        tx = self._here.ready_state().tx
        if getattr(tx, "plateau", None) is not None:
            raise ConfigError(
                "The members of a population do not lower the learning rate on a plateau; this "
                "optimizer has plateau=Plateau(...). Use plateau=None, or one run per seed."
            )
        if num_devices(self._here.example_batch) > 1:
            raise ConfigError("The members of a population train on one device only.")

    @property
    def _running(self) -> list[int]:
        return [index for index, member in enumerate(self._all) if member.is_running]

    def train(self, test_loader: Any, show: Callable[[str], None]) -> tuple[TrainedMember, ...]:
        """Trains and tests the members.

        Args:
            test_loader: data for a test of each member's best model; None for no test.
            show: shows a line after each epoch.
        """
        plan = self._run.plan
        for member in self._all:
            member.notify("on_training_start", {})
        for epoch in range(plan.first_epoch, plan.first_epoch + (plan.num_epochs or 0)):
            if not self._running:
                break
            self._train_epoch(epoch)
            self._end_epoch(epoch, plan)
            show(self._line(epoch, plan))
        return tuple(self._finished(index, test_loader) for index in range(len(self._all)))

    def _train_epoch(self, epoch: int) -> None:
        """Trains all members on the batches of an epoch."""
        plan, members, step = self._run.plan, self._members, self._step
        members.begin_epoch()
        for index in self._running:
            self._all[index].begin_epoch(epoch)
            self._all[index].windows = MetricWindows(self._layout, self._options.log_every, step)
        running = self._running
        chunks = self._here.feeds.of(plan.train_loader, name="train").epoch(
            members.dispatcher.chunk_size,
            plan.steps_of(epoch),
            keep_place=True,
            repeat=plan.repeat,
        )
        with closing(chunks):
            for chunk in chunks:
                tables = members.train(chunk, step, running)
                step += chunk.num_steps
                for index, table in zip(running, tables, strict=True):
                    self._read(index, self._all[index].windows.add(table, step))
                running = self._running
                if not running:
                    break
        for index in running:
            self._read(index, self._all[index].windows.rest())
        self._step = step

    def _read(self, index: int, windows: Any) -> None:
        """Records the windows of a member that are due."""
        for event in windows:
            if event.breach is not None:
                place = f"batch {event.breach.batch + 1} of the train loader"
                report_breach(event.breach, place, "train", self._here.warned, self._options)
            self._all[index].window(event)

    def _end_epoch(self, epoch: int, plan: Plan) -> None:
        """Ends the steps of an epoch, and validates if due."""
        running = self._running
        if self._has_rest:  # apply the gradients accumulated so far
            self._members.apply(self._rest, running)
        if is_averaged(self._options, epoch):
            self._members.apply(self._averaged, running)
        is_due = epoch == plan.last_epoch or plan.val_every.is_due("epochs", epoch)
        for index in running:
            member = self._all[index]
            metrics = member.end_steps(self._step)
            member.notify("on_epoch_end", metrics)
            if is_due or member.callbacks.stop_reason:
                metrics = self._validated(index, metrics)
            if member.is_running:
                member.record(metrics)
            if member.is_running and member.callbacks.stop_reason:
                stop = member.callbacks
                member.end(stop.stop_status, stop.stop_reason or "", self._step)
            if not member.is_running and member.state is None:
                member.state = self._kept(index)

    def _validated(self, index: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Validates a member, and keeps its state if it is the best so far."""
        member, trainer = self._all[index], self._trainer
        self._take_on(index, state_in(self._members.state(index)))
        if not all_finite(self._here.ready_state().params):
            where = f"by step {self._step} (epoch {member.epoch})"
            reason = f"a parameter became NaN or infinite {where}"
            member.end("diverged", reason, self._step)
            return metrics
        validation = self._run.evaluate(trainer.eval_model)
        if validation:
            member.notify("on_validation_end", validation)
        judged = member.monitor.judged(metrics, validation)
        old = None if member.best is None else member.best.metrics
        if judged and trainer.is_new_model_better(judged, old):
            member.best = Best(self._step, member.epoch, dict(judged))
            member.state = self._kept(index)
        return {**metrics, **validation}

    def _take_on(self, index: int, state: TrainState) -> None:
        """Gives the trainer the state of a member."""
        member = self._all[index]
        self._prepared.take_on(state, step=self._step, epoch=member.epoch, seed=member.seed)

    def _finished(self, index: int, test_loader: Any) -> TrainedMember:
        """Returns a trained member; tests its best model, unless it diverged before it had one."""
        member, tested = self._all[index], {}
        last = self._kept(index) if member.state is None else member.state
        if test_loader is not None and (member.best is not None or member.status != "diverged"):
            self._take_on(index, last)
            for name, weights in self._options.evaluations("test"):
                tested.update(self._trainer.eval_model(test_loader, f"{name}/", **weights))
        return member.finished(last, tested, self._settings[index].values)

    def _kept(self, index: int) -> TrainState:
        """Returns a copy of the state of a member, with its own optimizer."""
        state = state_in(self._members.kept(index))
        if not self._traced.names:
            return state
        return state.replace(tx=self._traced.own(self._settings[index]))

    def _line(self, epoch: int, plan: Plan) -> str:
        """Returns a line about an epoch."""
        name = self._trainer.monitor.name
        found = [member.last_metrics.get(name) for member in self._all if member.is_running]
        values = [f"{value:.4g}" for value in found if value is not None]
        ended = len(self._all) - len(self._running)
        rest = f"; {ended} ended" if ended else ""
        return f"epoch {epoch}/{plan.last_epoch}  {name} {' '.join(values)}{rest}"
