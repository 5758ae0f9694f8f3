"""Finds out which values cannot be traced, by tracing the programs of a member with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
from jax.errors import ConcretizationTypeError, TracerArrayConversionError
from jax.extend.core import Literal

import distaff
from distaff.step.independence.walk import called
from distaff.trainer.trials import PreparedRun
from distaff.tune.population.paths import KNOWN
from distaff.tune.population.settings import Setting
from distaff.tune.population.varied import TracedValues, Varied

_LIBRARIES = tuple(str(Path(each.__file__ or "").parent) for each in (jax, flax, distaff))


def untraceable(
    prepared: PreparedRun, settings: Sequence[Setting], paths: Sequence[str]
) -> dict[str, str]:
    """Returns the paths whose values must be static, each with the reason.

    A value must be static if a program of a member cannot be traced with it, or if the initial
    weights depend on it: they are made by one program for all members.

    Args:
        prepared: the prepared run of the first member.
        settings: the members.
        paths: the paths of the values by which the members differ.
    """
    tried = [path for path in paths if path not in KNOWN]
    if not tried or not _reason(prepared, settings[0], tried):
        return {}
    reasons = {path: _reason(prepared, settings[0], [path]) for path in tried}
    alone = {path: reason for path, reason in reasons.items() if reason}
    return alone or dict.fromkeys(tried, "the program cannot be traced with all of them")


def _reason(prepared: PreparedRun, setting: Setting, paths: Sequence[str]) -> str:
    """Returns why a member cannot be traced with these values; empty if it can."""
    traced = TracedValues(prepared, paths)
    try:
        _trace_steps(prepared, traced, setting)
        is_initial = traced.is_seen and _changes_weights(prepared, traced, setting)
    except Exception as error:  # a static value then gives the error of a run, if it has one
        is_number = isinstance(error, ConcretizationTypeError | TracerArrayConversionError)
        what = "it decides in Python" if is_number else f"{type(error).__name__} in a trace with it"
        return what + _place(error)
    return "the initial weights depend on it" if is_initial else ""


def _trace_steps(prepared: PreparedRun, traced: TracedValues, setting: Setting) -> None:
    """Traces a step of training, and one of evaluation for each loader.

    Raises:
        TypeError: the step returns a state of other types.
    """
    here, values = prepared.workspace, traced.values(setting)
    member, batch = Varied(values, here.ready_state()), here.example_batch
    after, _ = jax.eval_shape(traced.step(), member, batch)
    if jax.tree.map(_type, after.state) != jax.tree.map(_type, member.state):
        raise TypeError("the step returns a state of other types")
    step = traced.eval_step()
    outputs = getattr(step, "outputs", step)
    member = Varied(values, here.evaluation_state())
    for name, batch in prepared.preparation.first_batches.items():
        if name != "train":
            jax.eval_shape(outputs, member, batch)


def _type(leaf: Any) -> Any:
    return leaf.shape, leaf.dtype


def _changes_weights(prepared: PreparedRun, traced: TracedValues, setting: Setting) -> bool:
    """Returns whether the initial weights depend on one of the values."""
    trainer, values = prepared.trainer, traced.values(setting)

    def init(values: Any, key: jax.Array, batch: Any) -> Any:
        with traced.installed(values):
            return trainer.run_model_init(batch, key)

    program = jax.make_jaxpr(init)(values, jax.random.key(0), prepared.workspace.example_batch)
    is_needed = _needed(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return any(is_needed[: len(jax.tree.leaves(values))])


def _needed(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """Returns which inputs of a program its wanted outputs depend on.

    A loop counts as one operation, whose outputs depend on all of its inputs.
    """
    needed = {id(x) for x, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted}
    for equation in reversed(jaxpr.eqns):
        outputs = [id(x) in needed for x in equation.outvars]
        if not any(outputs) and not equation.effects:
            continue
        inner = called(equation)
        fits = inner is not None and len(inner.jaxpr.outvars) == len(outputs)
        inputs = _needed(inner.jaxpr, outputs) if fits else [True] * len(equation.invars)
        pairs = zip(equation.invars, inputs, strict=True)
        needed |= {id(x) for x, is_used in pairs if is_used and not isinstance(x, Literal)}
    return [id(x) in needed for x in jaxpr.invars]


def _place(error: BaseException) -> str:
    """Returns the line of the user's code in which an error was raised; empty without one."""
    found, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if path.endswith(".py") and not path.startswith(_LIBRARIES):
            found = f" ({Path(path).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found
