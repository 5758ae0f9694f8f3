"""Members whose programs take some of their values as arguments, and the steps of such members."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from distaff.core.typing import Batch, PyTree
from distaff.execution.feed.chunk import Chunk
from distaff.metrics import Metric
from distaff.models import as_model
from distaff.models.linen_modes import drop_at_traced_rate
from distaff.optim import OptimizerConfig, build_optimizer
from distaff.optim.precision import for_precision
from distaff.run.evaluation import Evaluator, MayPad
from distaff.step.averages import averaging_rest, with_epoch
from distaff.step.guard import guarded
from distaff.step.logged_rates import reporting
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState
from distaff.step.step import EvalStep
from distaff.trainer.initial import trained_model
from distaff.trainer.preparation import function_of
from distaff.trainer.trials import PreparedRun
from distaff.tune.population.paths import MODEL, OPTIMIZER, OPTIONS, value_of
from distaff.tune.population.settings import Setting

_FRESH_TRACE = jax.make_user_context(0)
_NUMBERS = itertools.count(1)
"""A new number forces new traces of jitted functions, which may hold a value of another trace."""


class Varied(NamedTuple):
    """A member whose program takes values as arguments.

    Attributes:
        values: the values by path, each a float32 `[]` or a tuple of them. They are weakly typed,
            so that they promote other numbers as a Python float does.
        state: its state, which is the only one of its members that changes.
    """

    values: Mapping[str, Any]
    state: TrainState


def state_in(member: Any) -> TrainState:
    """Returns the state of a member, which may be a `Varied`."""
    return member.state if isinstance(member, Varied) else member


def with_arrays(member: Any, arrays: Mapping[str, PyTree]) -> Any:
    """Returns a member, which may be a `Varied`, whose state has other arrays."""
    state = state_in(member).replace(**arrays)
    return member._replace(state=state) if isinstance(member, Varied) else state


class TracedValues:
    """Makes the steps of members that differ in traced values.

    While a step is traced, the config and the model of the trainer hold the traced numbers, and the
    optimizer is built from them.

    Args:
        prepared: the prepared run of the first member.
        paths: the paths of the values; none for members that differ in their seeds only.
    """

    def __init__(self, prepared: PreparedRun, paths: Sequence[str]) -> None:
        self._here, self._options = prepared.workspace, prepared.trainer.config
        self._prepared, self._trainer, self.paths = prepared, prepared.trainer, paths
        self._of_optimizer = [path for path in paths if path.startswith(OPTIMIZER)]
        self._of_model = [path for path in paths if path.startswith(MODEL)]
        self._others = [p for p in paths if p not in (*self._of_optimizer, *self._of_model)]
        self.is_seen = len(self._of_optimizer) < len(paths)
        self._tx, self._apply_fn = self._here.ready_state().tx, self._here.ready_state().apply_fn
        self._config: Any = self._trainer.optimizer
        self._evaluator = None
        if self.is_seen:
            evaluator = Evaluator(
                self.eval_step(), self._here.execution, self._here.evaluation_watch
            )
            self._evaluator = _OfMember(evaluator)

    def values(self, setting: Setting) -> dict[str, Any]:
        """Returns the values of a member as arrays, by path."""
        found = {path: value_of(setting.trainer, path) for path in self.paths}
        return jax.tree.map(lambda number: jnp.asarray(float(number)), found)

    def carried(self, state: TrainState, setting: Setting) -> Varied:
        """Returns a member before its first step."""
        values = self.values(setting)
        if not self._of_optimizer:
            return Varied(values, state)

        def init(values: Mapping[str, Any], params: PyTree) -> PyTree:
            return self._optimizer(values).init(params)

        opt_state = self._here.execution.once(init)(values, state.params)
        return Varied(values, state.replace(opt_state=opt_state))

    def step(self) -> StepFn:
        """Returns the training step of a `Varied`."""
        inner: Any = guarded(reporting(self._here.plain_step), self._options)

        def varied_step(member: Any, batch: Batch) -> Any:
            with self.installed(member.values):
                after, metrics = inner(self._state(member), batch)
            return self._carried(member, after), metrics

        return varied_step

    def eval_step(self) -> Any:
        """Returns the evaluation step of a `Varied`."""
        step = function_of(self._trainer.eval_step)
        if isinstance(step, EvalStep):
            return _VariedEvalStep(self, step)
        return lambda member, batch: self.of_state(step, member, batch)

    def of_state(self, function: Callable[..., Any], member: Varied, *args: Any) -> Any:
        """Calls a function of a state, within which the values of a member are traced."""
        with self.installed(member.values):
            return function(self._state(member), *args)

    def rest(self, member: Varied) -> Varied:
        """Applies the gradients that are left at the end of an epoch."""
        return self._carried(member, averaging_rest(self._options)(self._state(member)))

    def averaged(self, member: Varied) -> Varied:
        """Adds the weights at the end of an epoch to their average."""
        return member._replace(state=with_epoch(member.state))

    def own(self, state: TrainState, setting: Setting) -> TrainState:
        """Returns the state of a member with its own optimizer and forward pass."""
        if not self.paths:
            return state
        found = {path: value_of(setting.trainer, path) for path in self.paths}
        model = setting.trainer.model if self._of_model else self._trainer.model
        apply_fn = (
            trained_model(model, self._options).apply_fn if self._of_model else self._apply_fn
        )
        return state.replace(tx=self._optimizer(found), apply_fn=apply_fn)

    def take_on(self, state: TrainState, setting: Setting, *, step: int, epoch: int) -> None:
        """Gives the trainer the state of a member and its values, to evaluate it."""
        # Its own optimizer and forward pass would compile again.
        state = state.replace(tx=self._tx, apply_fn=self._apply_fn)
        self._prepared.take_on(state, step=step, epoch=epoch, seed=setting.seed)
        if self._evaluator is not None:
            self._evaluator.values = self.values(setting)
            self._here.evaluator = self._evaluator  # ty: ignore[invalid-assignment]
            found = {path: value_of(setting.trainer, path) for path in self.paths}
            vars(self._trainer).update(self._with(found))

    @contextmanager
    def installed(self, values: Mapping[str, Any]) -> Generator[None]:
        """Within the block, the config and the model of the trainer hold traced values."""
        if not self.is_seen:
            yield
            return
        before = {name: vars(self._trainer)[name] for name in ("config", "model")}
        with ExitStack() as stack:
            stack.enter_context(_FRESH_TRACE(next(_NUMBERS)))
            stack.enter_context(nn.intercept_methods(drop_at_traced_rate))
            stack.callback(vars(self._trainer).update, before)
            vars(self._trainer).update(self._with(values))
            yield

    def _with(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config and the model of the trainer with values by path."""
        config, model = copy.copy(self._trainer.config), self._trainer.model
        for path in self._others:
            object.__setattr__(config, path, values[path])
        if self._of_model:
            fields = {path.removeprefix(MODEL): values[path] for path in self._of_model}
            model = as_model(model.module.clone(**fields))
        return {"config": config, "model": model}

    def _state(self, member: Varied) -> TrainState:
        """Returns the state of a member, within `installed`."""
        state = member.state
        if self._of_optimizer:
            state = state.replace(tx=self._optimizer(member.values))
        if self._of_model:
            model = trained_model(self._trainer.model, self._options)
            state = state.replace(apply_fn=model.apply_fn)
        return state

    def _carried(self, member: Varied, after: TrainState) -> Varied:
        state = member.state
        return member._replace(state=after.replace(tx=state.tx, apply_fn=state.apply_fn))

    def _optimizer(self, values: Mapping[str, Any]) -> optax.GradientTransformation:
        if not self._of_optimizer:
            assert self._tx is not None
            return self._tx
        own = {path.removeprefix(OPTIMIZER): values[path] for path in self._of_optimizer}
        options = {n.removeprefix(OPTIONS): x for n, x in own.items() if n.startswith(OPTIONS)}
        fields = {name: x for name, x in own.items() if not name.startswith(OPTIONS)}
        old: OptimizerConfig = self._config
        config = dataclasses.replace(old, **fields, options={**old.options, **options})
        total = self._prepared.total_steps
        built = build_optimizer(config, total, steps_per_epoch=self._here.steps_per_epoch)
        return for_precision(built.tx, self._options.precision)


class _VariedEvalStep(EvalStep):
    """An `EvalStep` of a `Varied`."""

    def __init__(self, traced: TracedValues, step: EvalStep) -> None:
        self._traced, self._step = traced, step

    def outputs(self, state: Any, batch: Batch) -> dict[str, Any]:
        """Returns the loss and the metrics of a batch, before reduction."""
        return self._traced.of_state(self._step.outputs, state, batch)


class _OfMember:
    """Evaluates states with the values of a member, in the place of an `Evaluator`."""

    values: Mapping[str, Any]

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __call__(self, state: TrainState, chunks: Iterable[Chunk]) -> dict[str, Metric]:
        """Returns the metrics over all examples, on the host."""
        member: Any = Varied(self.values, state)
        return self._evaluator(member, chunks)

    def may_pad(self, state: TrainState) -> MayPad:
        """Returns a function that decides which batches to pad."""
        member: Any = Varied(self.values, state)
        return self._evaluator.may_pad(member)
