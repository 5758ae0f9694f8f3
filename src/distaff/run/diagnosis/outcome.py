"""Outcome: all that a step computes, by name, and what of it is not finite."""

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
    """What a step has computed: `gradients/0/tx/...`, `metrics/...` and `state/...`.

    Gradients are what the state's optimizers were given, in the order of their calls, each under
    the name of the state's member. There are none where the optimizers are not called by the step
    itself, but in a loop or a program of its own.

    Args:
        step: a pure `(state, batch) -> (state, metrics)`.
        state: the state before the step. It is not given away.
        batch: the batch of the step.
        spies: whether gradients are looked at; a step may not work with what does that.

    Attributes:
        names: of all that was computed.
        bad: names of what is not finite, and was not so before the step either.
    """

    def __init__(
        self, step: StepFn, state: TrainState, batch: Batch, *, spies: bool = True
    ) -> None:
        self._step, self._spies = kept(step), spies
        self.names: list[str] = []
        flags = np.asarray(runnable(self._flags, state, batch)(state, batch))
        self.bad = [name for name, flag in zip(self.names, flags, strict=True) if flag]

    def again(self, names: Iterable[str], state: TrainState, batch: Batch) -> list[Any]:
        """Computes some of it again."""
        outputs = named(self._run(state, batch))
        return [outputs[name] for name in names]

    def all_of(self, kind: str) -> list[str]:
        """Returns the names that begin with `kind`, such as `"metrics/loss"`."""
        return [name for name in self.names if f"{name}/".startswith(f"{kind}/")]

    def bad_of(self, kind: str) -> list[str]:
        """Returns those of them that are bad."""
        return [name for name in self.bad if f"{name}/".startswith(f"{kind}/")]

    def first_bad(self) -> list[str]:
        """Returns what was bad first, the loss, a gradient or the new state; empty if all is well.

        A bad gradient is none of these as long as loss and new state are well.
        """
        loss, state = self.bad_of("metrics/loss"), self.bad_of("state")
        if loss or not state:
            return loss
        gradients = self.bad_of("gradients")
        return self.bad_of(call(gradients[0])) if gradients else state

    def _flags(self, state: TrainState, batch: Batch) -> jax.Array:
        before, after = named({"state": state}), named(self._run(state, batch))
        self.names = list(after)  # They are known once this is traced.
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
    """Runs a step; its gradients are looked at where that works."""
    if isinstance(step, jax.stages.Wrapped):  # A program of its own would hide its gradients.
        step = getattr(step, "__wrapped__", step)
    try:
        return Outcome(step, state, batch)
    except Exception:
        return Outcome(step, state, batch, spies=False)


def call(gradient: str) -> str:
    """Returns what names the gradients of one call of an optimizer, such as `gradients/0/tx`."""
    return "/".join(gradient.split("/")[:3])


def named(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def is_bad(tree: PyTree) -> jax.Array:
    """Returns whether a float in a tree of arrays is NaN or infinite: bool `[]`."""
    return new_bad(jax.tree.map(jnp.zeros_like, tree), tree)


def runnable(function: Callable[..., Any], state: TrainState, batch: Batch) -> Callable[..., Any]:
    """Returns a function as a program, or as plain Python where JAX cannot trace it.

    Args:
        function: of a state and a batch.
        state: a state like those it will be called with.
        batch: likewise.
    """
    program = jax.jit(function)
    try:
        jax.eval_shape(program, state, batch)
    except Exception:  # It reads values, as a step that is debugged may.
        return function
    return program


def kept(step: StepFn) -> StepFn:
    """Returns a step that gives no state away, as one that is a program of its own may."""
    return lambda state, batch: step(jax.tree.map(jnp.copy, state), batch)


def _spied(state: TrainState, gradients: list[dict[str, Params]]) -> TrainState:
    """Returns a state whose optimizers note what they are given."""
    trace = jex.get_opaque_trace_state()

    def spy(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
        inner = with_known_args(tx)

        def update(updates: Params, *args: Any, **kwargs: Any) -> tuple[Params, PyTree]:
            # What is computed in a loop, or a program of its own, cannot be returned from here.
            if jex.get_opaque_trace_state() == trace:
                gradients.append({name: updates})
            return inner.update(updates, *args, **kwargs)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    members = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    kinds = optax.GradientTransformation | optax.MultiSteps
    spies = {name: spy(name, each) for name, each in members.items() if isinstance(each, kinds)}
    return dataclasses.replace(state, **spies)
