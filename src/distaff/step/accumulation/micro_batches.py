"""A training step that goes through its batch in micro-batches, to need less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from distaff.core.config.options import Options, at_least, option
from distaff.core.equations import named_scope
from distaff.core.typing import Batch, PyTree
from distaff.data import counts_itself, num_examples
from distaff.errors import BatchError, ConfigError
from distaff.metrics import Metric
from distaff.optim.transforms import extra_args
from distaff.optim.transforms.accumulate import collected, collecting, nothing_accumulated
from distaff.step.normalise import StepFn, measured
from distaff.step.norms import Norms
from distaff.step.state import TrainState

_MICRO_BATCH = 0x6D696372


def _micro_batch(name: str, value: Any) -> Any:
    if value is None:
        return None
    if value == "auto":
        return value
    if isinstance(value, str):
        raise ConfigError(f"{name} must be a number of examples, 'auto' or None; got {value!r}.")
    return at_least(1)(name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatchOptions(Options):
    """How a step goes through its batch."""

    micro_batch: int | Literal["auto"] | None = option(
        None,
        """Number of examples, on all devices together, of which a step computes the gradient at a
        time, to need less memory. It adds up the gradients of a batch and makes one update, so
        steps and schedules count batches as before. "auto" chooses the largest number with which
        the step fits into memory; None computes the whole batch at once.""",
        check=_micro_batch,
    )


def in_micro_batches(step: StepFn, size: int | str | None, norms: Norms | None = None) -> StepFn:
    """Wraps a training step so that it computes the gradients of a batch in parts.

    The update equals the update of the whole batch up to rounding, with any weights of examples.
    Batch normalization sees one micro-batch at a time, each of which has its own random key.

    Micro-batch `i` of `k` has the examples `i`, `i + k`, `i + 2 k` and so on, so that each device
    of a mesh keeps its own examples. What is left of a batch that `size` does not divide is one
    smaller micro-batch more.

    Args:
        step: a step of `train_step`.
        size: examples per micro-batch. None, or "auto" where nothing was chosen yet, returns the
            step itself.
        norms: the norms that the step returns; they are computed for the whole batch.
    """
    if not isinstance(size, int):
        return step
    one = measured(step)

    def stepped(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Any]]:
        number = num_examples(batch)
        if number <= size:
            return step(state, batch)
        if counts_itself(batch):
            raise BatchError(
                f"micro_batch={size} splits batches by their examples, but a batch of type "
                f"{type(batch).__name__} counts its examples itself. Pass micro_batch=None, and "
                "accumulate over batches: OptimizerConfig(accumulate=...)."
            )
        assert state.tx is not None
        sums = nothing_accumulated(state.params, state.opt_state)
        carry = state.replace(tx=collecting(state.tx), opt_state=sums)
        count, rest = divmod(number, size)
        carry, metrics = _over(one, carry, jax.tree.map(lambda x: x[: number - rest], batch), count)
        if rest:
            last = jax.tree.map(lambda x: x[number - rest :], batch)
            carry, others = _one(one, carry, jnp.int32(count), last)
            metrics = _merged(metrics, others)
        after, grads = _updated(state, carry)
        if norms is not None:
            metrics = {**metrics, **norms(grads, state.params, after.params)}
        return after, metrics

    return stepped


def _over(
    step: StepFn, state: TrainState, batch: Batch, count: int
) -> tuple[TrainState, dict[str, Metric]]:
    """Runs a step on each of `count` micro-batches of equal size; returns merged metrics."""

    def split(leaf: Any) -> jax.Array:
        rows = jnp.reshape(leaf, (-1, count, *leaf.shape[1:]))
        return jnp.moveaxis(rows, 1, 0)

    parts = jax.tree.map(split, batch)

    def body(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
        state, metrics = carry
        state, others = _one(step, state, *part)
        return (state, _merged(metrics, others)), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    _, shapes = jax.eval_shape(lambda *args: _one(step, *args), state, jnp.int32(0), first)
    like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    empty = {name: metric.empty_like() for name, metric in like.items()}
    carry, _ = jax.lax.scan(body, (state, empty), (jnp.arange(count, dtype=jnp.int32), parts))
    return carry


def _one(
    step: StepFn, state: TrainState, index: jax.Array, part: Batch
) -> tuple[TrainState, dict[str, Metric]]:
    """Runs a step on a micro-batch, with its own random key; `state.step` does not change."""
    key = state.rng
    if key is not None:
        own = jax.random.fold_in(jax.random.fold_in(key, _MICRO_BATCH), index)
        after, metrics = step(state.replace(rng=own), part)
    else:
        after, metrics = step(state, part)
    return after.replace(rng=key, step=state.step), dict(metrics)


def _merged(one: Mapping[str, Metric], other: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: metric.merge(other[name]) for name, metric in one.items()}


def _updated(before: TrainState, after: TrainState) -> tuple[TrainState, PyTree]:
    """Returns the state after the update from all micro-batches, and the mean gradient."""
    assert before.tx is not None
    with named_scope("optimizer"):
        grads, args = collected(after.opt_state, before.params)
        updates, opt_state = extra_args.update(
            before.tx, grads, after.opt_state.inner, before.params, args
        )
        params = optax.apply_updates(before.params, updates)
    changed = {"params": params, "opt_state": opt_state, "tx": before.tx, "step": before.step + 1}
    return after.replace(**changed), grads
