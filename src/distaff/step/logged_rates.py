"""Logged learning rates and loss scales: computed on the host, or returned by the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from distaff.core.typing import Batch, Schedule
from distaff.metrics import Last, Metric, Sum
from distaff.metrics.accumulators import pytree
from distaff.optim import applied_rates, make_rates
from distaff.optim.rates import RATE
from distaff.optim.transforms.extra_args import Described
from distaff.optim.transforms.loss_scale import scales
from distaff.step.normalise import StepFn
from distaff.step.state import TrainState

Rates = Callable[[int], dict[str, float]]
"""Maps the number of completed updates to the learning rates of the next one, by name."""


@pytree
class Rate(Last):
    """The learning rate of a step's update; logged with the step, not with the epoch."""


def reporting(step: StepFn) -> StepFn:
    """Wraps a step of `measured` so that it also returns the learning rates in its state.

    With a loss scale it also returns `loss_scale`, and `skipped_updates`, which an epoch adds up. A
    metric of the step wins over one of the same name.
    """

    def reporting_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        after, metrics = step(state, batch)
        rates = applied_rates(after.opt_state)
        own: dict[str, Metric] = {n: Rate(rate, jnp.int32(1)) for n, rate in rates.items()}
        for before, now in zip(scales(state.opt_state), scales(after.opt_state), strict=True):
            skipped = now.num_skipped - before.num_skipped
            own["loss_scale"] = Last(before.scale, jnp.int32(1))
            own["skipped_updates"] = Sum(skipped.astype(jnp.float32))
        return after, {**own, **metrics}

    return reporting_step


def without_rates(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns metrics without the learning rates among them."""
    return {name: metric for name, metric in metrics.items() if not isinstance(metric, Rate)}


def host_rates(tx: Any, params: Any, schedule: Schedule | None) -> Rates | None:
    """Returns a function that computes the learning rates on the host; None if they are unknown.

    Args:
        tx: the optimizer of the run.
        params: the parameters, or their shapes.
        schedule: the schedule of an optimizer that does not describe its rates.
    """
    schedules: Mapping[str, Schedule] = {}
    if not isinstance(tx, Described):
        schedules = {} if schedule is None else {RATE: schedule}
    elif tx.rates is not None:
        schedules = tx.rates(params)
    if not schedules:
        return None
    names = list(schedules)
    if len(names) == 1:
        only = make_rates(schedules[names[0]])
        return lambda step: {names[0]: only(step)}
    together = make_rates(
        lambda step: jnp.stack([jnp.asarray(schedules[n](step), jnp.float32) for n in names])
    )
    return lambda step: dict(zip(names, map(float, together(step)), strict=True))
