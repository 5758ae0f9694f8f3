"""Evaluates the members of a population, in one program if they are stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import distaff.metrics as metrics_lib
from distaff.core.typing import Batch
from distaff.metrics import Metric
from distaff.optim import evaluation_params, has_evaluation_params
from distaff.run.evaluation import Evaluator, MayPad
from distaff.run.sanity import check_metrics, check_values
from distaff.step.averages import RAW, averaged, find
from distaff.step.state import TrainState
from distaff.trainer.module import TrainerModule
from distaff.trainer.preparation import StepProgram
from distaff.trainer.trials import PreparedRun
from distaff.tune.population.forms import Members, StackedMembers
from distaff.tune.population.member import RunningMember
from distaff.tune.population.varied import TracedValues, Varied

_ALL = "members"


class MemberEvaluation:
    """Evaluates members: in one program if they are stacked, otherwise one after the other.

    The program needs a trainer that evaluates by its step alone. An own `eval_model`, or an
    evaluation step that the user's class compiled itself, is called for each member.

    Args:
        prepared: the prepared run of one member.
        states: the states of the members.
        traced: the values by which they differ.
        take_on: gives the trainer the state of the member with an index.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        states: Members,
        traced: TracedValues,
        take_on: Callable[[int, TrainState], None],
    ) -> None:
        self._trainer, self._states, self._take_on = prepared.trainer, states, take_on
        is_own = type(self._trainer).eval_model is not TrainerModule.eval_model
        by_step = isinstance(self._trainer.eval_step, StepProgram) and not is_own
        self._together = None
        if by_step and isinstance(states, StackedMembers):
            self._together = _EvaluatesTogether(prepared, states, traced)

    def __call__(
        self,
        members: Mapping[int, RunningMember],
        loaders: Mapping[str, Any],
        *,
        kept: bool = False,
    ) -> dict[int, dict[str, Any]]:
        """Returns the metrics of members on loaders, by index.

        Args:
            members: the members by index.
            loaders: the loaders by name.
            kept: whether to evaluate the states that were kept, rather than the present ones.
        """
        found: dict[int, dict[str, Any]] = {index: {} for index in members}
        for name, loader in loaders.items() if members else ():
            for prefix, weights in self._trainer.config.evaluations(name):
                evaluated = self._evaluated(members, kept, loader, f"{prefix}/", weights)
                for index, metrics in evaluated.items():
                    check_metrics(metrics, "eval_model")
                    found[index].update(metrics)
        return found

    def _evaluated(
        self,
        members: Mapping[int, RunningMember],
        kept: bool,
        loader: Any,
        prefix: str,
        weights: Mapping[str, str],
    ) -> dict[int, dict[str, Any]]:
        """Returns the metrics of members on one loader."""
        states, found = self._states, {}
        if self._together is not None and isinstance(states, StackedMembers):
            of_all = states.best if kept else states.states
            return self._together(of_all, list(members), loader, prefix, **weights)
        for index in members:
            self._take_on(index, states.kept(index) if kept else states.state(index))
            found[index] = self._trainer.eval_model(loader, prefix, **weights)
        return found


class _EvaluatesTogether:
    """Evaluates the states of all members at once, each array `[members, ...]`.

    The host merges the metrics of each member apart, like a run does.

    Args:
        prepared: the prepared run of one member.
        members: the members.
        traced: the values by which they differ.
    """

    def __init__(
        self, prepared: PreparedRun, members: StackedMembers, traced: TracedValues
    ) -> None:
        self._trainer, self._here = prepared.trainer, prepared.workspace
        self._members, self._traced = members, traced
        step, execution = prepared.trainer.eval_step.function, self._here.execution
        if traced.is_seen:
            step = traced.eval_step()
        self._evaluator = _StackedEvaluator(step, execution, self._here.evaluation_watch)
        self._programs: dict[str, Any] = {}

    def __call__(
        self,
        states: TrainState,
        which: Sequence[int],
        loader: Any,
        prefix: str,
        weights: str = RAW,
    ) -> dict[int, dict[str, Any]]:
        """Returns the metrics of some of the members, by index.

        Args:
            states: the states of all members.
            which: indices of the members whose metrics are read.
            loader: the data.
            prefix: see `TrainerModule.eval_model`.
            weights: "raw", or the name of an average.
        """
        here = self._here
        with here.timers.spent("evaluation"):
            name = here.loader_name(prefix)
            shown = self._with_values(self._shown(states, weights))
            may_pad = self._evaluator.may_pad(shown)
            with here.chunks(loader, name, may_pad, self._trainer.tracker) as chunks:
                found: Any = self._evaluator(shown, chunks)[_ALL]
            members = found.split()
            for index in which:
                check_values(members[index], name, here.warned, self._trainer.config)
            return {index: metrics_lib.compute(members[index], prefix) for index in which}

    def _with_values(self, states: TrainState) -> Any:
        """Returns the states with the values of the members, if a step of evaluation sees them."""
        members: Any = self._members.example()
        return Varied(members.values, states) if self._traced.is_seen else states

    def _shown(self, states: TrainState, weights: str) -> TrainState:
        """Returns the states with the parameters to evaluate; see `Workspace.evaluation_state`."""
        if weights == RAW and not has_evaluation_params(states.opt_state):
            return states
        if weights not in self._programs:
            of_one = (
                _evaluated
                if weights == RAW
                else lambda state: averaged(find(state, weights), state)
            )
            self._programs[weights] = self._here.execution.program(jax.vmap(of_one))
        return self._programs[weights](states)


def _evaluated(state: TrainState) -> TrainState:
    return state.replace(params=evaluation_params(state.opt_state, state.params))


class _StackedEvaluator(Evaluator):
    """An evaluator whose states are stacked, and whose metrics are one `_EachMember`."""

    def metrics_of(self, state: TrainState, batch: Batch, mask: jax.Array | None) -> dict[str, Any]:
        """Returns the metrics of one batch for all members."""
        of_one = super().metrics_of
        metrics = jax.vmap(lambda each: of_one(each, batch, mask))(state)
        return {_ALL: _EachMember(metrics)}

    def may_pad(self, state: TrainState) -> MayPad:
        """Returns a function that decides which batches to pad, as for one member."""
        return super().may_pad(jax.tree.map(_member, state))


def _member(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    is_weak = getattr(leaf, "weak_type", False)  # keys have none
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, weak_type=is_weak)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _EachMember:
    """The metrics of all members, each array `[members, ...]`. It is merged as a metric is."""

    metrics: Mapping[str, Metric]

    def split(self) -> list[dict[str, Metric]]:
        """Returns the metrics of each member."""
        leaves, structure = jax.tree.flatten(self.metrics)
        return [structure.unflatten(each) for each in zip(*leaves, strict=True)]

    def merge(self, other: _EachMember) -> _EachMember:
        """Returns the metrics over the examples of both."""
        pairs = zip(self.split(), other.split(), strict=True)
        return _joined(metrics_lib.merge(*pair) for pair in pairs)

    def over_rows(self) -> _EachMember:
        """Merges the rows of metrics whose arrays are `[rows, members, ...]`."""
        turned = jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), self)
        return _joined(metrics_lib.merge_rows(each) for each in turned.split())


def _joined(members: Any) -> _EachMember:
    return _EachMember(jax.tree.map(lambda *leaves: np.stack(leaves), *members))
