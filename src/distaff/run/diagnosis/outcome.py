"""Everything that a step computes, by name, with what is not finite in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax

from distaff.core.typing import Batch, Params, PyTree
from distaff.errors import leaf_name
from distaff.optim.transforms.extra_args import with_known_args
from distaff.step.finite import new_bad
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState


class Outcome:
    """The outputs of a step: `gradients/0/tx/...`, `metrics/...` and `state/...`.

    Gradients are the inputs of the state's optimizers, in the order of their calls, by the name of
    the optimizer in the state. Calls within a loop or an inner program are not recorded.

    Args:
        step: a pure `(state, batch) -> (state, metrics)`.
        state: the state before the step. It is not donated.
        batch: the batch of the step.
        spies: whether to record gradients, which some steps do not allow.

    Attributes:
        names: names of all outputs.
        bad: names of outputs that are not finite, unless they were so before the step.
    """

    def __init__(
        self, step: StepFn, state: TrainState, batch: Batch, *, spies: bool = True
    ) -> None:
        self._step, self._spies = without_donation(step), spies
        self.names: list[str] = []
        flags = np.asarray(runnable(self._flags, state, batch)(state, batch))
        self.bad = [name for name, flag in zip(self.names, flags, strict=True) if flag]

    def recompute(self, names: Iterable[str], state: TrainState, batch: Batch) -> list[Any]:
        """Computes the outputs of these names again."""
        outputs = named(self._run(state, batch))
        return [outputs[name] for name in names]

    def all_of(self, kind: str) -> list[str]:
        """Returns the names that start with `kind`, such as `"metrics/loss"`."""
        return [name for name in self.names if f"{name}/".startswith(f"{kind}/")]

    def bad_of(self, kind: str) -> list[str]:
        """Returns the bad ones among `all_of(kind)`."""
        return [name for name in self.bad if f"{name}/".startswith(f"{kind}/")]

    def first_bad(self) -> list[str]:
        """Returns what became bad first: the loss, a gradient or the new state; empty if none did.

        A bad gradient does not count if the loss and the new state are good.
        """
        loss, state = self.bad_of("metrics/loss"), self.bad_of("state")
        if loss or not state:
            return loss
        gradients = self.bad_of("gradients")
        return self.bad_of(call(gradients[0])) if gradients else state

    def _flags(self, state: TrainState, batch: Batch) -> jax.Array:
        before, after = named({"state": state}), named(self._run(state, batch))
        self.names = list(after)  # known after tracing
        return jnp.stack(
            [
                new_bad(before[name], leaf) if name in before else is_bad(leaf)
                for name, leaf in after.items()
            ]
        )

    def _run(self, state: TrainState, batch: Batch) -> PyTree:
        gradients: list[dict[str, Params]] = []
        after, metrics = self._step(_spied(state, gradients) if self._spies else state, batch)
        return {"gradients": gradients, "metrics": metrics, "state": after}


def outcome_of(step: StepFn, state: TrainState, batch: Batch) -> Outcome:
    """Runs a step, recording its gradients if possible."""
    if isinstance(step, jax.stages.Wrapped):  # gradients inside a program cannot be recorded
        step = getattr(step, "__wrapped__", step)
    try:
        return Outcome(step, state, batch)
    except Exception:
        return Outcome(step, state, batch, spies=False)


def call(gradient: str) -> str:
    """Returns the prefix of one optimizer call's gradients, such as `gradients/0/tx`."""
    return "/".join(gradient.split("/")[:3])


def named(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def is_bad(tree: PyTree) -> jax.Array:
    """Returns whether a float in a tree of arrays is NaN or infinite: bool `[]`."""
    return new_bad(jax.tree.map(jnp.zeros_like, tree), tree)


def runnable(function: Callable[..., Any], state: TrainState, batch: Batch) -> Callable[..., Any]:
    """Returns a function of state and batch as a program, or unchanged if it cannot be traced."""
    program = jax.jit(function)
    try:
        jax.eval_shape(program, state, batch)
    except Exception:  # It reads values, for example for debugging.
        return function
    return program


def without_donation(step: StepFn) -> StepFn:
    """Returns a step that copies its state first, in case its program donates it."""
    return lambda state, batch: step(jax.tree.map(jnp.copy, state), batch)


def _spied(state: TrainState, gradients: list[dict[str, Params]]) -> TrainState:
    """Returns a state whose optimizers record their inputs."""
    trace = jex.get_opaque_trace_state()

    def spy(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
        inner = with_known_args(tx)

        def update(updates: Params, *args: Any, **kwargs: Any) -> tuple[Params, PyTree]:
            # A tracer of a loop or an inner program cannot be returned from here.
            if jex.get_opaque_trace_state() == trace:
                gradients.append({name: updates})
            return inner.update(updates, *args, **kwargs)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    members = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    kinds = optax.GradientTransformation | optax.MultiSteps
    spies = {name: spy(name, each) for name, each in members.items() if isinstance(each, kinds)}
    return dataclasses.replace(state, **spies)
