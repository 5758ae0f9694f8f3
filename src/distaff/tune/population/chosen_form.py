"""Chooses the form of a population, by rule or by measurement, and makes its members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from distaff.data import first_batch, num_shapes
from distaff.execution import compile_cache
from distaff.execution.compile.measured_choices import Entry, program_key
from distaff.execution.dispatch.calibration import calibrate, timer
from distaff.execution.dispatch.dispatcher import Dispatcher, make_dispatcher
from distaff.execution.dispatch.packed_metrics import MetricLayout
from distaff.execution.dispatch.steps_per_call import Expected
from distaff.execution.dispatch.work import work_of
from distaff.step.normalise import StepFn
from distaff.trainer.trials import PreparedRun
from distaff.tune.population.forms import (
    Members,
    MembersInTurn,
    StackedMembers,
    stack,
    stacked,
)

_FORMS = ("stacked", "in turn")

_NUM_TIMES = 3
"""Times per form; other load on a machine only makes steps slower, so the minimum counts."""


_FEW = 16
"""Members from which the stacked form gains on a CPU: 8 MLPs on digits took 1.6 times as long
stacked as in turn, and 32 half as long."""


def choose_form(prepared: PreparedRun, num_members: int) -> str:
    """Returns the form that suits a step: "stacked" or "in turn".

    On a CPU, few members are slower when they are stacked; convolutions always are.
    """
    here = prepared.workspace
    if here.own_step is not None or prepared.run.dispatcher.checks:
        return "in turn"
    if jax.default_backend() != "cpu":
        return "stacked"
    example = here.ready_state(), here.example_batch
    is_slower = (
        num_members < _FEW or work_of(jax.make_jaxpr(here.measured_step)(*example)).convolves
    )
    return "in turn" if is_slower else "stacked"


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


def fastest(
    prepared: PreparedRun, states: Sequence[Any], step: StepFn | None
) -> tuple[Members, MetricLayout, str]:
    """Times both forms on the first batch, and returns the members in the faster one.

    The choice is remembered on this machine, by the program of a step and the number of members.

    Args:
        prepared: see `make_members`.
        states: see `make_members`.
        step: see `make_members`.

    Returns:
        The members, the layout of a member's metrics, and a line on the choice.
    """
    here, own_step, plan = prepared.workspace, step, prepared.run.plan
    if here.own_step is not None or prepared.run.dispatcher.checks:
        return *make_members(prepared, states, "in turn", step), ""
    program = here.measured_step if own_step is None else own_step
    jaxpr = jax.make_jaxpr(program)(states[0], here.example_batch)
    home = compile_cache.home() if prepared.trainer.config.tune_process else None
    file = None if home is None else home / "populations.json"
    entry = Entry(file, program_key(jaxpr, len(states)))
    known = entry.read()
    if known in _FORMS:
        return *make_members(prepared, states, known, step), f"form: {known!r}, remembered"
    batch = first_batch(plan.train_loader, name="train")
    feed = here.feeds.of(plan.train_loader, name="train")
    made = {form: make_members(prepared, states, form, step) for form in _FORMS}
    seconds = {}
    for form, (members, _) in made.items():
        timed = timer(members.dispatcher, members.example(), feed, batch)
        seconds[form] = min(timed(members.dispatcher.chunk_size()) for _ in range(_NUM_TIMES))
    seconds["in turn"] *= len(states)
    form = min(_FORMS, key=lambda each: seconds[each])
    entry.write(form)
    here.capacity = made[form][0].dispatcher.forms.capacity
    times = ", ".join(f"{1e3 * seconds[each]:.3g} ms {each}" for each in _FORMS)
    return *made[form], f"form: {form!r}, measured ({times} per step of all members)"
