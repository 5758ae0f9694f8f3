"""Trains the members of a population side by side, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from distaff.callbacks import EarlyStopping
from distaff.callbacks.callbacks import Callbacks
from distaff.core.typing import PyTree
from distaff.errors import ConfigError
from distaff.execution.dispatch.packed_metrics import MetricLayout, MetricWindows
from distaff.execution.dispatch.steps_per_call import continued
from distaff.execution.placement import num_devices
from distaff.run.events import Plan
from distaff.run.sanity import report_breach
from distaff.step.averages import is_averaged
from distaff.step.normalise import StepFn
from distaff.step.remainder import may_have_rest
from distaff.step.state import TrainState
from distaff.trainer.trials import PreparedRun
from distaff.tune.population.chosen_form import choose_form, fastest, make_members
from distaff.tune.population.evaluation import MemberEvaluation
from distaff.tune.population.forms import Members
from distaff.tune.population.member import RunningMember, TrainedMember
from distaff.tune.population.settings import Setting
from distaff.tune.population.varied import TracedValues, state_in


def _made(
    prepared: PreparedRun, states: Sequence[Any], form: str, step: StepFn | None
) -> tuple[Members, MetricLayout, str]:
    """Returns the members, the layout of a member's metrics, and a line on a measured form."""
    if form == "measured":
        return fastest(prepared, states, step)
    form = choose_form(prepared, len(states)) if form == "auto" else form
    return *make_members(prepared, states, form, step), ""


