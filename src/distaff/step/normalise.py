"""Normalises the metrics of a step to mergeable accumulators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

import distaff.metrics as metrics_lib
from distaff.core.typing import Batch
from distaff.data import num_examples
from distaff.errors import LossError
from distaff.metrics import Metric, PerExample
from distaff.step.state import TrainState, strongly_typed

StepFn: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Any]]
"""`(state, batch) -> (state, metrics)`, metrics a mapping by name."""


def measured(step: StepFn) -> StepFn:
    """Wraps a training step so that all its metrics are `Metric`s.

    Args:
        step: `(state, batch) -> (state, metrics)`, whose metrics may also be scalars or arrays
            `[batch, ...]`.
    """

    def measured_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        returned = step(state, batch)
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise LossError(
                "A training step returns (state, metrics), with metrics by name; got "
                f"{type(returned).__name__}. Write return state, {{'loss': loss}}."
            )
        state, metrics = returned
        return strongly_typed(state), accumulating(metrics, num_examples(batch))

    return measured_step


def accumulating(metrics: Mapping[str, Any], size: int) -> dict[str, Metric]:
    """Converts the metrics of a custom step to `Metric`s.

    Args:
        metrics: scalars, arrays `[batch, ...]` or metrics, by name.
        size: number of examples in the batch.

    Raises:
        LossError: an array is neither a scalar nor one value per example.
    """
    declared = {name: metrics_lib.declare(name, value, size) for name, value in metrics.items()}
    return reduced(declared, jnp.ones(size, bool))


def reduced(metrics: Mapping[str, Metric | PerExample], mask: jax.Array) -> dict[str, Metric]:
    """Reduces per-example values over the examples where `mask`, bool `[batch]`, is true."""
    reduced = {
        name: value.reduce(mask) if isinstance(value, PerExample) else value
        for name, value in metrics.items()
    }
    # A weakly typed leaf, from a Python number, would compile the merge twice.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), reduced)
