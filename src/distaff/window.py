"""The window: a step's metrics, merged over steps inside the step's own program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from distaff import metrics as metrics_lib
from distaff.data import num_examples
from distaff.metrics import Metric, PerExample
from distaff.state import TrainState, strongly_typed
from distaff.typing import Batch

StepFn: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Any]]
"""`(state, batch) -> (state, metrics)`, metrics a mapping by name."""


class Window(NamedTuple):
    """Metrics merged on the device over the steps since the last log line.

    Attributes:
        metrics: merged metrics by name.
        first_bad_step: int32, the first step whose loss was not finite; the largest int32 if none.
    """

    metrics: dict[str, Metric]
    first_bad_step: jax.Array


NEVER = int(np.iinfo(np.int32).max)
"""`Window.first_bad_step` of a window in which every loss was finite."""


def measured(step: StepFn) -> StepFn:
    """Wraps a training step so that all its metrics are in their accumulating form.

    Args:
        step: any `(state, batch) -> (state, metrics)`; its metrics may be scalars or arrays
            `[batch, ...]` too.
    """

    def measured_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        state, metrics = step(state, batch)
        return strongly_typed(state), accumulating(metrics, num_examples(batch))

    return measured_step


def accumulating(metrics: Mapping[str, Any], size: int) -> dict[str, Metric]:
    """Brings the metrics that a user's own step returned into their accumulating form.

    Args:
        metrics: scalars, arrays `[batch, ...]` or metrics, by name.
        size: the number of examples in the batch they come from.

    Raises:
        LossError: an array is neither a scalar nor one value per example.
    """
    declared = {name: metrics_lib.declare(name, value, size) for name, value in metrics.items()}
    return reduced(declared, jnp.ones(size, bool))


def windowed(
    step: StepFn,
) -> Callable[[TrainState, Window, Batch], tuple[TrainState, Window, dict[str, Metric]]]:
    """Wraps a measured step so that it merges its metrics into a window, in the same program.

    Args:
        step: a training step as `measured` gives it.

    Returns:
        A pure function `(state, window, batch) -> (state, window, metrics of this step)`.
    """

    def windowed_step(
        state: TrainState, window: Window, batch: Batch
    ) -> tuple[TrainState, Window, dict[str, Metric]]:
        state, metrics = step(state, batch)
        first_bad_step = window.first_bad_step
        if "loss" in metrics:
            finite = jnp.all(jnp.isfinite(metrics["loss"].compute()))
            first_bad_step = jnp.minimum(first_bad_step, jnp.where(finite, NEVER, state.step))
        merged = metrics_lib.merge(window.metrics, metrics)
        return state, Window(merged, first_bad_step), metrics

    return windowed_step


def empty_window(metrics: Mapping[str, Metric]) -> Window:
    """Returns the window before the first step.

    Args:
        metrics: the metrics of one step, or their shapes as `jax.eval_shape` gives them.
    """
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(metrics))
    empty = {name: metric.empty_like() for name, metric in zeros.items()}
    return Window(jax.device_put(empty), jax.device_put(np.asarray(NEVER, np.int32)))


def reduced(metrics: Mapping[str, Metric | PerExample], mask: jax.Array) -> dict[str, Metric]:
    """Reduces values per example over the examples whose `mask` `[batch]` is true.

    Args:
        metrics: values per example, or metrics, which are taken as they are.
        mask: bool `[batch]`.
    """
    reduced = {
        name: value.reduce(mask) if isinstance(value, PerExample) else value
        for name, value in metrics.items()
    }
    # A Python number inside a metric would be weakly typed, and compile the merge twice.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), reduced)