class BetweenEpochs(Protocol):
    """What happens to the members between two epochs, before they are saved."""

    def record(self) -> dict[str, Any]:
        """Returns what must be equal to resume, as strict JSON."""
        ...

    def facts(self) -> dict[str, Any]:
        """Returns what a resume needs, as strict JSON."""
        ...

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Restores what `facts` has returned."""
        ...

    def __call__(self, epoch: int) -> None:
        """Changes the members after an epoch that is not the last one."""
        ...


class PopulationRun:
    """Trains the members of a population, and validates each after an epoch.

    Args:
        prepared: the prepared run of one member.
        settings: the settings of the members, which differ in nothing that is static.
        form: the form of the members, "auto" to choose it by rule, or "measured".
        traced: the values by which the members differ, which are arguments of their program.

    Attributes:
        form: the form of the members.
        remark: a line on how the form was measured; empty otherwise.
        members: what the members have recorded.
        settings: the settings of the members.
        step: completed steps.
        epoch: completed epochs.
        between: what happens between two epochs; None for nothing.
    """

    between: BetweenEpochs | None = None

    def __init__(
        self, prepared: PreparedRun, settings: Sequence[Setting], form: str, traced: TracedValues
    ) -> None:
        self._prepared, self._trainer, self._run = prepared, prepared.trainer, prepared.run
        self._here, self._options = prepared.workspace, prepared.trainer.config
        self._check()
        self._rest, self._averaged, step = self._here.with_rest, self._here.with_epoch, None
        self._traced = traced
        if traced.paths:
            self._rest, self._averaged, step = traced.rest, traced.averaged, traced.step()
        self._set(settings)
        states = self._new_states()
        self._has_rest = may_have_rest(state_in(states[0]))
        self._states, self._layout, self.remark = _made(prepared, states, form, step)
        self.form = self._states.form
        self._evaluate = MemberEvaluation(prepared, self._states, traced, self._take_on)

    def again(self, settings: Sequence[Setting]) -> None:
        """Begins again with other members, which the programs compiled so far train.

        Args:
            settings: the settings of the members, with the static values of the first ones. If the
                members are stacked, there are no more than at first.
        """
        self._set(settings)
        self._states.replace(self._new_states())

    @property
    def num_programs(self) -> int:
        """The number of compiled programs that train or evaluate the members."""
        watches = self._states.dispatcher.watch, self._here.evaluation_watch
        return sum(watch.num_compiles for watch in watches)

    def _set(self, settings: Sequence[Setting]) -> None:
        """Begins the records of the members."""
        self.settings, self.step, self.epoch = settings, 0, 0
        callbacks = settings[0].trainer.callbacks.callbacks
        followed = Callbacks([x for x in callbacks if isinstance(x, EarlyStopping)])
        self.members = [
            RunningMember(each.seed, self._trainer.monitor, followed, self._options)
            for each in settings
        ]
        for member in self.members:
            member.notify("on_training_start", {})

    def _new_states(self) -> list[Any]:
        """Returns the states of the members before their first step."""
        states: list[Any] = [self._prepared.state_of(each.seed) for each in self.settings]
        if not self._traced.paths:
            return states
        pairs = zip(states, self.settings, strict=True)
        return [self._traced.carried(*pair) for pair in pairs]

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
        return [index for index, member in enumerate(self.members) if member.is_running]

    def train(self, show: Callable[[str], None], save: Callable[..., None]) -> None:
        """Trains the members for the epochs that are left.

        Args:
            show: shows a line after each epoch.
            save: called after each epoch; `save(is_last=True)` after the last one.
        """
        plan = self._run.plan
        last = plan.first_epoch + (plan.num_epochs or 0) - 1
        for epoch in range(max(plan.first_epoch, self.epoch + 1), last + 1):
            if not self._running:
                break
            self._train_epoch(epoch)
            self._end_epoch(epoch, plan)
            self.epoch = epoch
            if self.between is not None and epoch < last:
                self.between(epoch)
            show(_line(self.members, self._trainer.monitor.name, epoch, plan))
            save(is_last=epoch == last or not self._running)

    def exchange(self, sources: Sequence[int], settings: Sequence[Setting]) -> None:
        """Continues each member from the state of another, or its own, with other values.

        Args:
            sources: for each member, the index of the one whose state it takes over.
            settings: the new settings of the members, which differ in traced values only.
        """
        self.settings = settings
        self._states.exchange(sources, [self._traced.values(each) for each in settings])
        for index, source in enumerate(sources):
            if source != index:
                self.members[index].revive()

    def tested(self, test_loader: Any) -> tuple[TrainedMember, ...]:
        """Tests the best model of each member, and returns the members after their training.

        Args:
            test_loader: data for the test; None for no test.
        """
        self._keep_rest(range(len(self.members)))
        which = {  # one that diverged before it had a best model is not tested
            index: member
            for index, member in enumerate(self.members)
            if member.best is not None or member.status != "diverged"
        }
        loaders = {} if test_loader is None else {"test": test_loader}
        found = self._evaluate(which, loaders, kept=True)
        return tuple(
            member.finished(self._kept(index), found.get(index, {}), self.settings[index].values)
            for index, member in enumerate(self.members)
        )

    def arrays(self) -> dict[str, PyTree]:
        """Returns the arrays that a resume needs, each `[members, ...]`.

        They are the states of all members as `members`, and as `best` the states to keep. A member
        that has none yet is there with its current state.
        """
        self._states.keep([n for n, each in enumerate(self.members) if not each.has_state])
        return self._states.arrays()

    def facts(self) -> dict[str, Any]:
        """Returns what a resume needs in addition to the arrays, as strict JSON."""
        plan, position = self._run.plan, self._here.feeds.position
        return {
            "step": self.step,
            "epoch": self.epoch,
            "members": [member.to_json() for member in self.members],
            "loader": dict(position(plan.train_loader)),
            "val_loaders": {name: dict(position(x)) for name, x in plan.val_loaders.items()},
            "steps_per_call": self._states.dispatcher.forms.facts(),
            "between": None if self.between is None else self.between.facts(),
        }

    def restore(self, facts: Mapping[str, Any], arrays: Mapping[str, PyTree]) -> None:
        """Restores what `facts` and `arrays` have returned."""
        plan, seek = self._run.plan, self._run.checkpointer.seek
        self.step, self.epoch = int(facts["step"]), int(facts["epoch"])
        self._states.restore(arrays)
        for member, saved in zip(self.members, facts["members"], strict=True):
            member.restore(saved)
        if self.between is not None:
            self.between.restore(facts["between"])
        seek(facts["loader"], plan.train_loader, "train")
        for name, loader in plan.val_loaders.items():
            seek(facts["val_loaders"][name], loader, name)
        dispatcher = self._states.dispatcher
        dispatcher.forms = continued(dispatcher.forms, facts["steps_per_call"])
        self._here.capacity = dispatcher.forms.capacity

    def _train_epoch(self, epoch: int) -> None:
        """Trains all members on the batches of an epoch."""
        plan, members, step = self._run.plan, self._states, self.step
        members.begin_epoch()
        for index in self._running:
            self.members[index].begin_epoch(epoch)
            self.members[index].windows = MetricWindows(self._layout, self._options.log_every, step)
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
                    self._read(index, self.members[index].windows.add(table, step))
                running = self._running
                if not running:
                    break
        for index in running:
            self._read(index, self.members[index].windows.rest())
        self.step = step

    def _read(self, index: int, windows: Any) -> None:
        """Records the windows of a member that are due."""
        for event in windows:
            if event.breach is not None:
                place = f"batch {event.breach.batch + 1} of the train loader"
                report_breach(event.breach, place, "train", self._here.warned, self._options)
            self.members[index].window(event)

    def _end_epoch(self, epoch: int, plan: Plan) -> None:
        """Ends the steps of an epoch, and validates if due."""
        running = self._running
        if self._has_rest:  # apply the gradients accumulated so far
            self._states.apply(self._rest, running)
        if is_averaged(self._options, epoch):
            self._states.apply(self._averaged, running)
        is_due = epoch == plan.last_epoch or plan.val_every.is_due("epochs", epoch)
        metrics = {index: self.members[index].end_steps(self.step) for index in running}
        for index, found in metrics.items():
            self.members[index].notify("on_epoch_end", found)
        due = [n for n in running if is_due or self.members[n].callbacks.stop_reason]
        self._validate(due, metrics)
        for index in running:
            member, stop = self.members[index], self.members[index].callbacks
            if member.is_running:
                member.record(metrics[index])
            if member.is_running and stop.stop_reason:
                member.end(stop.stop_status, stop.stop_reason, self.step)
        self._keep_rest([index for index in running if not self.members[index].is_running])

    def _validate(self, due: Sequence[int], metrics: dict[int, dict[str, Any]]) -> None:
        """Validates members, adds to their metrics, and keeps their states if they are the best."""
        for index in due:
            if not self._states.is_finite(index):
                where = f"by step {self.step} (epoch {self.members[index].epoch})"
                reason = f"a parameter became NaN or infinite {where}"
                self.members[index].end("diverged", reason, self.step)
        running = {n: self.members[n] for n in due if self.members[n].is_running}
        found = self._evaluate(running, self._run.plan.val_loaders)
        is_better = self._trainer.is_new_model_better
        better = [n for n, x in running.items() if x.is_best(metrics[n], found[n], is_better)]
        self._states.keep(better)
        for index in better:
            self.members[index].has_state = True
        for index in running:
            metrics[index] = {**metrics[index], **found[index]}

    def _keep_rest(self, which: Iterable[int]) -> None:
        """Keeps the last states of members of which none is kept yet."""
        rest = [index for index in which if not self.members[index].has_state]
        self._states.keep(rest)
        for index in rest:
            self.members[index].has_state = True

    def _kept(self, index: int) -> TrainState:
        """Returns the state that was kept of a member, with its own optimizer and model."""
        return self._traced.own(self._states.kept(index), self.settings[index])

    def _take_on(self, index: int, state: TrainState) -> None:
        """Gives the trainer the state and the values of a member, to evaluate it."""
        member, setting = self.members[index], self.settings[index]
        self._traced.take_on(state, setting, step=member.step, epoch=member.epoch)


def _line(members: Sequence[RunningMember], name: str, epoch: int, plan: Plan) -> str:
    """Returns a line about an epoch."""
    found = [member.last_metrics.get(name) for member in members if member.is_running]
    values = [f"{value:.4g}" for value in found if value is not None]
    ended = sum(not member.is_running for member in members)
    rest = f"; {ended} ended" if ended else ""
    return f"epoch {epoch}/{plan.last_epoch}  {name} {' '.join(values)}{rest}"
